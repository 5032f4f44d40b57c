"""Attention over a whole sequence, without a cache: for training and as an oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models.config import DecoderConfig
from pallas_kernels.kv_write import HeadNorm, Inputs
from pallas_kernels.kv_write.reference import heads


class Projection(NamedTuple):
    """What a layer's attention starts from; turning and normalising heads is left to whoever writes the KV cache.

    qkv [R, T, K, G+2, H]: of every KV head its query heads, then K, then V, biases added; rope: cos and sin [R, T,
    dim/2], None = nothing turns; norm_weights: [H] of the queries' norm and of the keys', None = no norm of heads.
    """

    qkv: Array
    rope: tuple[Array, Array] | None
    norm_weights: tuple[Array, Array] | None


Attend = Callable[[int, Projection], Array]
"""attend(layer, projection) -> [R, T, K, G, H]: where K and V come from and go to."""


def head_norm(config: DecoderConfig) -> HeadNorm:
    """Of the norm whose weights a ``Projection`` brings."""
    return HeadNorm(config.norm.eps, config.norm.offset)


def dense_causal_attention(config: DecoderConfig) -> Attend:
    """Every row of R is one sequence that starts at position 0; each token sees itself and those before."""

    def attend(layer: int, projection: Projection) -> Array:
        def one_row(qkv: Array, rope: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
            nowhere = jnp.zeros(len(qkv), jnp.int32)
            return heads(Inputs(qkv, nowhere, rope, projection.norm_weights), head_norm(config))

        q, k, v = jax.vmap(one_row)(projection.qkv, projection.rope)
        scores = jnp.einsum("rtkgh,rskh->rkgts", q, k, preferred_element_type=jnp.float32)
        scores *= config.scale * config.layers[layer].scale
        if config.attention_softcap is not None:
            scores = jnp.tanh(scores / config.attention_softcap) * config.attention_softcap
        distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]
        window = config.layers[layer].window
        seen = (distance >= 0) & (distance < (window or q.shape[1]))
        scores = jnp.where(seen[None, None, None], scores, -jnp.inf)
        return jnp.einsum("rkgts,rskh->rtkgh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)

    return attend
