"""Grouped matmul, the product of a mixture of experts: the shared types.

The M rows of x [M, K] are sorted by expert: expert e owns the ``group_sizes[e]`` rows behind those of the experts
before it, and multiplies them by its own ``values[e]`` [K, N]. Sums are float32, the output [M, N] has x's dtype. Rows
past the sum of the group sizes are padding: what comes back for them is zero, whatever they hold (NaN included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import Array

NARROW = ("int8", "float8_e4m3fn")
"""Dtypes of weights that come with scales."""


class Weights(NamedTuple):
    """``values`` [E, K, N]: float32, bfloat16, float16, or one of ``NARROW``. Then, and only then, there are
    ``scales`` [E, N] float32, one of every output column: the weight is value * scale."""

    values: Array
    scales: Array | None = None


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    capability: tuple[int, int] | None
    """Of a GPU: (9, 0) is Hopper."""
    dtype: str
    """Of x."""
    weight_dtype: str
    num_experts: int
    depth: int
    """K."""
    columns: int
    """N."""


@dataclass(frozen=True)
class GroupedMatmul:
    """One implementation. It owns the plan of its work."""

    name: str
    plan: Callable[[Array, int], Any]
    """(group_sizes [E] int32, M) -> a pytree of arrays: which rows are whose. It serves all products of a layer, whose
    K and N differ."""
    product: Callable[[Array, Weights, Any], Array]
    """(x [M, K], weights, plan) -> [M, N] in x's dtype."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""
