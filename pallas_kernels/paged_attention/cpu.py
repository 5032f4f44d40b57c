"""Paged attention for XLA:CPU: the work follows the live blocks, not the padded table.

Decoding sequences (one query token) are cut into (sequence, block) pairs, and a loop with a dynamic trip count takes
a fixed number of pairs at a time: one gather of whole blocks, two batched products, and a merge of the partial
softmaxes by a one-hot product. Prefill chunks are cut into tiles of query tokens, each of which loops over its keys.

What the layout and the loop owe to measurements (2 cores, 32 sequences of 100-320 tokens, 12 KV heads, float32):
- a gather of blocks as flat rows copies at 50 GB/s, of 4-d blocks at 35; fused into a product it drops to 12;
- K as [block, kv_head, head_dim, token] makes q.K a product of row-major operands: 37 GB/s against 15;
- 64 pairs a turn: smaller turns pay for the loop, larger ones leave the L2 cache;
- bfloat16 products and elementwise passes run at a quarter of float32's speed, so blocks are widened as they are read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention import Masking, PagedAttention, Ragged

PAIRS_PER_TURN = 64
QUERY_TILE = 64
KEY_TILE = 128
"""Tokens of K and V that one turn of the prefill loop reads."""

MASKED = -1e30
"""Instead of -inf: a fully masked row must not turn into NaN."""


class Partial(NamedTuple):
    """A softmax under way: running maximum and sum [...], weighted values [..., H]; all float32."""

    maximum: Array
    total: Array
    values: Array

    @classmethod
    def empty(cls, rows: tuple[int, ...], head_dim: int) -> Partial:
        return cls(jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))

    def normalized(self) -> Array:
        return self.values / jnp.maximum(self.total, 1e-30)[..., None]


def cache_shapes(num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """K [block, kv_head, head_dim, token], V [block, kv_head, token, head_dim]."""
    return (num_blocks, kv_heads, head_dim, block_size), (num_blocks, kv_heads, block_size, head_dim)


def write(k_cache: Array, v_cache: Array, k: Array, v: Array, slot_mapping: Array) -> tuple[Array, Array]:
    size = k_cache.shape[3]
    block, offset = slot_mapping // size, slot_mapping % size
    return (
        k_cache.at[block, :, :, offset].set(k.astype(k_cache.dtype), mode="promise_in_bounds"),
        v_cache.at[block, :, offset, :].set(v.astype(v_cache.dtype), mode="promise_in_bounds"),
    )


def attend(q: Array, k_cache: Array, v_cache: Array, ragged: Ragged, masking: Masking) -> Array:
    num_tokens, num_seqs = q.shape[0], ragged.kv_lens.shape[0]
    starts, ends = ragged.cu_q_lens[:-1], ragged.cu_q_lens[1:]
    scaled = q.astype(jnp.float32) * masking.scale
    decoded = _decode(_take(scaled, starts), ends - starts == 1, k_cache, v_cache, ragged, masking)
    t = jnp.arange(num_tokens)
    sequence = jnp.minimum(jnp.sum(t[:, None] >= ends[None], axis=1), num_seqs - 1)
    is_decode = (t < ends[-1]) & (_take(ends - starts, sequence) == 1)
    out = jnp.where(is_decode[:, None, None, None], _take(decoded, sequence), 0.0)
    if num_tokens > 1:
        out = _prefill(out, scaled, k_cache, v_cache, ragged, masking)
    return out.astype(q.dtype)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="clip")


def _blocks(cache: Array, blocks: Array) -> Array:
    """Whole blocks in float32, gathered as flat rows."""
    rows = cache.reshape(cache.shape[0], -1).at[blocks].get(mode="promise_in_bounds")
    return rows.reshape(*blocks.shape, *cache.shape[1:]).astype(jnp.float32)


def _capped(scores: Array, masking: Masking) -> Array:
    return scores if masking.softcap is None else jnp.tanh(scores / masking.softcap) * masking.softcap


def _first_seen(position: Array, masking: Masking) -> Array:
    """First position that a token at ``position`` sees."""
    return jnp.zeros_like(position) if masking.window is None else jnp.maximum(position - masking.window + 1, 0)


# -- one query token per sequence ------------------------------------------------------------------------------------


def _decode(
    q: Array, active: Array, k_cache: Array, v_cache: Array, ragged: Ragged, masking: Masking
) -> Array:
    """q [S,K,G,H], already scaled; active [S] says which rows are decoding -> float32 [S,K,G,H]."""
    num_seqs, kv_heads, group, head_dim = q.shape
    size = v_cache.shape[2]
    kv_lens = jnp.where(active, ragged.kv_lens, 0)
    first_block = _first_seen(kv_lens - 1, masking) // size
    num_blocks = -(-kv_lens // size) - jnp.where(active, first_block, 0)
    ends = jnp.cumsum(num_blocks)
    pairs = min(PAIRS_PER_TURN, num_seqs * ragged.block_tables.shape[1])

    def turn(i: Array, so_far: Partial) -> Partial:
        w = i * pairs + jnp.arange(pairs)
        live = w < ends[-1]
        seq = jnp.minimum(jnp.sum(w[:, None] >= ends[None], axis=1), num_seqs - 1)
        j = jnp.where(live, w - _take(ends - num_blocks, seq) + _take(first_block, seq), 0)
        block = jnp.where(live, ragged.block_tables.at[seq, j].get(mode="clip"), 0)
        position = j[:, None] * size + jnp.arange(size)[None]
        last = _take(kv_lens, seq)[:, None] - 1
        seen = live[:, None] & (position <= last) & (position >= _first_seen(last, masking))
        one_hot = live[None] & (seq[None] == jnp.arange(num_seqs)[:, None])
        k, v = _blocks(k_cache, block), _blocks(v_cache, block)
        scores = _capped(jnp.einsum("pkgh,pkht->pkgt", _take(q, seq), k), masking)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        block_max = jnp.max(scores, axis=-1)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - block_max[..., None]), 0.0)
        values = jnp.einsum("pkgt,pkth->pkgh", weights, jnp.where(seen[:, None, :, None], v, 0.0))
        return _merge(so_far, Partial(block_max, jnp.sum(weights, axis=-1), values), seq, one_hot)

    empty = Partial.empty((num_seqs, kv_heads, group), head_dim)
    return jax.lax.fori_loop(0, -(-ends[-1] // pairs), turn, empty).normalized()


def _merge(so_far: Partial, blocks: Partial, seq: Array, one_hot: Array) -> Partial:
    """Fold per-pair partials [P, ...] into per-sequence ones [S, ...]; one_hot [S, P] says whose they are."""
    per_seq = jnp.where(one_hot[:, :, None, None], blocks.maximum[None], MASKED)
    maximum = jnp.maximum(so_far.maximum, jnp.max(per_seq, axis=1))
    keep = jnp.exp(so_far.maximum - maximum)
    weight = jnp.exp(blocks.maximum - _take(maximum, seq))
    owner = one_hot.astype(jnp.float32)
    return Partial(
        maximum,
        so_far.total * keep + jnp.einsum("sp,pkg->skg", owner, blocks.total * weight),
        so_far.values * keep[..., None] + jnp.einsum("sp,pkgh->skgh", owner, blocks.values * weight[..., None]),
    )


# -- chunks of prompt ------------------------------------------------------------------------------------------------


def _prefill(
    out: Array, q: Array, k_cache: Array, v_cache: Array, ragged: Ragged, masking: Masking
) -> Array:
    """Fill the rows of ``out`` [T,K,G,H] that belong to sequences with more than one query token."""
    num_tokens = q.shape[0]
    tile = min(QUERY_TILE, num_tokens)
    starts, q_lens = ragged.cu_q_lens[:-1], jnp.diff(ragged.cu_q_lens)
    tiles = jnp.where(q_lens > 1, -(-q_lens // tile), 0)
    ends = jnp.cumsum(tiles)
    room = ((0, tile), (0, 0), (0, 0), (0, 0))  # so that the last tile's slice is never moved back
    q, out = jnp.pad(q, room), jnp.pad(out, room)

    def one_tile(i: Array, out: Array) -> Array:
        seq = jnp.minimum(jnp.sum(i >= ends), starts.shape[0] - 1)
        offset = (i - (ends - tiles)[seq]) * tile
        row = starts[seq] + offset
        position = ragged.kv_lens[seq] - q_lens[seq] + offset + jnp.arange(tile)
        attended = _tile_over_keys(
            jax.lax.dynamic_slice_in_dim(q, row, tile),
            position,
            jnp.minimum(position[-1] + 1, ragged.kv_lens[seq]),
            ragged.block_tables[seq],
            (k_cache, v_cache),
            masking,
        )
        mine = offset + jnp.arange(tile) < q_lens[seq]
        before = jax.lax.dynamic_slice_in_dim(out, row, tile)
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(mine[:, None, None, None], attended, before), row, axis=0
        )

    return jax.lax.fori_loop(0, ends[-1], one_tile, out)[:num_tokens]


def _tile_over_keys(
    q: Array, position: Array, kv_len: Array, table: Array, caches: tuple[Array, Array], masking: Masking
) -> Array:
    """One tile of query tokens [Q,K,G,H] at ``position`` [Q] against its sequence's keys before ``kv_len``."""
    k_cache, v_cache = caches
    tile, kv_heads, group, head_dim = q.shape
    size = v_cache.shape[2]
    step = max(1, min(KEY_TILE // size, table.shape[0]))
    first_block = _first_seen(position[0], masking) // size
    rows = jnp.moveaxis(q, 0, 2).reshape(kv_heads, group * tile, head_dim)
    row_position = jnp.tile(position, group)[:, None]

    def turn(i: Array, so_far: Partial) -> Partial:
        j = first_block + i * step + jnp.arange(step)
        at = (j[:, None] * size + jnp.arange(size)[None]).reshape(-1)
        real = at < kv_len
        block = jnp.where(j * size < kv_len, table.at[j].get(mode="clip"), 0)
        k = jnp.moveaxis(_blocks(k_cache, block), 0, 2).reshape(kv_heads, head_dim, -1)
        v = jnp.moveaxis(_blocks(v_cache, block), 0, 1).reshape(kv_heads, -1, head_dim)
        seen = real[None] & (at[None] <= row_position) & (at[None] >= _first_seen(row_position, masking))
        scores = _capped(jnp.einsum("kmh,kht->kmt", rows, k), masking)
        scores = jnp.where(seen[None], scores, MASKED)
        maximum = jnp.maximum(so_far.maximum, jnp.max(scores, axis=-1))
        keep = jnp.exp(so_far.maximum - maximum)
        weights = jnp.where(seen[None], jnp.exp(scores - maximum[..., None]), 0.0)
        values = jnp.einsum("kmt,kth->kmh", weights, jnp.where(real[None, :, None], v, 0.0))
        return Partial(
            maximum,
            so_far.total * keep + jnp.sum(weights, axis=-1),
            so_far.values * keep[..., None] + values,
        )

    turns = -(-(-(-kv_len // size) - first_block) // step)
    done = jax.lax.fori_loop(0, turns, turn, Partial.empty((kv_heads, group * tile), head_dim))
    return jnp.moveaxis(done.normalized().reshape(kv_heads, group, tile, head_dim), 2, 0)


IMPLEMENTATION = PagedAttention("cpu", cache_shapes, write, attend)
