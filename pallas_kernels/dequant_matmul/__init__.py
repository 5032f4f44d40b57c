"""Product with weights of 8 or 4 bits, widened as they are read: the shared types.

x [M, K] times a weight [K, N] -> [M, N] in x's dtype, with float32 sums. Weights of 8 bits have a scale of every output
column. Weights of 4 bits have scales, and zero points if they are not symmetric, of groups of 32, 64 or 128 rows (of
K), in every column.

Packing of 4 bits: K is cut into its groups. A group of g rows is g / 2 rows of bytes, and byte row i of a group holds
the group's row i in its low nibble and its row i + g / 2 in its high one. So what a kernel unpacks are two tiles of
neighbouring rows, not every other row. A nibble q is 0 to 15; the weight is (q - zero) * scale, where zero is 8 if
there are no zero points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

GROUPS = (32, 64, 128)
SYMMETRIC_ZERO = 8


class Int8Weights(NamedTuple):
    """``values`` [K, N] int8, ``scales`` [N] float32."""

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return self.values.shape[0], self.values.shape[1]


class Int4Weights(NamedTuple):
    """``packed`` [K / 2, N] uint8, ``scales`` [K / group, N] float32, bfloat16 or float16, ``zeros`` [K / group, N]
    int8 (0 to 15) or None."""

    packed: Array
    scales: Array
    zeros: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return 2 * self.packed.shape[0], self.packed.shape[1]

    @property
    def group(self) -> int:
        return 2 * self.packed.shape[0] // self.scales.shape[0]


Weights = Int8Weights | Int4Weights


def pack(nibbles: Array, group: int) -> Array:
    """[K, N] of 0 to 15 -> ``packed`` [K / 2, N]."""
    depth, columns = nibbles.shape
    if group not in GROUPS or depth % group:
        raise ValueError(f"groups of {group} of {depth} rows: they have {GROUPS} rows, and all the same")
    halves = nibbles.astype(jnp.uint8).reshape(depth // group, 2, group // 2, columns)
    return (halves[:, 0] | (halves[:, 1] << 4)).reshape(depth // 2, columns)


def unpack(packed: Array, group: int) -> Array:
    """The reverse, uint8."""
    halves = packed.reshape(-1, group // 2, packed.shape[1])
    return jnp.stack([halves & 15, halves >> 4], axis=1).reshape(-1, packed.shape[1])


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    capability: tuple[int, int] | None
    """Of a GPU: (9, 0) is Hopper."""
    dtype: str
    """Of x."""
    bits: int
    """Of a weight."""
    group: int | None
    """Of weights of 4 bits."""
    depth: int
    """K."""
    columns: int
    """N."""


@dataclass(frozen=True)
class DequantMatmul:
    """One implementation."""

    name: str
    product: Callable[[Array, Weights], Array]
    """(x [M, K], weights) -> [M, N] in x's dtype."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""
