"""XLA's own products, which its partitioner spreads over devices: cuBLAS and Triton on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.matmul import Matmul, Setting, Weight, gate


def multiply(x: Array, w: Weight, axes: int = 1, dtype: DTypeLike | None = None) -> Array:
    # One contracted axis, not three: XLA:CPU would transpose the weight in every step (16 of 97 ms, 12 layers).
    w = _plain(w)
    x, w = x.reshape(*x.shape[:-axes], -1), w.reshape(-1, *w.shape[axes:])
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)


def gated(x: Array, w: Weight, activation: str) -> Array:
    return gate(multiply(x, w), activation)


def lay_out(w: Array, axes: int) -> Weight:
    """As it is."""
    return w


def columns(w: Weight, numbers: Array) -> Array:
    return jnp.moveaxis(jnp.take(_plain(w), numbers, axis=1), 0, -1)


def _plain(w: Weight) -> Array:
    assert isinstance(w, Array), "laid out for another implementation"
    return w


def fewest_rows(setting: Setting) -> int:
    """XLA:CPU reads 2 GB/s of bfloat16 weights for fewer rows than this, 35 for more."""
    return 8 if setting.platform == "cpu" and setting.dtype != "float32" else 1


IMPLEMENTATION = Matmul("reference", multiply, gated, lay_out, columns, fewest_rows)
