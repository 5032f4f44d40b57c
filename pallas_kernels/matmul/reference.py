"""XLA's own products, which its partitioner spreads over devices: cuBLAS and Triton on a GPU."""

from __future__ import annotations

import jax
from jax import Array

from pallas_kernels.matmul import Matmul, Setting, gate


def multiply(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def gated(x: Array, w: Array, activation: str) -> Array:
    return gate(multiply(x, w), activation)


def fewest_rows(setting: Setting) -> int:
    """XLA:CPU reads 2 GB/s of bfloat16 weights for fewer rows than this, 35 for more."""
    return 8 if setting.platform == "cpu" and setting.dtype != "float32" else 1


IMPLEMENTATION = Matmul("reference", multiply, gated, fewest_rows)
