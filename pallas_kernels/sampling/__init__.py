"""How much of each row of logits reaches each of some thresholds: what finds top-k and top-p without a sort.

Logits are compared as ``ordered_bits``. A search that tries 2**bits - 1 thresholds at a time knows the 32 bits of the
right one after ceil(32 / bits) passes over the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Reaching = Callable[[Array], Array]
"""Thresholds uint32 [S, C], none of them 0 -> [S, C]: a sum over the row's entries whose ordered bits are no smaller.
Of a smaller threshold it is no smaller, although float sums are rounded: all of a call are taken in the same order."""


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    capability: tuple[int, int] | None
    """Of a GPU: (9, 0) is Hopper."""


@dataclass(frozen=True)
class Tails:
    """One implementation. Logits are float32 [S, V] without NaN, all there are or one device's."""

    name: str
    count: Callable[[Array], Reaching]
    """(logits) -> how many entries reach a threshold, int32."""
    mass: Callable[[Array, Array], Reaching]
    """(logits, best float32 [S]) -> the sum of exp(logits - best) over those entries, float32; -inf adds nothing."""
    bits: int
    """That a pass should find."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""


def ordered_bits(x: Array) -> Array:
    """uint32 keys that compare as the floats do; both zeros are equal."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(bits == jnp.uint32(1 << 31), jnp.uint32(0), bits)  # -0.0
    negative = (bits >> 31) == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def likelihoods(logits: Array, best: Array) -> Array:
    """exp(logits - best), and 0 of -inf where ``best`` is that too."""
    return jnp.where(logits > -jnp.inf, jnp.exp(logits - best), 0.0)
