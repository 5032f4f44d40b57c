"""Figures of every layer's output: where two meshes, dtypes or versions differ, the first layer that does.

The forward is a plain one, over a whole prompt and without a cache, laid out as the engine's step is. With pipeline
stages their layers are taken out of the stages' arrays one by one: for looking, not for serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve.layers.attention import dense_causal_attention
from jaxserve.layers.rope import rope_tables
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.runner import ModelRunner
from jaxserve.weights.loader import abstract_params, assemble, parts_of
from pallas_kernels.matmul import Weight


class LayerDigest(NamedTuple):
    """Of one layer's output [T, D]."""

    layer: int
    """-1: the embedding; ``num_layers``: the output of the final norm."""
    mean: float
    rms: float
    largest: float
    """Largest absolute value."""


def layer_digests(runner: ModelRunner, token_ids: Sequence[int]) -> list[LayerDigest]:
    """Of the embedding, every layer and the final norm, for a prompt."""
    decoder = replace(runner.decoder, num_stages=1)
    graph, shapes = abstract_params(decoder, runner.params[0].dtype)
    ops = runner.traced.ops()

    def forward(named: dict[str, Weight], tokens: Array) -> Array:
        model: Decoder = nnx.merge(graph, assemble(shapes, _unstaged(named, runner.decoder)))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        ropes = [rope_tables(rope, positions, jnp.full_like(positions, tokens.shape[1])) for rope in decoder.ropes]
        attend = dense_causal_attention(decoder)
        x = ops.constrain(model.embed(tokens, positions, ops.matmul), ("replica", None, "embed"))
        rows = [_figures(x)]
        for i, (layer, options) in enumerate(zip(model.layers, decoder.layers, strict=True)):
            x = layer(x, i, None if options.rope is None else ropes[options.rope], attend, ops)
            rows.append(_figures(x))
        return jnp.stack([*rows, _figures(model.normalize(x))])

    tokens = np.tile(np.array(token_ids, np.int32), (runner.mesh.shape["dp"], 1))
    with jax.set_mesh(runner.mesh):
        figures = np.asarray(jax.jit(forward)(runner.named_params, tokens))
    return [LayerDigest(i - 1, *map(float, row)) for i, row in enumerate(figures)]


def first_difference(
    a: Sequence[LayerDigest], b: Sequence[LayerDigest], tolerance: float = 1e-4
) -> tuple[LayerDigest, LayerDigest] | None:
    """The first layer whose figures differ by more than ``tolerance`` times its rms."""
    for one, other in zip(a, b, strict=True):
        if max(abs(x - y) for x, y in zip(one[1:], other[1:], strict=True)) > tolerance * max(one.rms, other.rms):
            return one, other
    return None


def _figures(x: Array) -> Array:
    """[mean, rms, largest] of the first replica's [T, D]."""
    x = x[0].astype(jnp.float32)
    return jnp.stack([jnp.mean(x), jnp.sqrt(jnp.mean(x * x)), jnp.max(jnp.abs(x))])


def _unstaged(named: dict[str, Weight], decoder: DecoderConfig) -> dict[str, Weight]:
    """Parameters of the model without stages."""
    weights = {}
    for name, weight in named.items():
        parts = parts_of(name, decoder)
        staged = decoder.num_stages > 1 and name.startswith("layers.")
        weights |= {
            part: jax.tree.map(lambda x, i=i: x[i], weight) if staged else weight for i, part in enumerate(parts)
        }
    return weights
