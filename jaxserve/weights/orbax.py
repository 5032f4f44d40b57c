"""Orbax checkpoints: the decoder's own layout, saved once, loaded onto any mesh.

A checkpoint directory holds ``params/`` (Orbax's) beside the Hugging Face config and tokenizer files. What is saved
knows no mesh: every head once, and nothing that fills up. Both are made on the way back, where a mesh needs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx
from jax import Array

from jaxserve.weights.source import Box, Source

COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of a Hugging Face directory that describe the model; weights and their indices are not among them."""
CHUNK_BYTES = 4 << 20
"""Arrays are stored in chunks of at most this size: a device that needs one shard reads little more than that."""
MOST_CHUNKS_PER_SPLIT = 64


def is_orbax(directory: Path) -> bool:
    """Whether ``save`` wrote this directory."""
    return (directory / "params" / "_METADATA").is_file()


def save(directory: Path, hf_directory: Path, params: nnx.State) -> None:
    """Write ``params`` (of the model as stored: copies and what fills up would be saved as they are) and the
    files that describe the model. config.json comes last: without it a directory is no checkpoint."""
    axes = {name: p.get_metadata()["axes"] for name, p in _flat(params).items()}
    arrays = {name: p.get_value() for name, p in _flat(params).items()}
    directory.mkdir(parents=True, exist_ok=True)
    with _checkpointer(max(array.nbytes for array in arrays.values())) as checkpointer:
        save_args = {name: _save_args(array, axes[name]) for name, array in arrays.items()}
        checkpointer.save((directory / "params").resolve(), ocp.args.PyTreeSave(arrays, save_args))
    for path in sorted(p for pattern in COPIED for p in hf_directory.glob(pattern)):
        if path.name != "config.json" and not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, directory / path.name)
    config = json.loads((hf_directory / "config.json").read_text())
    config.pop("torch_dtype", None)  # the old name of dtype
    config["dtype"] = str(arrays["unembedding.weight"].dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _flat(params: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}


def _checkpointer(largest: int) -> ocp.Checkpointer:
    """Copies on their way to or from the disk are bounded: by twice the largest array, which must fit, or 1 GB."""
    limit = 1 + 2 * largest // 10**9
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit))


def _save_args(array: Array, axes: tuple[str | None, ...]) -> ocp.SaveArgs:
    """Chunks of one KV head each, or of ``CHUNK_BYTES``."""
    # Orbax splits the longest axis by its divisors: a prime vocabulary would end in chunks of one column.
    splits = any(max(array.shape) % n == 0 for n in range(2, MOST_CHUNKS_PER_SPLIT))
    heads = tuple(i for i, axis in enumerate(axes) if axis == "kv_heads")
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES if splits else None, shard_axes=heads)


def tensors(directory: Path) -> Iterator[tuple[str, Source]]:
    """What ``save`` wrote, by parameter name; nothing is read yet."""
    if not is_orbax(directory):
        raise FileNotFoundError(f"{directory}: no Orbax checkpoint (params/); `jaxserve convert` writes one")
    path = (directory / "params").resolve()
    with ocp.PyTreeCheckpointer() as checkpointer:
        names = list(checkpointer.metadata(path).item_metadata.tree)
    # Orbax restores whole trees of arrays in shapes of their own; a shard that is to be rearranged is read from what
    # lies below it, https://google.github.io/tensorstore/kvstore/ocdbt.
    store = {"driver": "ocdbt", "base": f"file://{path}/"}
    opened = [ts.open({"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}, read=True) for name in names]
    for name, array in zip(names, opened, strict=True):
        yield name, Chunked(array.result())


class Chunked(Source):
    """An array in chunks, of which those are read that a box touches."""

    def __init__(self, array: ts.TensorStore) -> None:
        self.array, self.shape = array, tuple(array.shape)

    def read(self, box: Box) -> np.ndarray:
        return self.array[box].read().result()
