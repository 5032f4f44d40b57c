"""The definition of correct: a reduction for each threshold, for XLA to fuse.

Keys and likelihoods are made once for all passes. On GPUs XLA (jax 0.11.2) makes one kernel of up to eight reductions
over the same input, and a small one for each to add up its parts; a broadcast over thresholds would be one kernel that
reads its input once for each. XLA:CPU fuses none of them.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from pallas_kernels.sampling import Reaching, Tails, likelihoods, ordered_bits


def count(logits: Array) -> Reaching:
    return _reaching(ordered_bits(logits), jnp.ones((), jnp.int32))


def mass(logits: Array, best: Array) -> Reaching:
    return _reaching(ordered_bits(logits), likelihoods(logits, best[:, None]))


def _reaching(keys: Array, values: Array) -> Reaching:
    """keys [S, V], values [S, V] or []."""

    def sums(thresholds: Array) -> Array:
        each = [keys >= thresholds[:, c, None] for c in range(thresholds.shape[-1])]
        return jnp.stack([jnp.sum(jnp.where(reaches, values, 0), axis=-1) for reaches in each], axis=-1)

    return sums


IMPLEMENTATION = Tails("reference", count, mass, bits=1)
"""On a CPU comparing takes the time, not reading: three thresholds a pass take 1.6 to 1.9 times as long as one, 15 take
4 to 7 times (8 rows of 152k, 64 of 1k)."""
WIDE = replace(IMPLEMENTATION, name="wide reference", bits=3)
"""For GPUs: seven thresholds are the most of which XLA makes one kernel."""
