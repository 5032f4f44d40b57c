"""Paged attention for CPUs in C++ (``native.cc``): what is live is read once, where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import native
from pallas_kernels.kv_write.native import IMPLEMENTATION as KV_WRITE
from pallas_kernels.paged_attention import PagedAttention, Ragged, Scoring, Setting, Shape
from pallas_kernels.paged_attention.cpu import cache_shapes

SOURCE = Path(__file__).with_suffix(".cc")
DTYPES = ("float32", "bfloat16")


class Plan(NamedTuple):
    """The parts of ``Ragged`` that say whose rows are whose and what they see; how they are cut up is C++'s."""

    cu_q_lens: Array
    block_tables: Array
    visible: Array


def refuses(setting: Setting) -> str | None:
    if setting.platform != "cpu":
        return "it is for CPUs"
    for what, dtype in (("queries", setting.dtype), ("a KV cache", setting.kv_dtype)):
        if dtype not in DTYPES:
            return f"it takes {' and '.join(DTYPES)}, not {what} of {dtype}"
    return native.refusal()


def plan(ragged: Ragged, num_tokens: int, shape: Shape) -> Plan:
    return Plan(ragged.cu_q_lens, ragged.block_tables, ragged.visible)


def attend(q: Array, k_cache: Array, v_cache: Array, plan: Plan, shape: Shape, scoring: Scoring) -> tuple[Array, Array]:
    results = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))
    call = jax.ffi.ffi_call(native.register(SOURCE, "paged_attention"), results)
    out, lse = call(
        q,
        k_cache,
        v_cache,
        *plan,
        scale=np.float32(scoring.scale * scoring.k_scale),
        softcap=np.float32(scoring.softcap or 0.0),
        window=np.int64(shape.window or 0),
    )
    return out, lse


IMPLEMENTATION = PagedAttention("native", cache_shapes, KV_WRITE, plan, attend, refuses)
