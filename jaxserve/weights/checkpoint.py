"""A Hugging Face checkpoint directory: which tensors it holds and where their bytes are."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxserve.weights.source import Source, Stored

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

SINGLE_FILE = "model.safetensors"


class Checkpoint(Mapping[str, Source]):
    """Tensors by name, over one ``model.safetensors`` or the files that an index names.

    Only the headers are read here (the format: https://github.com/huggingface/safetensors).
    ``prefixes`` are tried in turn where a name is not found as asked (a checkpoint of the bare base model
    has no ``model.`` in front).
    """

    def __init__(self, directory: Path, prefixes: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.prefixes = prefixes
        self.tensors: dict[str, Stored] = {}
        for path in weight_files(directory):
            self.tensors.update(_read_header(path))

    def _find(self, name: str) -> str | None:
        shortened = (name.removeprefix(p) for p in self.prefixes if name.startswith(p))
        lengthened = (p + name for p in self.prefixes)
        return next((n for n in (name, *shortened, *lengthened) if n in self.tensors), None)

    def __getitem__(self, name: str) -> Source:
        found = self._find(name)
        if found is None:
            raise KeyError(f"{self.directory}: no tensor {name!r} among {len(self.tensors)}")
        return self.tensors[found]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in self.tensors.values())


def weight_names(directory: Path) -> list[str]:
    """The safetensors files of a checkpoint, which need not be there yet.

    Where there is the one file and an index too, the file counts, as in transformers.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / SINGLE_FILE).exists() or not index.exists():
        return [SINGLE_FILE]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, checked to be there."""
    names = weight_names(directory)
    missing = [name for name in names if not (directory / name).exists()]
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if missing and pickled:
        raise FileNotFoundError(
            f"{directory}: {missing[0]} is missing, and {pickled[0]} is not read, only safetensors files are: load it "
            "with transformers, whose save_pretrained writes them"
        )
    if missing:
        raise FileNotFoundError(
            f"{directory}: {missing[0]} is missing; a checkpoint holds model.safetensors, or "
            "model.safetensors.index.json with the files that it names"
        )
    return [directory / name for name in names]


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(min(length, size)))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is cut off: its header speaks of {end:,} bytes, it has {size:,}")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            if entry["dtype"] in ("BOOL", "U8", "I64", "I32"):
                continue  # masks and counters that some exporters leave in
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; supported: {', '.join(DTYPES)}")
        offset = 8 + length + entry["data_offsets"][0]
        tensors[name] = Stored(path, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors
