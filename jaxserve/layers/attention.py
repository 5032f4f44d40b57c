"""Attention over a whole sequence, without a cache: for training and as an oracle."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models.config import DecoderConfig

Attend = Callable[[int, Array, Array, Array], Array]
"""attend(layer, q [R,T,K,G,H], k [R,T,K,H], v [R,T,K,H]) -> [R,T,K,G,H]: where K and V come from and go to."""


def dense_causal_attention(config: DecoderConfig) -> Attend:
    """Every row of R is one sequence that starts at position 0; each token sees itself and those before."""

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
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
