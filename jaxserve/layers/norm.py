"""Normalisation. Statistics are computed in float32 whatever the activations' dtype."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.models.config import NormConfig


def rms_normalize(x: Array, eps: float, axes: tuple[int, ...] = (-1,), count: int | None = None) -> Array:
    """x / rms(x) over ``axes``, in float32; ``count`` of the entries are real, the others zero (default: all are)."""
    x = x.astype(jnp.float32)
    count = math.prod(x.shape[axis] for axis in axes) if count is None else count
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axes, keepdims=True) / count + eps)


class Norm(nnx.Module):
    """RMS or layer norm over the trailing axes that ``shape`` names, which share one statistic.

    ``shape`` is the weight's; ``axes`` says how the weight is sharded. Where some entries are zeros that only fill up
    a mesh, ``count`` is how many are not: the statistic is theirs (RMS only, where zeros add nothing to the sum).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        config: NormConfig,
        dtype: jnp.dtype,
        axes: tuple[str | None, ...] | None = None,
        count: int | None = None,
    ) -> None:
        assert count in (None, math.prod(shape)) or config.kind == "rms", "a mean of real entries would need a mask"
        axes = axes or (None,) * len(shape)
        self.config = config
        self.num_axes, self.count = len(shape), count
        if not config.affine:
            return
        self.weight = nnx.Param(jnp.full(shape, 1.0 - config.offset, dtype), axes=axes)
        if config.kind == "layer":
            self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=axes)

    @jax.named_scope("norm")
    def __call__(self, x: Array) -> Array:
        """x [..., *shape] -> the same shape and dtype."""
        reduce = tuple(range(-self.num_axes, 0))
        y = x.astype(jnp.float32)
        if self.config.kind == "layer":
            y = y - jnp.mean(y, axis=reduce, keepdims=True)
        y = rms_normalize(y, self.config.eps, reduce, self.count)
        if self.config.affine:
            y = y * (_broadcast(self.weight[...], x).astype(jnp.float32) + self.config.offset)
            if self.config.kind == "layer":
                y = y + _broadcast(self.bias[...], x).astype(jnp.float32)
        return y.astype(x.dtype)


def _broadcast(weight: Array, x: Array) -> Array:
    """Give ``weight`` the leading axes of ``x`` (ranks are promoted explicitly in this project)."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
