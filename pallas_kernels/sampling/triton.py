"""One pass over the logits for all thresholds, in Pallas' Triton style: Ampere to Blackwell.

A program goes through a part of a row in steps, with a few accumulators a thread for each threshold; keys and
likelihoods are made from the logits on the way. XLA adds the parts up: atomics would do so in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.sampling import Reaching, Setting, Tails, likelihoods, ordered_bits

BITS = 4
"""Found by a pass, with 15 thresholds. Reckoned, not timed: each costs three instructions an entry (compare, select,
add), all 15 with what goes before 55 to 68, which take an H200 (132 SMs of 128 lanes, 1.98 GHz) 2 to 2.4 times as long
as reading the entry (4 bytes at 4.8 TB/s). With 3 bits it would be 1.1 to 1.6 times, so that 11 such passes over many
long rows cost less than 8 of these. But a pass over few rows, or over one device's part of them, costs most in launches
and in adding up between devices, and so does its number count."""
PROGRAMS = 1024
"""That a pass should have where parts of ``SMALLEST`` entries give them: an H200's SMs hold some eight each."""
SMALLEST, LARGEST = 2048, 8192
"""Entries of a part: enough of them to be worth adding up, no more than leaves the last SMs little to wait for."""
VECTOR = 4
"""Entries that a thread reads at once, 16 bytes, and sums up before it adds them to an accumulator."""


@dataclass(frozen=True)
class Parts:
    """How a row is cut up: ``number`` parts, each gone through in steps of ``entries``, a power of two."""

    number: int
    entries: int = 1024
    num_warps: int = 4

    def steps(self, vocab: int) -> int:
        return pl.cdiv(vocab, self.number * self.entries)


def parts_of(num_rows: int, vocab: int) -> Parts:
    return Parts(max(pl.cdiv(vocab, LARGEST), min(pl.cdiv(vocab, SMALLEST), pl.cdiv(PROGRAMS, num_rows))))


def count(logits: Array, parts: Parts | None = None, interpret: bool = False) -> Reaching:
    return partial(_pass, logits, None, parts=parts, interpret=interpret)


def mass(logits: Array, best: Array, parts: Parts | None = None, interpret: bool = False) -> Reaching:
    return partial(_pass, logits, best, parts=parts, interpret=interpret)


def _pass(logits: Array, best: Array | None, thresholds: Array, *, parts: Parts | None, interpret: bool) -> Array:
    """logits [S, V], best [S] or None: entries count 1 each, thresholds [S, C] -> [S, C]."""
    num_rows, vocab = logits.shape
    parts = parts or parts_of(num_rows, vocab)
    dtype = jnp.int32 if best is None else jnp.float32
    sums = pl.pallas_call(
        partial(_kernel, parts=parts),
        grid=(num_rows, parts.number),
        out_shape=jax.ShapeDtypeStruct((num_rows, parts.number, thresholds.shape[1]), dtype),
        compiler_params=plt.CompilerParams(num_warps=parts.num_warps, num_stages=1),
        interpret=interpret,
        name="count_tails" if best is None else "sum_tails",
    )(logits, best, thresholds)
    return jnp.sum(sums, axis=1)


def _kernel(logits: Any, best: Any, thresholds: Any, out: Any, *, parts: Parts) -> None:
    """References; those of ``_pass``, and out [S, parts, C]."""
    row, part = pl.program_id(0), pl.program_id(1)
    vocab, dtype = logits.shape[1], out.dtype
    steps = parts.steps(vocab)
    each = [thresholds[row, c] for c in range(thresholds.shape[1])]
    threads = parts.entries // VECTOR
    in_step = jnp.arange(threads)[:, None] * VECTOR + jnp.arange(VECTOR)[None]

    def step(i: Array, sums: list[Array]) -> list[Array]:
        column = (part * steps + i) * parts.entries + in_step
        exists = column < vocab
        x = plt.load(logits.at[jnp.full_like(column, row), column], mask=exists, other=-jnp.inf)
        keys = jnp.where(exists, ordered_bits(x), jnp.uint32(0))
        values = jnp.ones(x.shape, dtype) if best is None else likelihoods(x, best[row])
        zero = jnp.zeros((), dtype)
        return [s + jnp.sum(jnp.where(keys >= t, values, zero), axis=1) for s, t in zip(sums, each, strict=True)]

    sums = jax.lax.fori_loop(0, steps, step, [jnp.zeros(threads, dtype) for _ in each])
    for c, s in enumerate(sums):
        out[row, part, c] = jnp.sum(s)


def _refuses(setting: Setting) -> str | None:
    if setting.platform != "gpu" or setting.capability is None or setting.capability < (8, 0):
        return "it is for NVIDIA GPUs of capability 8.0 and up"
    return None


def _refuses_interpreted(setting: Setting) -> str | None:
    return None if setting.platform == "cpu" else "it is for tests on a CPU"


IMPLEMENTATION = Tails("triton", count, mass, BITS, _refuses)
SMALL = Parts(number=2, entries=16)
"""For the interpreter: small vocabularies are cut into several parts and steps."""
INTERPRETED = Tails(
    "triton_interpreted",
    partial(count, parts=SMALL, interpret=True),
    partial(mass, parts=SMALL, interpret=True),
    BITS,
    _refuses_interpreted,
)
"""The same kernel, step by step, on a CPU: far too slow for anything but tests."""
