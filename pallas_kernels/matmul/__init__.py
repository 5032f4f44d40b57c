"""Products of activations with weights: the shared types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    dtype: str
    """Of activations and weights."""
    num_devices: int
    """That the program is partitioned over."""


def gate(y: Array, activation: str) -> Array:
    """activation(gate) * up of y [..., 2, N]: in float32, so that it is rounded once and, by XLA:CPU, twice as fast."""
    wide = y.astype(jnp.float32)
    return (ACTIVATIONS[activation](wide[..., 0, :]) * wide[..., 1, :]).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Panels:
    """A weight [*K, *N] in panels of 64 columns, each with all of its rows; rows and columns that fill up are zeros."""

    values: Array
    """[panels, steps, 64, 4 bytes' worth of rows]: in bfloat16 pairs of rows lie beside each other."""
    depth: int = field(metadata={"static": True})
    """All of K."""
    columns: tuple[int, ...] = field(metadata={"static": True})
    """N."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


Weight = Array | Panels
"""A weight [*K, *N], as ``Matmul.lay_out`` left it."""


class Multiply(Protocol):
    def __call__(self, x: Array, w: Weight, axes: int = 1, dtype: DTypeLike | None = None) -> Array:
        """x [..., *K], w [*K, *N], both of one dtype; ``axes``: how many K has. Returns [..., *N], added up in float32
        and rounded to ``dtype``: x's (None) or float32."""
        ...


@dataclass(frozen=True)
class Matmul:
    """One implementation."""

    name: str
    multiply: Multiply
    gated: Callable[[Array, Weight, str], Array]
    """(x [..., K], w [K, 2, N], activation) -> [..., N] in x's dtype: the ``gate`` of their product."""
    lay_out: Callable[[Array, int], Weight]
    """(w [*K, *N], number of axes of K) -> what the others take for w, in as many bytes and what fills up."""
    columns: Callable[[Weight, Array], Array]
    """(w [K, N], numbers int [...]) -> [..., K]: columns as rows."""
    fewest_rows: Callable[[Setting], int] = lambda setting: 1
    """Of x, that it has a fast path for."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""
