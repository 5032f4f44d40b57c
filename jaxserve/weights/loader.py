"""Parameters onto the mesh: each device reads, converts and keeps only its own shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.weights.fit import Axes, fit_array, fit_source
from jaxserve.weights.source import Box, Source, stack
from sharding import ShardingRules
from sharding.partition import shardings_for

PIECE_BYTES = 64 << 20
"""A checkpoint's tensors are read in pieces of about this size."""

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps the names of the parameters as they are loaded: a progress bar, or nothing."""


def abstract_params(config: DecoderConfig, dtype: jnp.dtype) -> tuple[Any, dict[str, nnx.Variable]]:
    """Graph definition and parameters by name (``layers.0.attn.qkv``), shapes only. With pipeline stages, those of
    layers hold one layer of every stage, along a first axis."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))))
    params = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if config.num_stages > 1:
        params |= {name: _of_all_stages(p, config.num_stages) for name, p in params.items() if is_of_layer(name)}
    return graph, params


def _of_all_stages(param: nnx.Variable, num_stages: int) -> nnx.Variable:
    value = param.get_value()
    staged = jax.ShapeDtypeStruct((num_stages, *value.shape), value.dtype)
    return param.replace(staged, axes=("stage", *logical_axes(param)))


def is_of_layer(name: str) -> bool:
    return name.startswith("layers.")


def parts_of(name: str, config: DecoderConfig) -> list[str]:
    """The parameters of the model as stored that ``name`` is made of: itself, or one of each stage that has it."""
    if config.num_stages == 1 or not is_of_layer(name):
        return [name]
    layers, slot, rest = name.split(".", 2)
    found = (config.layer_at(stage, int(slot)) for stage in range(config.num_stages))
    return [f"{layers}.{layer}.{rest}" for layer in found if layer is not None]


def param_shardings(params: Mapping[str, nnx.Variable], mesh: Mesh, rules: ShardingRules) -> dict[str, NamedSharding]:
    """From every parameter's logical axes; ValueError with the numbers where one does not divide."""
    shapes = {name: p.get_value().shape for name, p in params.items()}
    axes = {name: logical_axes(p) for name, p in params.items()}
    return shardings_for(shapes, axes, mesh, rules)


def logical_axes(param: nnx.Variable) -> Axes:
    return param.get_metadata()["axes"]


def assemble(params: Mapping[str, nnx.Variable], arrays: Mapping[str, Any]) -> nnx.State:
    """The parameter state with ``arrays`` in place of the shapes."""
    flat: dict[Any, nnx.Variable] = {
        tuple(_key(part) for part in name.split(".")): variable.replace(arrays[name])
        for name, variable in params.items()
    }
    return nnx.from_flat_state(flat)


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part


def load_params(
    stored: DecoderConfig,
    fitted: DecoderConfig,
    dtype: jnp.dtype,
    weights: Iterator[tuple[str, Source]],
    mesh: Mesh,
    rules: ShardingRules,
    progress: Progress = lambda names: names,
) -> tuple[Any, nnx.State]:
    """Graph definition and parameters on the mesh, read from ``weights``; every parameter exactly once.

    ``weights`` are those of ``stored``; ``fitted`` is the same model fitted to the mesh.
    """
    graph, params = abstract_params(fitted, dtype)
    shardings = param_shardings(params, mesh, rules)
    sources = _sources(weights, abstract_params(stored, dtype)[1])
    arrays = {}
    for name in progress(list(params)):
        axes = logical_axes(params[name])
        parts = [
            fit_source(sources[part], tuple(a for a in axes if a != "stage"), stored, fitted)
            for part in parts_of(name, fitted)
        ]
        # Stages without a layer in this place, the last ones, have zeros there.
        source = stack(parts, axis=0).pad(0, fitted.num_stages) if "stage" in axes else parts[0]
        arrays[name] = _place(source, np.dtype(dtype), shardings[name])
    return graph, assemble(params, arrays)


def _sources(weights: Iterator[tuple[str, Source]], params: Mapping[str, nnx.Variable]) -> dict[str, Source]:
    """Where every parameter comes from, each there once and of the right shape."""
    try:
        sources = dict(weights)
    except (KeyError, ValueError) as error:
        raise ValueError(f"config.json and the weights do not belong together: {error.args[0]}") from error
    missing, unknown = sorted(set(params) - set(sources)), sorted(set(sources) - set(params))
    if missing or unknown:
        raise ValueError(
            f"config.json and the weights do not belong together: missing {missing[:3]}, extra {unknown[:3]}"
        )
    for name, variable in params.items():
        if sources[name].shape != variable.get_value().shape:
            raise ValueError(
                f"{name}: the checkpoint gives shape {sources[name].shape}, the config asks for "
                f"{variable.get_value().shape}: config.json and the weights do not belong together"
            )
    return sources


def _place(source: Source, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    """One array whose shards are read one by one; devices that hold the same box share one read."""
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def box_of(index: tuple[slice, ...] | None) -> np.ndarray:
        box: Box = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), source.shape, strict=True))
        key = tuple((s.start, s.stop) for s in box)
        if key not in read:
            read[key] = _read_in_pieces(source, box, dtype)
        return read[key]

    return jax.make_array_from_callback(source.shape, sharding, box_of)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes: a CPU device then takes it as it is, instead of a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _read_in_pieces(source: Source, box: Box, dtype: np.dtype) -> np.ndarray:
    """``source.read(box)`` in ``dtype``, with no more than ``PIECE_BYTES`` in memory beside the result."""
    values = _aligned([s.stop - s.start for s in box], dtype)
    if not values.ndim:
        return source.read(box).astype(dtype)
    axis = int(np.argmax(values.shape))
    step = max(1, PIECE_BYTES * values.shape[axis] // max(values.nbytes, 1))
    for start in range(box[axis].start, box[axis].stop, step):
        piece = slice(start, min(start + step, box[axis].stop))
        into = (slice(None),) * axis + (slice(piece.start - box[axis].start, piece.stop - box[axis].start),)
        values[into] = source.read((*box[:axis], piece, *box[axis + 1 :]))
    return values


def random_params(
    stored: DecoderConfig, fitted: DecoderConfig, dtype: jnp.dtype, mesh: Mesh, rules: ShardingRules, seed: int
) -> tuple[Any, nnx.State]:
    """Random weights made on the devices: what ``load_format="dummy"`` means.

    They are drawn in ``stored``'s shapes and then fitted, so that the model is the same on every mesh.
    """
    graph, params = abstract_params(fitted, dtype)
    shapes = {name: p.get_value().shape for name, p in abstract_params(stored, dtype)[1].items()}
    numbers = {name: i for i, name in enumerate(shapes)}
    shardings = param_shardings(params, mesh, rules)

    @cache  # one program for all layers' parameters of the same kind
    def normal(
        shape: tuple[int, ...], axes: Axes, scale: float, shift: float, sharding: NamedSharding
    ) -> Callable[..., Any]:
        def draw(number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), number)
            values = (jax.random.normal(key, shape, jnp.float32) * scale + shift).astype(dtype)
            return fit_array(values, tuple(a for a in axes if a != "stage"), stored, fitted)

        def make(numbers: jax.Array) -> jax.Array:
            if "stage" not in axes:
                return draw(numbers[0])
            drawn = jax.vmap(draw)(numbers)
            return jnp.pad(drawn, [(0, fitted.num_stages - len(numbers)), *[(0, 0)] * (drawn.ndim - 1)])

        return jax.jit(make, out_shardings=sharding)

    arrays = {}
    for name, variable in params.items():
        parts = parts_of(name, fitted)
        shape = shapes[parts[0]]
        shift = 1.0 - stored.norm.offset if name.endswith("norm.weight") else 0.0
        make = normal(shape, logical_axes(variable), 0.02 if len(shape) > 1 else 0.0, shift, shardings[name])
        arrays[name] = make(np.array([numbers[part] for part in parts]))
    return graph, assemble(params, arrays)
