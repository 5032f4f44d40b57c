"""The KV write of ``paged_attention.native``'s caches, in C++ (``native.cc``), in place."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import native
from pallas_kernels.kv_write import HeadNorm, Inputs, KvWrite
from pallas_kernels.paged_attention import Scoring

SOURCE = Path(__file__).with_suffix(".cc")


def write(
    k_cache: Array, v_cache: Array, inputs: Inputs, norm: HeadNorm, scoring: Scoring
) -> tuple[Array, Array, Array]:
    qkv = inputs.qkv
    tokens, kv_heads, _, head_dim = qkv.shape
    nothing = jnp.zeros((tokens, 0), jnp.float32)
    no_weight = jnp.zeros((0,), qkv.dtype)
    q = jax.ShapeDtypeStruct((tokens, kv_heads, inputs.group, head_dim), qkv.dtype)
    caches = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (k_cache, v_cache)]
    call = jax.ffi.ffi_call(native.register(SOURCE, "kv_write"), (q, *caches), input_output_aliases={6: 1, 7: 2})
    written = call(
        qkv,
        inputs.slot_mapping,
        *(inputs.rope or (nothing, nothing)),
        *(inputs.norm_weights or (no_weight, no_weight)),
        k_cache,
        v_cache,
        eps=np.float32(norm.eps),
        offset=np.float32(norm.offset),
    )
    return written[0], written[1], written[2]


IMPLEMENTATION = KvWrite("native", write)
