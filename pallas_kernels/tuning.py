"""Sizes of tiles that were measured on a GPU, and there override a kernel's heuristic.

``tuned/<gpu>.json`` has, of each tunable kernel and each class of shapes, the sizes that were fastest:

    {"grouped_matmul/triton": {"rows=64 depth=4096 columns=14336 itemsize=2": {"sizes": {...}, "seconds": ...}}}

``scripts/tune_kernels.py`` writes such files. They are read once, when the kernels are imported, and an entry that its
kernel cannot take is an error there; tracing only looks sizes up in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import jax

DIRECTORY = Path(__file__).parent / "tuned"
KERNELS = (
    "paged_attention/triton",
    "paged_attention/mosaic",
    "kv_write/triton",
    "grouped_matmul/triton",
    "grouped_matmul/mosaic",
    "dequant_matmul/triton",
)
"""That have sizes to tune: what else stands in a file is an error."""
ENTRY = ("sizes", "seconds", "heuristic_seconds", "jax")
"""Of an entry: what counts, and how it was found (the time of one call, with these sizes and with the heuristic's)."""

Refuses = Callable[[Mapping[str, str], Any], str | None]
"""(class of shapes, sizes) -> why the kernel cannot take them, if so."""


@dataclass(frozen=True)
class Tunable[S]:
    """Sizes of one kernel: ``kind`` is their dataclass, all whole numbers above 0. ``shape``: the names that make up a
    class of shapes. ``entries``: of each GPU (the stem of its file), of each class, the sizes."""

    kernel: str
    kind: type[S]
    shape: tuple[str, ...]
    refuses: Refuses
    entries: Mapping[str, Mapping[str, S]] = field(default_factory=dict)

    def get(self, **shape: object) -> S | None:
        """What was measured for this class on the GPU that is being traced for; None = nothing was."""
        return self.entries.get(gpu_in_use(), {}).get(self.name(**shape)) if self.entries else None

    def name(self, **shape: object) -> str:
        """Of a class of shapes, as files have it."""
        assert tuple(shape) == self.shape, f"{self.kernel} is tuned by {self.shape}, not {tuple(shape)}"
        return " ".join(f"{name}={value}" for name, value in shape.items())

    def sizes(self, name: str, values: Any) -> S:
        """Of a class of shapes, from JSON; ValueError says what is wrong with it."""
        shape = {key: value for key, _, value in (pair.partition("=") for pair in name.split(" "))}
        if tuple(shape) != self.shape:
            raise ValueError(f"its name is made of {', '.join(self.shape)}")
        wanted = [f.name for f in fields(self.kind)]  # pyright: ignore[reportArgumentType]
        if not isinstance(values, Mapping) or sorted(values) != sorted(wanted):
            raise ValueError(f"its sizes are {', '.join(wanted)}, all of them and no others")
        for size, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{size}={value!r}: it is a whole number of at least 1")
        sizes = self.kind(**values)
        try:
            reason = self.refuses(shape, sizes)
        except ValueError as error:  # a part of the name that is no number
            raise ValueError(f"its name: {error}") from None
        if reason is not None:
            raise ValueError(reason)
        return sizes


def read[S](
    kernel: str, kind: type[S], shape: tuple[str, ...], refuses: Refuses, directory: Path = DIRECTORY
) -> Tunable[S]:
    """With the entries of every file; ValueError names the file and the entry that the kernel cannot take."""
    assert kernel in KERNELS, kernel
    tunable = Tunable(kernel, kind, shape, refuses)
    entries = {gpu: dict(_entries(tunable, path, gpu)) for gpu, path in _files(directory).items()}
    return Tunable(kernel, kind, shape, refuses, {gpu: found for gpu, found in entries.items() if found})


def _entries[S](tunable: Tunable[S], path: Path, gpu: str) -> Iterator[tuple[str, S]]:
    for name, entry in load(path).get(tunable.kernel, {}).items():
        try:
            yield name, tunable.sizes(name, entry["sizes"])
        except ValueError as error:
            raise ValueError(f"{path}: {tunable.kernel}: {name!r}: {error}") from None


@cache
def _files(directory: Path) -> Mapping[str, Path]:
    return {path.stem: path for path in sorted(directory.glob("*.json"))}


@cache
def load(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """A file, as far as it can be checked without its kernels."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it is a JSON object of kernels")
    for kernel, entries in found.items():
        if kernel not in KERNELS:
            raise ValueError(f"{path}: {kernel!r} has no sizes to tune; there are {', '.join(KERNELS)}")
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {kernel}: it is a JSON object of entries")
        for name, entry in entries.items():
            if not isinstance(entry, dict) or "sizes" not in entry or not set(entry) <= set(ENTRY):
                raise ValueError(f"{path}: {kernel}: {name!r}: it has sizes, and besides only {', '.join(ENTRY[1:])}")
    return found


def gpu_name(device_kind: str) -> str:
    """The stem of a GPU's file: "NVIDIA H200" -> "nvidia_h200"."""
    return "".join(c if c.isalnum() else "_" for c in device_kind.lower())


def gpu_in_use() -> str:
    """Of the mesh that is being traced for, whose devices need not be there; without one, of jax's own device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return gpu_name((device or jax.devices()[0]).device_kind)


def powers_of_two(sizes: Any, *names: str) -> str | None:
    """Why not, if these are none."""
    found = ((name, getattr(sizes, name)) for name in names)
    return next((f"{name}={n}: it is a power of two" for name, n in found if n & (n - 1)), None)
