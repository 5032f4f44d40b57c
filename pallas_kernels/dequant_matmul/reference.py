"""The definition of correct: the weight in float32, then a product in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dequant_matmul import SYMMETRIC_ZERO, DequantMatmul, Int8Weights, Weights, unpack


def widened(weights: Weights) -> Array:
    """[K, N] float32."""
    scales = weights.scales.astype(jnp.float32)
    if isinstance(weights, Int8Weights):
        return weights.values.astype(jnp.float32) * scales[None]
    nibbles = unpack(weights.packed, weights.group).reshape(scales.shape[0], weights.group, scales.shape[1])
    zeros = SYMMETRIC_ZERO if weights.zeros is None else weights.zeros.astype(jnp.float32)[:, None]
    return ((nibbles.astype(jnp.float32) - zeros) * scales[:, None]).reshape(weights.shape)


def product(x: Array, weights: Weights) -> Array:
    w = widened(weights)
    return jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


IMPLEMENTATION = DequantMatmul("reference", product)
