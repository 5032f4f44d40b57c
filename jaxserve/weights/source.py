"""Tensors of a checkpoint that are read only where, and when, a device needs them.

A ``Source`` has a shape and can read any box of itself. Families rearrange sources (transpose, split, concatenate)
into the decoder's layouts; nothing is read until a device's shard asks for its box, and then only that box is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Box = tuple[slice, ...]
"""One slice per axis, with explicit start and stop, step 1."""

COMPARED_ENTRIES = 4 << 20
"""Of each of two tensors, in memory at a time while they are compared."""


class Source(ABC):
    """A read-only tensor that is not in memory."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, box: Box) -> np.ndarray:
        """The values in ``box``; a copy or a view, in the stored dtype, or float32 where several meet."""

    def read_all(self) -> np.ndarray:
        return self.read(tuple(slice(0, n) for n in self.shape))

    def transpose(self, *order: int) -> Source:
        return Transposed(self, order)

    def split(self, axis: int, sizes: Sequence[int]) -> Source:
        """Replace ``axis`` by axes of ``sizes`` (row-major)."""
        return Split(self, axis, tuple(sizes))

    def merge(self, axis: int, count: int) -> Source:
        """Flatten ``count`` axes from ``axis`` on into one (row-major)."""
        merged: Source = self
        for _ in range(count - 1):
            merged = Merged(merged, axis)
        return merged

    def narrow(self, axis: int, start: int, size: int) -> Source:
        return Narrowed(self, axis, start, size)

    def repeat(self, axis: int, times: int) -> Source:
        """Every entry of ``axis`` ``times`` times in a row."""
        return self if times == 1 else Repeated(self, axis, times)

    def pad(self, axis: int, size: int) -> Source:
        """Zeros behind ``axis`` up to ``size``."""
        return self if self.shape[axis] == size else Padded(self, axis, size)


def concat(sources: Sequence[Source], axis: int) -> Source:
    return Concatenated(tuple(sources), axis)


def stack(sources: Sequence[Source], axis: int) -> Source:
    return concat([s.split(axis, (1, s.shape[axis])) for s in sources], axis)


def same(left: Source, right: Source) -> bool:
    """Whether two tensors hold the same float32 values. Some rows are read at a time, up to the first that differ."""
    if left.shape != right.shape:
        return False
    rows, *rest = left.shape
    step = max(1, COMPARED_ENTRIES // max(1, math.prod(rest)))
    boxes = ((slice(i, min(i + step, rows)), *(slice(0, n) for n in rest)) for i in range(0, rows, step))
    return all(np.array_equal(left.read(b).astype(np.float32), right.read(b).astype(np.float32)) for b in boxes)


def _join(pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenated; as float32 where their dtypes differ: float16 and bfloat16 have no other in common."""
    if len({piece.dtype for piece in pieces}) > 1:
        pieces = [piece.astype(np.float32) for piece in pieces]
    return np.concatenate(pieces, axis)


def _replace(box: Box, axis: int, new: slice) -> Box:
    return (*box[:axis], new, *box[axis + 1 :])


@dataclass(frozen=True)
class Stored(Source):
    """A tensor at a byte offset of a file. Mapped only while it is read, so that no page of it stays counted."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, box: Box) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros([s.stop - s.start for s in box], self.dtype)
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        return np.array(mapped[box])


class Transposed(Source):
    def __init__(self, base: Source, order: tuple[int, ...]) -> None:
        if sorted(order) != list(range(len(base.shape))):
            raise ValueError(f"order {order} does not name every axis of shape {base.shape} once")
        self.base, self.order = base, order
        self.shape = tuple(base.shape[i] for i in order)

    def read(self, box: Box) -> np.ndarray:
        of_base = [box[self.order.index(i)] for i in range(len(box))]
        return self.base.read(tuple(of_base)).transpose(self.order)


class Split(Source):
    def __init__(self, base: Source, axis: int, sizes: tuple[int, ...]) -> None:
        if math.prod(sizes) != base.shape[axis]:
            raise ValueError(f"axis {axis} of shape {base.shape} cannot be split into {sizes}")
        self.base, self.axis, self.sizes = base, axis, sizes
        self.shape = (*base.shape[:axis], *sizes, *base.shape[axis + 1 :])

    def read(self, box: Box) -> np.ndarray:
        a, n = self.axis, len(self.sizes)
        outer, inner = box[a], box[a + 1 : a + n]
        stride = math.prod(self.sizes[1:])
        flat = self.base.read((*box[:a], slice(outer.start * stride, outer.stop * stride), *box[a + n :]))
        values = flat.reshape(*flat.shape[:a], outer.stop - outer.start, *self.sizes[1:], *flat.shape[a + 1 :])
        return values[(slice(None),) * (a + 1) + inner]


class Merged(Source):
    """``axis`` and the one behind it as one."""

    def __init__(self, base: Source, axis: int) -> None:
        self.base, self.axis, self.stride = base, axis, base.shape[axis + 1]
        self.shape = (*base.shape[:axis], base.shape[axis] * self.stride, *base.shape[axis + 2 :])

    def read(self, box: Box) -> np.ndarray:
        pieces = [self._read_rows(box, *piece) for piece in self._pieces(box[self.axis])]
        return pieces[0] if len(pieces) == 1 else _join(pieces, self.axis)

    def _pieces(self, wanted: slice) -> list[tuple[slice, slice]]:
        """(rows, part of each) that together are ``wanted``: the end of a row, whole rows, the beginning of a row."""
        if wanted.start == wanted.stop:
            return [(slice(0, 0), slice(0, 0))]
        stride, first = self.stride, wanted.start // self.stride
        if wanted.stop <= (first + 1) * stride:
            return [(slice(first, first + 1), slice(wanted.start - first * stride, wanted.stop - first * stride))]
        full, last = -(-wanted.start // stride), wanted.stop // stride
        return [
            (rows, part)
            for rows, part in (
                (slice(first, full), slice(wanted.start - first * stride, stride)),
                (slice(full, last), slice(0, stride)),
                (slice(last, last + 1), slice(0, wanted.stop - last * stride)),
            )
            if rows.start < rows.stop and part.start < part.stop
        ]

    def _read_rows(self, box: Box, rows: slice, part: slice) -> np.ndarray:
        values = self.base.read((*box[: self.axis], rows, part, *box[self.axis + 1 :]))
        merged = (rows.stop - rows.start) * (part.stop - part.start)
        return values.reshape(*values.shape[: self.axis], merged, *values.shape[self.axis + 2 :])


class Narrowed(Source):
    def __init__(self, base: Source, axis: int, start: int, size: int) -> None:
        if start + size > base.shape[axis]:
            raise ValueError(f"axis {axis} of shape {base.shape} has no entries {start}..{start + size}")
        self.base, self.axis, self.start = base, axis, start
        self.shape = (*base.shape[:axis], size, *base.shape[axis + 1 :])

    def read(self, box: Box) -> np.ndarray:
        s = box[self.axis]
        return self.base.read(_replace(box, self.axis, slice(s.start + self.start, s.stop + self.start)))


class Repeated(Source):
    def __init__(self, base: Source, axis: int, times: int) -> None:
        self.base, self.axis, self.times = base, axis, times
        self.shape = (*base.shape[:axis], base.shape[axis] * times, *base.shape[axis + 1 :])

    def read(self, box: Box) -> np.ndarray:
        s = box[self.axis]
        first = s.start // self.times
        values = self.base.read(_replace(box, self.axis, slice(first, -(-s.stop // self.times))))
        return np.take(values, np.arange(s.start, s.stop) // self.times - first, axis=self.axis)


class Padded(Source):
    def __init__(self, base: Source, axis: int, size: int) -> None:
        self.base, self.axis = base, axis
        self.shape = (*base.shape[:axis], size, *base.shape[axis + 1 :])

    def read(self, box: Box) -> np.ndarray:
        s, real = box[self.axis], self.base.shape[self.axis]
        values = self.base.read(_replace(box, self.axis, slice(min(s.start, real), min(s.stop, real))))
        if s.stop <= real:
            return values
        missing = [(0, 0)] * len(self.shape)
        missing[self.axis] = (0, s.stop - s.start - values.shape[self.axis])
        return np.pad(values, missing)


class Concatenated(Source):
    def __init__(self, parts: tuple[Source, ...], axis: int) -> None:
        shapes = {(*p.shape[:axis], *p.shape[axis + 1 :]) for p in parts}
        if len(shapes) != 1:
            raise ValueError(f"shapes {[p.shape for p in parts]} do not fit together along axis {axis}")
        self.parts, self.axis = parts, axis
        first = parts[0].shape
        self.shape = (*first[:axis], sum(p.shape[axis] for p in parts), *first[axis + 1 :])

    def read(self, box: Box) -> np.ndarray:
        wanted, start, pieces = box[self.axis], 0, []
        for part in self.parts:
            size = part.shape[self.axis]
            low, high = max(wanted.start - start, 0), min(wanted.stop - start, size)
            if low < high:
                pieces.append(part.read(_replace(box, self.axis, slice(low, high))))
            start += size
        if not pieces:
            return self.parts[0].read(_replace(box, self.axis, slice(0, 0)))
        return _join(pieces, self.axis)
