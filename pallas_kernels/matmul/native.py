"""Products for CPUs in C++ (``native.cc``).

XLA:CPU has three quarters of their speed for the tens of rows of a decoding step, in bfloat16 half of it for fewer rows
and a twentieth for one. It is as fast for hundreds of rows; and for the fewest in float32, which are left to it.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import native
from pallas_kernels.matmul import Matmul, Setting, gate, reference

SOURCE = Path(__file__).with_suffix(".cc")
NO_ACTIVATION, FUSED = 0, {"silu": 1, "gelu_tanh": 2}
"""As in ``native.cc``."""
DTYPES = ("bfloat16", "float32")
FEW_ROWS = 6
"""Of float32, which XLA multiplies."""


def refuses(setting: Setting) -> str | None:
    if setting.platform != "cpu":
        return "it is for CPUs"
    if setting.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, not {setting.dtype}"
    if setting.num_devices > 1:
        return f"XLA cannot spread it over {setting.num_devices} devices"
    return native.refusal()


def multiply(x: Array, w: Array) -> Array:
    if _is_left_to_xla(x):
        return reference.multiply(x, w)
    return _call(x, w, math.prod(w.shape[1:]), NO_ACTIVATION).reshape(*x.shape[:-1], *w.shape[1:])


def gated(x: Array, w: Array, activation: str) -> Array:
    """In one pass, of the activations that C++ has; XLA has the others."""
    if activation not in FUSED or _is_left_to_xla(x):
        return gate(multiply(x, w), activation)
    return _call(x, w, w.shape[2], FUSED[activation]).reshape(*x.shape[:-1], w.shape[2])


def _is_left_to_xla(x: Array) -> bool:
    return x.dtype == jnp.float32 and math.prod(x.shape[:-1]) <= FEW_ROWS


def _call(x: Array, w: Array, columns: int, activation: int) -> Array:
    rows, depth = math.prod(x.shape[:-1]), x.shape[-1]
    call = jax.ffi.ffi_call(native.register(SOURCE, "matmul"), jax.ShapeDtypeStruct((rows, columns), x.dtype))
    return call(x.reshape(rows, depth), w.reshape(depth, -1), activation=np.int64(activation))


IMPLEMENTATION = Matmul("native", multiply, gated, refuses=refuses)
