"""bfloat16 products for CPUs in C++ (``native.cc``): XLA:CPU has a slow path for few rows, and none for one."""

from __future__ import annotations

import math
from pathlib import Path

import jax
from jax import Array

from pallas_kernels import native
from pallas_kernels.matmul import Matmul, Setting

SOURCE = Path(__file__).with_suffix(".cc")


def refuses(setting: Setting) -> str | None:
    if setting.platform != "cpu":
        return "it is for CPUs"
    if setting.dtype != "bfloat16":
        return f"it takes bfloat16, not {setting.dtype}: XLA is as fast there"
    if setting.num_devices > 1:
        return f"XLA cannot spread it over {setting.num_devices} devices"
    return native.refusal()


def multiply(x: Array, w: Array) -> Array:
    rows, columns = math.prod(x.shape[:-1]), math.prod(w.shape[1:])
    call = jax.ffi.ffi_call(native.register(SOURCE, "matmul"), jax.ShapeDtypeStruct((rows, columns), x.dtype))
    return call(x.reshape(rows, -1), w.reshape(-1, columns)).reshape(*x.shape[:-1], *w.shape[1:])


IMPLEMENTATION = Matmul("native", multiply, refuses=refuses)
