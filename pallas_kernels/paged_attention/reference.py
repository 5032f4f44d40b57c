"""The definition of correct: every token gathers its sequence's whole table and masks what it must not see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_write import reference as kv_write
from pallas_kernels.paged_attention import CacheShapes, PagedAttention, Ragged, Scoring, Shape

MASKED = -1e30


def cache_shapes(num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> CacheShapes:
    """Both [block, kv_head, token, head_dim]."""
    shape = (num_blocks, kv_heads, block_size, head_dim)
    return shape, shape


def plan(ragged: Ragged, num_tokens: int, shape: Shape) -> Ragged:
    return ragged


def attend(
    q: Array, k_cache: Array, v_cache: Array, plan: Ragged, shape: Shape, scoring: Scoring
) -> tuple[Array, Array]:
    ragged = plan
    t = jnp.arange(q.shape[0])
    ends = ragged.cu_q_lens[1:]
    sequence = jnp.minimum(jnp.sum(t[:, None] >= ends[None], axis=1), ends.shape[0] - 1)

    def one_token(q_t: Array, seq: Array, visible: Array) -> tuple[Array, Array]:
        k, v = (_tokens(cache, ragged.block_tables[seq]) for cache in (k_cache, v_cache))
        scores = jnp.einsum("kgh,skh->kgs", q_t.astype(jnp.float32), k) * (scoring.scale * scoring.k_scale)
        if scoring.softcap is not None:
            scores = jnp.tanh(scores / scoring.softcap) * scoring.softcap
        s = jnp.arange(k.shape[0])
        seen = s < visible
        if shape.window is not None:
            seen &= s >= visible - shape.window
        scores = jnp.where(seen[None, None], scores, MASKED)
        best = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(seen[None, None], jnp.exp(scores - best), 0.0)
        total = jnp.maximum(jnp.sum(weights, axis=-1), 1e-30)
        out = jnp.einsum("kgs,skh->kgh", weights, jnp.where(seen[:, None, None], v, 0.0))
        return out * scoring.v_scale / total[..., None], best[..., 0] + jnp.log(total)

    out, lse = jax.lax.map(lambda args: one_token(*args), (q, sequence, ragged.visible))
    real = t < ends[-1]
    return jnp.where(real[:, None, None, None], out, 0.0), jnp.where(real[:, None, None], lse, MASKED)


def _tokens(cache: Array, table: Array) -> Array:
    """Blocks of one sequence as float32 [tokens, K, H]."""
    blocks = jnp.moveaxis(cache[table], 2, 1)
    return blocks.reshape(-1, *blocks.shape[2:]).astype(jnp.float32)


IMPLEMENTATION = PagedAttention("reference", cache_shapes, kv_write.IMPLEMENTATION, plan, attend)
