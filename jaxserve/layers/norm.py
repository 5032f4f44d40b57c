"""Normalisation. Statistics are computed in float32 whatever the activations' dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.models.config import NormConfig


def rms_normalize(x: Array, eps: float, axes: tuple[int, ...] = (-1,)) -> Array:
    """x / rms(x) over ``axes``, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)


class Norm(nnx.Module):
    """RMS or layer norm over the trailing axes that ``shape`` names.

    ``shape`` is the weight's; with ``axes`` it says how the weight is sharded. ``reduce`` is how many
    trailing axes share one statistic (all of ``shape``, unless told).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        config: NormConfig,
        dtype: jnp.dtype,
        axes: tuple[str | None, ...] | None = None,
    ) -> None:
        axes = axes or (None,) * len(shape)
        self.config = config
        self.num_axes = len(shape)
        if not config.affine:
            return
        self.weight = nnx.Param(jnp.full(shape, 1.0 - config.offset, dtype), axes=axes)
        if config.kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes)

    def __call__(self, x: Array) -> Array:
        """x [..., *shape] -> the same shape and dtype."""
        reduce = tuple(range(-self.num_axes, 0))
        y = x.astype(jnp.float32)
        if self.config.kind == "layer":
            y = y - jnp.mean(y, axis=reduce, keepdims=True)
        y = rms_normalize(y, self.config.eps, reduce)
        if self.config.affine:
            y = y * (_broadcast(self.weight[...], x).astype(jnp.float32) + self.config.offset)
            if self.config.kind == "layer":
                y = y + _broadcast(self.bias[...], x).astype(jnp.float32)
        return y.astype(x.dtype)


def _broadcast(weight: Array, x: Array) -> Array:
    """Give ``weight`` the leading axes of ``x`` (ranks are promoted explicitly in this project)."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
