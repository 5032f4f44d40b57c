"""Products of activations with weights: the shared types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    dtype: str
    """Of activations and weights."""
    num_devices: int
    """That the program is partitioned over."""


@dataclass(frozen=True)
class Matmul:
    """One implementation."""

    name: str
    multiply: Callable[[Array, Array], Array]
    """(x [..., K], w [K, *N]) -> [..., *N] in x's dtype, added up in float32. Both have the same dtype."""
    fewest_rows: Callable[[Setting], int] = lambda setting: 1
    """Of x, that it has a fast path for."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""
