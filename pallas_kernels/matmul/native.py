"""Products for CPUs in C++ (``native.cc``), of weights laid out for them.

XLA:CPU has 70 % of their speed for the tens of rows of a decoding step, in bfloat16 55 %, and for one row a twentieth.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import native
from pallas_kernels.matmul import Matmul, Panels, Setting, Weight, gate

SOURCE = Path(__file__).with_suffix(".cc")
PANEL = 64
"""Columns, as in ``native.cc``."""
NO_ACTIVATION, FUSED = 0, {"silu": 1, "gelu_tanh": 2}
"""As in ``native.cc``."""
DTYPES = ("bfloat16", "float32")


def refuses(setting: Setting) -> str | None:
    if setting.platform != "cpu":
        return "it is for CPUs"
    if setting.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, not {setting.dtype}"
    if setting.num_devices > 1:
        return f"XLA cannot spread it over {setting.num_devices} devices"
    return native.refusal()


def lay_out(w: Array, axes: int) -> Weight:
    depth, columns = math.prod(w.shape[:axes]), w.shape[axes:]
    rows = _rows_per_step(w)
    w = w.reshape(depth, -1)
    w = jnp.pad(w, ((0, -depth % rows), (0, -w.shape[1] % PANEL)))
    return Panels(w.reshape(-1, rows, w.shape[1] // PANEL, PANEL).transpose(2, 0, 3, 1), depth, columns)


def columns(w: Weight, numbers: Array) -> Array:
    w = _laid_out(w)
    found = w.values[numbers // PANEL, :, numbers % PANEL]
    return found.reshape(*numbers.shape, -1)[..., : w.depth]


def multiply(x: Array, w: Weight, axes: int = 1, dtype: DTypeLike | None = None) -> Array:
    w = _laid_out(w)
    y = _call(x.reshape(-1, w.depth), w, math.prod(w.columns), NO_ACTIVATION, x.dtype if dtype is None else dtype)
    return y.reshape(*x.shape[:-axes], *w.columns)


def gated(x: Array, w: Weight, activation: str) -> Array:
    """In one pass, where C++ has the activation and no panel holds both gates and what they let through."""
    w = _laid_out(w)
    _, count = w.columns
    if activation not in FUSED or count % PANEL:
        return gate(multiply(x, w), activation)
    return _call(x.reshape(-1, w.depth), w, count, FUSED[activation], x.dtype).reshape(*x.shape[:-1], count)


def _call(x: Array, w: Panels, columns: int, activation: int, dtype: DTypeLike) -> Array:
    call = jax.ffi.ffi_call(native.register(SOURCE, "matmul"), jax.ShapeDtypeStruct((len(x), columns), dtype))
    return call(x, w.values, activation=np.int64(activation))


def _rows_per_step(w: Array) -> int:
    return 4 // w.dtype.itemsize


def _laid_out(w: Weight) -> Panels:
    assert isinstance(w, Panels), "not laid out for this implementation"
    return w


IMPLEMENTATION = Matmul("native", multiply, gated, lay_out, columns, refuses=refuses)
