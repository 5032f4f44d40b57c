"""A parameter of the model as stored, made one of the same model fitted to a mesh (``DecoderConfig.fit_to``).

What to do follows from the parameter's logical axes alone. Whatever is filled up is filled with zeros, so that it
adds nothing: a zero query head has zero rows in the output projection, a zero feed-forward column has them in ``down``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import jax.numpy as jnp
from jax import Array

from jaxserve.models.config import DecoderConfig
from jaxserve.weights.source import Source, concat

Axes = tuple[str | None, ...]
"""A parameter's logical axes."""


def fit_source(source: Source, axes: Axes, stored: DecoderConfig, fitted: DecoderConfig) -> Source:
    """``source`` in the fitted model's shape, still lazy: a box of it reads what it shows of the checkpoint."""
    return _fit(source, concat, axes, stored, fitted)


def fit_array(array: Array, axes: Axes, stored: DecoderConfig, fitted: DecoderConfig) -> Array:
    """The same for an array, inside a jitted program or out of it."""
    return _fit(_Eager(array), _join, axes, stored, fitted).array


class _Tensor(Protocol):
    """What sources and arrays have in common here; ``Source`` says what each does."""

    def narrow(self, axis: int, start: int, size: int) -> Self: ...
    def pad(self, axis: int, size: int) -> Self: ...
    def repeat(self, axis: int, times: int) -> Self: ...
    def split(self, axis: int, sizes: Sequence[int]) -> Self: ...
    def merge(self, axis: int, count: int) -> Self: ...


def _fit[T: _Tensor](
    x: T, join: Callable[[Sequence[T], int], T], axes: Axes, stored: DecoderConfig, fitted: DecoderConfig
) -> T:
    group = stored.group_size
    for axis, logical in enumerate(axes):
        if logical == "vocab":
            x = x.pad(axis, fitted.vocab_size + fitted.vocab_padding)
        elif logical == "mlp":
            x = x.pad(axis, fitted.intermediate_size)
        elif logical == "kv_heads" and "q_group" in axes:
            x = _fit_queries(x, axis, fitted)
        elif logical == "kv_heads" and "qkv_group" in axes and fitted.kv_copies > 1:
            queries = _fit_queries(x.narrow(axis + 1, 0, group), axis, fitted)
            x = join([queries, _fit_keys(x.narrow(axis + 1, group, 2), axis, fitted)], axis + 1)
        elif logical == "kv_heads":
            x = _fit_keys(x, axis, fitted)
    return x


def _fit_queries[T: _Tensor](x: T, axis: int, fitted: DecoderConfig) -> T:
    """[.., K, G, ..] at ``axis``: the query heads of each KV head, spread over its copies."""
    copies, group = fitted.kv_copies, fitted.group_size
    if copies > 1:
        x = x.pad(axis + 1, copies * group).split(axis + 1, (copies, group)).merge(axis, 2)
    return x.pad(axis, fitted.num_kv_heads)


def _fit_keys[T: _Tensor](x: T, axis: int, fitted: DecoderConfig) -> T:
    """[.., K, ..] at ``axis``: each KV head as often as it has copies."""
    return x.repeat(axis, fitted.kv_copies).pad(axis, fitted.num_kv_heads)


@dataclass(frozen=True)
class _Eager:
    """An array with the operations of a source."""

    array: Array

    def narrow(self, axis: int, start: int, size: int) -> _Eager:
        return _Eager(self.array[(slice(None),) * axis + (slice(start, start + size),)])

    def pad(self, axis: int, size: int) -> _Eager:
        missing = [(0, 0)] * self.array.ndim
        missing[axis] = (0, size - self.array.shape[axis])
        return _Eager(jnp.pad(self.array, missing))

    def repeat(self, axis: int, times: int) -> _Eager:
        return _Eager(jnp.repeat(self.array, times, axis))

    def split(self, axis: int, sizes: Sequence[int]) -> _Eager:
        shape = self.array.shape
        return _Eager(self.array.reshape(*shape[:axis], *sizes, *shape[axis + 1 :]))

    def merge(self, axis: int, count: int) -> _Eager:
        shape = self.array.shape
        return _Eager(self.array.reshape(*shape[:axis], -1, *shape[axis + count :]))


def _join(parts: Sequence[_Eager], axis: int) -> _Eager:
    return _Eager(jnp.concatenate([part.array for part in parts], axis))
