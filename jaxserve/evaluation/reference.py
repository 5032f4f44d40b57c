"""The definition of right for a served model: the same checkpoint as a plain forward on one CPU device in float32.

No mesh, no cache, no batch, no scheduler, no kernel: whole sequences, one after the other, with the model's own layers
and dense attention. On a CPU whatever serves, so that no accelerator's arithmetic is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxserve.build import ModelFiles, fit, load_model
from jaxserve.engine_args import EngineArgs
from jaxserve.layer_digest import LayerDigest
from jaxserve.layers.attention import dense_causal_attention
from jaxserve.layers.rope import rope_tables
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import PLAIN, Decoder
from sharding import MeshConfig, build_mesh


class Forward(NamedTuple):
    """Of one sequence of T tokens."""

    logprobs: np.ndarray
    """float32 [T, V]: of what follows each token."""
    digests: list[LayerDigest]


@dataclass(frozen=True)
class PlainModel:
    """A model whole on one CPU device."""

    config: DecoderConfig
    state: Any
    length: int
    """That sequences are filled up to: one program for all."""
    run: Callable[..., tuple[Array, Array]]

    @classmethod
    def load(cls, args: EngineArgs, length: int) -> PlainModel:
        """The checkpoint of ``args`` in float32."""
        mesh = MeshConfig()
        args = replace(
            args,
            dtype="float32",
            mesh=None,
            tensor_parallel_size=1,
            data_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
        )
        files = ModelFiles.find(args)
        devices = build_mesh(mesh, jax.devices("cpu")[:1])
        config = fit(files.decoder, mesh)
        graph, state = load_model(files, args, config, devices, mesh.sharding_rules)
        return cls(config, state, length, _program(graph, config))

    def rounded(self, dtype: Any) -> PlainModel:
        """The same in ``dtype``: what is between the two is rounding and nothing else."""
        return replace(self, state=jax.tree.map(lambda x: x.astype(dtype), self.state))

    def forward(self, token_ids: Sequence[int], num_prompt_tokens: int) -> Forward:
        """The first ``num_prompt_tokens`` came at once, the others one by one: rope angles may depend on that."""
        count = len(token_ids)
        tokens = np.zeros((1, self.length), np.int32)
        tokens[0, :count] = token_ids
        places = np.arange(self.length, dtype=np.int32)[None]
        lengths = np.maximum(places + 1, np.int32(num_prompt_tokens))
        logprobs, figures = self.run(self.state, tokens, places, lengths, np.int32(count))
        digests = [LayerDigest(i - 1, *map(float, row)) for i, row in enumerate(np.asarray(figures))]
        return Forward(np.asarray(logprobs)[:count], digests)


def _program(graph: Any, config: DecoderConfig) -> Callable[..., tuple[Array, Array]]:
    """(state, tokens, positions, rope_lens [1, T], count) -> logprobs [T, V], figures [L + 2, 3] of the first
    ``count`` tokens."""
    attend = dense_causal_attention(config)

    def forward(state: Any, tokens: Array, positions: Array, rope_lens: Array, count: Array) -> tuple[Array, Array]:
        model: Decoder = nnx.merge(graph, state)
        ropes = [rope_tables(rope, positions, rope_lens) for rope in config.ropes]
        x = model.embed(tokens, positions)
        rows = [_figures(x[0], count)]
        for i, (layer, options) in enumerate(zip(model.layers, config.layers, strict=True)):
            x = layer(x, i, None if options.rope is None else ropes[options.rope], attend, PLAIN)
            rows.append(_figures(x[0], count))
        x = model.normalize(x)
        return jax.nn.log_softmax(model.unembed(x)[0], axis=-1), jnp.stack([*rows, _figures(x[0], count)])

    def precise(*arguments: Any) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):
            return forward(*arguments)

    return jax.jit(precise)


def _figures(x: Array, count: Array) -> Array:
    """[mean, rms, largest] of the first ``count`` rows of [T, D]."""
    real = jnp.arange(x.shape[0])[:, None] < count
    x = jnp.where(real, x.astype(jnp.float32), 0.0)
    entries = count.astype(jnp.float32) * x.shape[1]
    return jnp.stack([jnp.sum(x) / entries, jnp.sqrt(jnp.sum(x * x) / entries), jnp.max(jnp.abs(x))])
