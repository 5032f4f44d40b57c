"""Who talks to whom in a collective, read from a program's text: groups of devices, and the mesh axes that they span.

A device is its place in the mesh, counted with the last axis fastest, as jax numbers a program's partitions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod

import numpy as np

Group = tuple[int, ...]

LISTED = re.compile(r"\breplica_groups=(\{\}|\{\{[\d,{}\s]*\}\})")
IOTA = re.compile(r"\breplica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
MESH = re.compile(r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
PAIRS = re.compile(r"source_target_pairs=\"?(\{\{[\d,{}\s]*\}\})")


def groups_of(attributes: str, num_devices: int) -> list[Group]:
    """The groups of an instruction, in whichever form it names them; of a permute, its (source, target) pairs."""
    if found := PAIRS.search(attributes) or LISTED.search(attributes):
        return _listed(found[1]) or [tuple(range(num_devices))]
    if found := IOTA.search(attributes):
        return [tuple(map(int, group)) for group in _iota(found[1])]
    if found := MESH.search(attributes):
        return _of_mesh(found[1], found[2], found[3])
    raise ValueError(f"no replica groups that can be read in {attributes[:200]!r}")


def axes_of(groups: Iterable[Group], axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the members of groups (or of pairs) differ; () if no group has two members."""
    sizes = tuple(axis_sizes.values())
    varying = np.zeros(len(sizes), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.array(group), sizes))
        varying |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(axis for axis, varies in zip(axis_sizes, varying, strict=True) if varies)


def spans(groups: Iterable[Group], axes: Iterable[str], axis_sizes: Mapping[str, int]) -> bool:
    """Whether every group is whole: all devices that differ along ``axes`` only."""
    size = prod(axis_sizes[axis] for axis in axes)
    return all(len(set(group)) == size for group in groups)


def _listed(text: str) -> list[Group]:
    return [tuple(map(int, g.replace(" ", "").split(","))) for g in re.findall(r"\{([\d,\s]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """ "[2,4]<=[8]" or "[4,2]<=[2,4]T(1,0)": devices in order, reshaped, transposed, reshaped."""
    shape, _, source = text.partition("<=")
    return _reshaped(source).reshape(_numbers(shape))


def _reshaped(text: str) -> np.ndarray:
    dims, _, order = text.partition("T")
    devices = np.arange(prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _of_mesh(mesh: str, device_ids: str | None, axes: str) -> list[Group]:
    """mesh['a'=2,'b'=4] {'b'}: a mesh of its own, which need not have the names of ours. An axis may be a part of one:
    'b':(2)2 is of size 2, behind the first 2 of b."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    chosen = [(name, *_part(first, size, sizes[name])) for name, first, size in AXIS.findall(axes)]
    pieces = [(name, *cut) for name, size in sizes.items() for cut in _cuts(name, size, chosen)]
    inside = [i for part in chosen for i, piece in enumerate(pieces) if _lies_in(piece, part)]
    outside = [i for i in range(len(pieces)) if i not in inside]
    shape = [stop // start for _, start, stop in pieces]
    devices = _mesh_devices(device_ids, prod(shape)).reshape(shape).transpose(outside + inside)
    return [tuple(map(int, group)) for group in devices.reshape(-1, prod(shape[i] for i in inside))]


AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")
Piece = tuple[str, int, int]
"""An axis, the product of the sizes of its parts before this one, and the same with it."""


def _part(first: str, size: str, whole: int) -> tuple[int, int]:
    return (int(first), int(first) * int(size)) if first else (1, whole)


def _cuts(name: str, size: int, chosen: Iterable[Piece]) -> Iterable[tuple[int, int]]:
    """An axis in the pieces that its chosen parts make of it."""
    ends = {1, size} | {end for axis, *part in chosen if axis == name for end in part}
    return pairwise(sorted(ends))


def _lies_in(piece: Piece, part: Piece) -> bool:
    return piece[0] == part[0] and part[1] <= piece[1] < part[2]


def _mesh_devices(device_ids: str | None, count: int) -> np.ndarray:
    if device_ids is None:
        return np.arange(count)
    return (_reshaped(device_ids) if device_ids.startswith("[") else np.array(_numbers(device_ids))).reshape(-1)
