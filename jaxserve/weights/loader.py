"""Parameters onto the mesh: each device reads, converts and keeps only its own shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.weights.fit import Axes, fit_array, fit_source
from jaxserve.weights.source import Box, Source, stack
from pallas_kernels.matmul import Panels, Weight, reference
from sharding import ShardingRules
from sharding.partition import shardings_for

PIECE_BYTES = 64 << 20
"""A checkpoint's tensors are read in pieces of about this size."""

LAID_OUT_BYTES, LAID_OUT_COLUMNS = 16 << 20, 1024
"""Weights are laid out for products in pieces of about this size, whose columns are a multiple of that."""

LayOut = Callable[[Array, int], Weight]
"""``Matmul.lay_out``."""

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


def summed_axes(param: nnx.Variable) -> int | None:
    """Over how many of its axes, the first, products sum; None: others than products read it too."""
    return param.get_metadata().get("summed")


def abstract_weights(
    params: Mapping[str, nnx.Variable], shardings: Mapping[str, NamedSharding], lay_out: LayOut
) -> dict[str, Any]:
    """What ``load_params`` puts onto the mesh, shapes only."""

    def placed(name: str, param: nnx.Variable) -> Any:
        value, axes = param.get_value(), summed_axes(param)
        if axes is not None:
            value = jax.eval_shape(lambda w: lay_out(w, axes), value)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]), value)

    return {name: placed(name, param) for name, param in params.items()}


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
    lay_out: LayOut = reference.lay_out,
    progress: Progress = lambda names: names,
) -> tuple[Any, nnx.State]:
    """Graph definition and parameters on the mesh, read from ``weights``; every parameter exactly once.

    ``weights`` are those of ``stored``; ``fitted`` is the same model fitted to the mesh. Those that only products read
    are laid out by ``lay_out``.
    """
    graph, params = abstract_params(fitted, dtype)
    shardings = param_shardings(params, mesh, rules)
    sources = _sources(weights, abstract_params(stored, dtype)[1])
    arrays, jitted = {}, jax.jit(lay_out, static_argnums=1)
    for name in progress(list(params)):
        axes = logical_axes(params[name])
        parts = [
            fit_source(sources[part], tuple(a for a in axes if a != "stage"), stored, fitted)
            for part in parts_of(name, fitted)
        ]
        # Stages without a layer in this place, the last ones, have zeros there.
        source = stack(parts, axis=0).pad(0, fitted.num_stages) if "stage" in axes else parts[0]
        summed = summed_axes(params[name])
        if summed is None:
            arrays[name] = _place(source, np.dtype(dtype), shardings[name])
        else:
            arrays[name] = _place_laid_out(source, np.dtype(dtype), shardings[name], jitted, summed)
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


def _place_laid_out(source: Source, dtype: np.dtype, sharding: NamedSharding, lay_out: LayOut, summed: int) -> Weight:
    """Some columns at a time: beside the result only they are in memory."""
    whole = jax.eval_shape(lambda w: lay_out(w, summed), jax.ShapeDtypeStruct(source.shape, dtype))
    if not isinstance(whole, Panels):
        return _place(source, dtype, sharding)
    *rows, columns = source.shape
    fitting = LAID_OUT_BYTES // (math.prod(rows) * dtype.itemsize) // LAID_OUT_COLUMNS
    step = max(1, fitting) * LAID_OUT_COLUMNS
    if len(rows) > summed:
        step = columns  # columns of several axes: not one run of them
    values = _aligned(whole.values.shape, dtype)
    filled = 0
    for start in range(0, columns, step):
        piece = source.narrow(len(rows), start, min(step, columns - start))
        panels = lay_out(_place(piece, dtype, sharding), summed)
        assert isinstance(panels, Panels)
        values[filled : filled + len(panels.values)] = np.asarray(panels.values)
        filled += len(panels.values)
    return replace(whole, values=jax.device_put(values, sharding))


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
    stored: DecoderConfig,
    fitted: DecoderConfig,
    dtype: jnp.dtype,
    mesh: Mesh,
    rules: ShardingRules,
    seed: int,
    lay_out: LayOut = reference.lay_out,
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
        shape: tuple[int, ...], axes: Axes, summed: int | None, scale: float, shift: float, sharding: NamedSharding
    ) -> Callable[..., Any]:
        def draw(number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), number)
            values = (jax.random.normal(key, shape, jnp.float32) * scale + shift).astype(dtype)
            return fit_array(values, tuple(a for a in axes if a != "stage"), stored, fitted)

        def make(numbers: jax.Array) -> Weight:
            if "stage" not in axes:
                return draw(numbers[0]) if summed is None else lay_out(draw(numbers[0]), summed)
            drawn = jax.vmap(draw)(numbers)
            return jnp.pad(drawn, [(0, fitted.num_stages - len(numbers)), *[(0, 0)] * (drawn.ndim - 1)])

        return jax.jit(make, out_shardings=sharding)

    arrays = {}
    for name, variable in params.items():
        parts = parts_of(name, fitted)
        shape = shapes[parts[0]]
        shift = 1.0 - stored.norm.offset if name.endswith("norm.weight") else 0.0
        scale = 0.02 if len(shape) > 1 else 0.0
        make = normal(shape, logical_axes(variable), summed_axes(variable), scale, shift, shardings[name])
        arrays[name] = make(np.array([numbers[part] for part in parts]))
    return graph, assemble(params, arrays)
