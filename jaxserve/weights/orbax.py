"""Orbax checkpoints: the decoder's own layout, saved once, restored onto any mesh.

A checkpoint directory holds ``params/`` (Orbax's) beside the Hugging Face config and tokenizer files. What is saved
knows no mesh: every head once, and nothing that fills up. Both are made on the way back, where a mesh needs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxserve.models.config import DecoderConfig
from jaxserve.weights.fit import Axes, fit_array
from jaxserve.weights.loader import abstract_params, assemble, logical_axes, param_shardings
from sharding import ShardingRules

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


def restore(
    directory: Path,
    stored: DecoderConfig,
    decoder: DecoderConfig,
    dtype: jnp.dtype,
    mesh: Mesh,
    rules: ShardingRules,
) -> tuple[Any, nnx.State]:
    """Graph definition and parameters on the mesh; every device reads only the shards that it needs.

    ``decoder`` is ``stored`` fitted to the mesh. One exception: where KV heads are copied and no whole number of ranks
    belongs to each, every device reads all heads of a layer and keeps its own.
    """
    if decoder.num_stages > 1:
        raise NotImplementedError(f"{directory}: an Orbax checkpoint cannot be restored onto pipeline stages yet")
    if not is_orbax(directory):
        raise FileNotFoundError(f"{directory}: no Orbax checkpoint (params/); `jaxserve convert` writes one")
    graph, params = abstract_params(decoder, dtype)
    shardings = param_shardings(params, mesh, rules)
    reading = _readable(stored, decoder, mesh.shape["tp"])
    _, read = abstract_params(reading, dtype)
    read_shardings = shardings | _shardings_of_heads(read, reading, decoder, mesh, rules)
    largest = max(p.get_value().size for p in read.values()) * jnp.dtype(dtype).itemsize
    with _checkpointer(largest) as checkpointer:
        path = (directory / "params").resolve()
        _check_shapes(directory, checkpointer.metadata(path), abstract_params(stored, dtype)[1])
        # A global shape larger than the stored one is filled up with zeros: that is how parameters are padded.
        restore_args = {
            name: ocp.ArrayRestoreArgs(
                dtype=dtype, sharding=read_shardings[name], global_shape=p.get_value().shape, strict=False
            )
            for name, p in read.items()
        }
        arrays = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=restore_args))

    @cache  # one program for all layers' parameters of the same kind
    def fit(axes: Axes, sharding: NamedSharding) -> Callable[[Array], Array]:
        return jax.jit(partial(fit_array, axes=axes, stored=reading, fitted=decoder), out_shardings=sharding)

    for name, param in params.items():
        if read_shardings[name] is not shardings[name]:
            arrays[name] = fit(logical_axes(param), shardings[name])(arrays[name])
    return graph, assemble(params, arrays)


def _readable(stored: DecoderConfig, decoder: DecoderConfig, tp: int) -> DecoderConfig:
    """As which model to read: ``decoder``, or where it copies KV heads, the same before they are copied.

    Zero heads are then there if each head, zero or not, belongs to a whole number of ranks; otherwise none are.
    """
    if decoder.kv_copies == 1:
        return decoder
    heads, rest = divmod(decoder.num_kv_heads, decoder.kv_copies)
    if rest or tp % heads:
        heads = stored.num_kv_heads
    return replace(
        decoder,
        num_heads=heads * stored.group_size,
        num_kv_heads=heads,
        kv_copies=1,
        head_padding=(heads - stored.num_kv_heads) * stored.group_size,
        kv_head_padding=heads - stored.num_kv_heads,
    )


def _check_shapes(directory: Path, metadata: Any, expected: Mapping[str, nnx.Variable]) -> None:
    """Restoring fills up or cuts whatever it finds to the shape it is asked for, so look first what is there."""
    found = {name: tuple(array.shape) for name, array in metadata.item_metadata.tree.items()}
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(f"{directory}: checkpoint and model disagree: missing {missing[:3]}, extra {unknown[:3]}")
    for name, variable in expected.items():
        if found[name] != variable.get_value().shape:
            raise ValueError(
                f"{directory}: {name} has shape {found[name]}, the config asks for {variable.get_value().shape}: "
                "config.json and params/ do not belong together"
            )


def _shardings_of_heads(
    read: Mapping[str, nnx.Variable], reading: DecoderConfig, decoder: DecoderConfig, mesh: Mesh, rules: ShardingRules
) -> dict[str, NamedSharding]:
    """Of the parameters with an axis of KV heads, where these are copied after reading.

    Where each head belongs to a group of ranks, these are the same devices with the axis cut in two, the inner part
    named by no parameter, and a rank reads the one head that it holds. Otherwise every rank reads all heads.
    """
    if decoder.kv_copies == 1:
        return {}
    with_heads = {name: p for name, p in read.items() if "kv_heads" in logical_axes(p)}
    *outer, ranks = mesh.devices.shape
    if ranks % reading.num_kv_heads:
        return param_shardings(with_heads, mesh, replace(rules, kv_heads=None))
    assert mesh.axis_names[-1] == rules.kv_heads
    grid = mesh.devices.reshape(*outer, reading.num_kv_heads, -1)
    groups = Mesh(grid, (*mesh.axis_names, "copy"), axis_types=(AxisType.Auto,) * grid.ndim)
    return param_shardings(with_heads, groups, rules)
