"""How kernels are timed on a GPU, and the two limits that they are held against, measured in the same run.

A kernel may be over in less time than Python takes to start it. So a program runs through many calls, each of which
needs the result of the one before it; operands are as many as no cache holds; and as many programs are started, one
behind the other, as fill a few milliseconds. A time is the median of some such repeats, divided by the calls in one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CACHE_BYTES = 256 << 20
"""That the operands of successive calls have together, at least: twice the L2 cache of a B200, the largest."""
REPEATS = 7
REPEAT_SECONDS = 0.01
SLOW = 0.5
"""Seconds of a program that is repeated less often."""
COPY_BYTES = 4 << 30
GEMM_SIZE = 8192


@dataclass(frozen=True)
class Work:
    """Something to time. ``call`` (carry, operands) -> (carry, kept) is traced. It makes the next call wait for this
    one through its carry, which is given away; what it keeps comes out of the program, so that XLA leaves nothing out.
    ``operands``: one tree of arrays for each of the calls in turn."""

    call: Callable[[Any, Any], tuple[Any, Any]]
    carry: Callable[[], Any]
    operands: Sequence[Any]

    @cached_property
    def once(self) -> Any:
        """The program of one call."""
        return compiled(self, 1)

    def result(self) -> Any:
        """Of one call: carry and what is kept."""
        return self.once(self.carry(), list(self.operands))


@dataclass(frozen=True)
class Timing:
    """Of one call, in seconds; ``calls``: of a repeat."""

    seconds: float
    fastest: float
    slowest: float
    calls: int


def time_work(work: Work, calls: int = 8, repeats: int = REPEATS, repeat_seconds: float = REPEAT_SECONDS) -> Timing:
    """``calls``: of one program."""

    program, operands = work.once if calls == 1 else compiled(work, calls), list(work.operands)
    carry = program(work.carry(), operands)[0]
    seconds, carry = _run(program, carry, operands, 1)
    repeats = repeats if seconds < SLOW else min(repeats, 3)
    programs = max(1, round(repeat_seconds / max(seconds, 1e-9)))
    times = []
    for _ in range(repeats):
        seconds, carry = _run(program, carry, operands, programs)
        times.append(seconds / (programs * calls))
    return Timing(median(times), min(times), max(times), programs * calls)


def compiled(work: Work, calls: int, carry: Any = None, options: Any = None) -> Any:
    """(carry, operands) -> the carry after so many calls, and what each of them keeps. ``carry``: shapes with
    shardings, where it is compiled for a GPU that is not there; ``options``: of the compiler."""

    def several(carry: Any, operands: Sequence[Any]) -> Any:
        kept = []
        for i in range(calls):
            carry, one = work.call(carry, operands[i % len(operands)])
            kept.append(one)
        return carry, kept

    first = jax.eval_shape(work.carry) if carry is None else carry
    return jax.jit(several, donate_argnums=0).lower(first, list(work.operands)).compile(options)


def _run(program: Any, carry: Any, operands: Any, times: int) -> tuple[float, Any]:
    """Seconds of starting the program so often, and of waiting once."""
    jax.block_until_ready(carry)
    start = time.perf_counter()
    for _ in range(times):
        carry = program(carry, operands)[0]
    jax.block_until_ready(carry)
    return time.perf_counter() - start, carry


def copies(num_bytes: int) -> int:
    """Of operands of so many bytes, as many as no cache holds, but no more than a program has calls."""
    return max(1, min(8, -(-CACHE_BYTES // max(1, num_bytes))))


@dataclass(frozen=True)
class Limits:
    """What this GPU does: bytes per second of a large copy, reading and writing counted, and FLOP per second of a
    large bfloat16 product."""

    bandwidth: float
    flops: float

    def floor(self, num_bytes: float, num_flops: float) -> float:
        """Seconds that reading and computing take at least, one beside the other."""
        return max(num_bytes / self.bandwidth, num_flops / self.flops)


def measure_limits(copy_bytes: int = COPY_BYTES, gemm_size: int = GEMM_SIZE) -> Limits:
    copied = time_work(copy_work(copy_bytes), calls=1)
    product = time_work(gemm_work(gemm_size))
    return Limits(2 * copy_bytes / copied.seconds, 2 * gemm_size**3 / product.seconds)


def copy_work(num_bytes: int) -> Work:
    """Reads an array and writes it, once; of several calls in one program XLA would make one."""

    def call(x: Any, operands: Any) -> tuple[Any, Any]:
        return x + jnp.float32(1), ()

    return Work(call, lambda: jnp.zeros(num_bytes // 4, jnp.float32), [()])


def gemm_work(size: int) -> Work:
    """Of random numbers: a GPU is faster on zeros, which take less power. The product is the next one's operand."""
    w = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) / jnp.bfloat16(size**0.5)

    def call(x: Any, w: Any) -> tuple[Any, Any]:
        y = jnp.dot(x, w, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
        return y, ()

    return Work(call, lambda: jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16), [w])


def relative_error(found: Any, expected: Any) -> float:
    """By the norm, the largest of all arrays of a result; infinite where there is NaN. Computed on the device: results
    of gigabytes do not travel."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(_error(*map(float, _squares(f, e))) for f, e in pairs)


def _error(off: float, norm: float) -> float:
    error = (off / norm) ** 0.5 if norm else float(off > 0)
    return error if np.isfinite(error) else float("inf")


@jax.jit
def _squares(found: Any, expected: Any) -> Any:
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.sum(jnp.square(found - expected)), jnp.sum(jnp.square(expected))


def the_device(small: bool) -> Any:
    """The first of jax's; ValueError where it is not a GPU and nothing small is asked for."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not small:
        raise ValueError(f"no GPU: jax has {device.device_kind} devices only")
    return device


def capability_of(device: Any) -> tuple[int, int] | None:
    """Of a GPU: (9, 0) is Hopper."""
    if device.platform != "gpu":
        return None
    major, _, minor = str(device.compute_capability).partition(".")
    return int(major), int(minor)
