"""The definition of correct: attention with one KV head, whose keys are c and r and whose values are c."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.mla_attention import MlaAttention, Queries, check_scales
from pallas_kernels.paged_attention import Ragged, Scoring, Shape, reference, stored


def write(cache: Array, latent: Array, rope: Array, slot_mapping: Array, scoring: Scoring) -> Array:
    check_scales(scoring)
    block, token = slot_mapping // cache.shape[1], slot_mapping % cache.shape[1]
    rows = jnp.concatenate([latent, rope], axis=-1)
    return cache.at[block, token].set(stored(rows, cache.dtype, scoring.k_scale))


def plan(ragged: Ragged, num_tokens: int, num_heads: int, shape: Shape) -> Ragged:
    return ragged


def attend(queries: Queries, cache: Array, plan: Ragged, shape: Shape, scoring: Scoring) -> tuple[Array, Array]:
    check_scales(scoring)
    q = jnp.concatenate(queries, axis=-1)
    keys = cache[:, None]
    values = keys[..., : queries.latent.shape[-1]]
    out, lse = reference.attend(q[:, None], keys, values, plan, shape, scoring)
    return out[:, 0], lse[:, 0]


IMPLEMENTATION = MlaAttention("reference", write, plan, attend)
