"""The definition of correct: norm, rotation and scatter one after the other, for XLA to fuse."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_write import HeadNorm, Inputs, KvWrite
from pallas_kernels.paged_attention import Scoring, stored

Write = Callable[[Array, Array, Array, Array, Array, Scoring], tuple[Array, Array]]
"""(k_cache, v_cache, k [T,K,H], v [T,K,H], slot_mapping [T], scoring) -> the caches with k and v written."""


def heads(inputs: Inputs, norm: HeadNorm) -> tuple[Array, Array, Array]:
    """q [T, K, G, H], k and v [T, K, H] as attention takes them."""
    group = inputs.group
    q, k, v = inputs.qkv[:, :, :group], inputs.qkv[:, :, group], inputs.qkv[:, :, group + 1]
    if inputs.norm_weights is not None:
        q, k = (_normalized(x, weight, norm) for x, weight in zip((q, k), inputs.norm_weights, strict=True))
    if inputs.rope is not None:
        cos, sin = inputs.rope
        q, k = _rotated(q, cos[:, None, None], sin[:, None, None]), _rotated(k, cos[:, None], sin[:, None])
    return q, k, v


def before(name: str, write_caches: Write) -> KvWrite:
    """The KV write of caches of any layout, from what writes K and V to them."""

    def write(
        k_cache: Array, v_cache: Array, inputs: Inputs, norm: HeadNorm, scoring: Scoring
    ) -> tuple[Array, Array, Array]:
        q, k, v = heads(inputs, norm)
        return q, *write_caches(k_cache, v_cache, k, v, inputs.slot_mapping, scoring)

    return KvWrite(name, write)


def scatter(
    k_cache: Array, v_cache: Array, k: Array, v: Array, slot_mapping: Array, scoring: Scoring
) -> tuple[Array, Array]:
    block, offset = slot_mapping // k_cache.shape[2], slot_mapping % k_cache.shape[2]
    return (
        k_cache.at[block, :, offset].set(stored(k, k_cache.dtype, scoring.k_scale)),
        v_cache.at[block, :, offset].set(stored(v, v_cache.dtype, scoring.v_scale)),
    )


def _normalized(x: Array, weight: Array, norm: HeadNorm) -> Array:
    """x [..., H], weight [H] -> x's shape and dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) / y.shape[-1] + norm.eps)
    factor = weight.astype(jnp.float32) + norm.offset
    return (y * factor.reshape((1,) * (x.ndim - 1) + factor.shape)).astype(x.dtype)


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    """x [T, ..., H], cos and sin of its rank [T, ..., R/2] -> x's shape and dtype."""
    half = cos.shape[-1]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)


IMPLEMENTATION = before("reference", scatter)
