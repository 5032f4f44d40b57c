"""Paged attention for XLA:CPU: the work follows the live blocks, not the padded table.

Decoding sequences (one query token) are cut into (sequence, block) pairs, and a loop with a dynamic trip count takes
a fixed number of pairs at a time: one gather of whole blocks, two batched products, and a merge of the partial
softmaxes by a one-hot product. Prefill chunks are cut into tiles of query tokens, each of which loops over its keys.

What the layout and the loop owe to measurements (2 cores, 32 sequences of 100-320 tokens, 12 KV heads, float32):
- a gather of blocks as flat rows copies at 50 GB/s, of 4-d blocks at 35; fused into a product it drops to 12;
- K as [block, kv_head, head_dim, token] makes q.K a product of row-major operands: 37 GB/s against 15;
- 3 MiB of K a turn (64 blocks of these): smaller turns pay for the loop, larger ones leave the L2 cache;
- bfloat16 products and elementwise passes run at a quarter of float32's speed, so blocks are widened as they are read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_write.reference import before
from pallas_kernels.paged_attention import CacheShapes, PagedAttention, Ragged, Scoring, Shape, stored

MAX_PAIRS_PER_TURN = 128
TURN_BYTES = 3 << 20
"""Of K, widened to float32, that one turn of the decode loop reads."""
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

    def finished(self) -> tuple[Array, Array]:
        """The softmax's output, and the log-sum-exp of its scores."""
        total = jnp.maximum(self.total, 1e-30)
        return self.values / total[..., None], self.maximum + jnp.log(total)


def cache_shapes(num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> CacheShapes:
    """K [block, kv_head, head_dim, token], V [block, kv_head, token, head_dim]."""
    return (num_blocks, kv_heads, head_dim, block_size), (num_blocks, kv_heads, block_size, head_dim)


def write(
    k_cache: Array, v_cache: Array, k: Array, v: Array, slot_mapping: Array, scoring: Scoring
) -> tuple[Array, Array]:
    size = k_cache.shape[3]
    if slot_mapping.shape[0] == 1:
        # XLA turns a scatter of one row into an update slice, and then copies the whole cache (1 s a step, 1.2 GB)
        # because a loop reads it afterwards. A second row, to the null block, keeps it a scatter, in place.
        k, v, slot_mapping = jnp.tile(k, (2, 1, 1)), jnp.tile(v, (2, 1, 1)), jnp.pad(slot_mapping, (0, 1))
    block, offset = slot_mapping // size, slot_mapping % size
    return (
        k_cache.at[block, :, :, offset].set(stored(k, k_cache.dtype, scoring.k_scale), mode="promise_in_bounds"),
        v_cache.at[block, :, offset, :].set(stored(v, v_cache.dtype, scoring.v_scale), mode="promise_in_bounds"),
    )


class Pairs(NamedTuple):
    """(sequence, block) pairs of the decoding sequences, in order. All int32 [W] but ``total``.

    ``low`` and ``high`` bound the block's tokens that the sequence's query sees. Pairs past ``total`` belong to
    sequence S (nobody), block 0, and see nothing.
    """

    sequence: Array
    block: Array
    low: Array
    high: Array
    total: Array


class Tiles(NamedTuple):
    """Query tiles of the sequences with more than one token. All int32 [N] but ``total``, ``tables`` and ``visible``.

    ``row``: first row of the tile; ``row_end``: one past its last own row; ``end``: how many keys that one sees;
    ``first_block``: the first that any of its rows sees; ``sequence``: whose it is, a row of ``tables`` [S, B];
    ``visible`` [T]: how many keys each row sees.
    """

    sequence: Array
    row: Array
    row_end: Array
    end: Array
    first_block: Array
    tables: Array
    visible: Array
    total: Array


class Plan(NamedTuple):
    """Of a step: decoding sequences and prompt chunks. ``starts`` [S] is each sequence's first row, ``owner`` [T]
    the decoding sequence of each row (S = none). Of these only ``pairs`` is there if every sequence has one token."""

    pairs: Pairs
    tiles: Tiles | None
    starts: Array | None
    owner: Array | None


def plan(ragged: Ragged, num_tokens: int, shape: Shape) -> Plan:
    starts, ends = ragged.cu_q_lens[:-1], ragged.cu_q_lens[1:]
    q_lens = ends - starts
    pairs = _plan_pairs(ragged, jnp.where(q_lens == 1, ragged.kv_lens, 0), shape)
    if shape.one_token_each:
        return Plan(pairs, None, None, None)
    t = jnp.arange(num_tokens)
    sequence = jnp.sum((t[:, None] >= ends[None]).astype(jnp.int32), axis=1)
    owner = jnp.where(_take(q_lens, sequence) == 1, sequence, q_lens.shape[0])
    owner = jnp.where(t < ends[-1], owner, q_lens.shape[0])
    return Plan(pairs, _plan_tiles(ragged, q_lens, num_tokens, shape), starts, owner)


def _pairs_per_turn(num_seqs: int, block_bytes: int) -> int:
    """A power of two; fewer for few sequences, which often have fewer blocks than a full turn."""
    most = max(1, min(MAX_PAIRS_PER_TURN, 16 * num_seqs, TURN_BYTES // block_bytes))
    return 1 << (most.bit_length() - 1)


def _plan_pairs(ragged: Ragged, kv_lens: Array, shape: Shape) -> Pairs:
    """``kv_lens`` is 0 for the sequences that are not decoding."""
    num_seqs, width = ragged.block_tables.shape
    size = shape.block_size
    first = _first_seen(kv_lens - 1, shape)
    num_blocks = -(-kv_lens // size) - first // size
    ends = jnp.cumsum(num_blocks)
    w = jnp.arange(-(-num_seqs * width // MAX_PAIRS_PER_TURN) * MAX_PAIRS_PER_TURN, dtype=jnp.int32)
    sequence = jnp.sum((w[:, None] >= ends[None]).astype(jnp.int32), axis=1)
    live = w < ends[-1]
    j = jnp.where(live, w - _take(ends - num_blocks, sequence) + _take(first // size, sequence), 0)
    block = ragged.block_tables.at[sequence, j].get(mode="clip")
    return Pairs(
        sequence,
        jnp.where(live, block, 0),
        jnp.where(live, _take(first, sequence) - j * size, 0),
        jnp.where(live, _take(kv_lens, sequence) - j * size, 0),
        ends[-1],
    )


def _plan_tiles(ragged: Ragged, q_lens: Array, num_tokens: int, shape: Shape) -> Tiles:
    num_seqs = q_lens.shape[0]
    tile = min(QUERY_TILE, num_tokens)
    tiles = jnp.where(q_lens > 1, -(-q_lens // tile), 0)
    ends = jnp.cumsum(tiles)
    i = jnp.arange(-(-num_tokens // tile) + num_seqs, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum((i[:, None] >= ends[None]).astype(jnp.int32), axis=1), num_seqs - 1)
    row = _take(ragged.cu_q_lens, sequence) + (i - _take(ends - tiles, sequence)) * tile
    row_end = jnp.minimum(row + tile, _take(ragged.cu_q_lens, sequence + 1))
    return Tiles(
        sequence,
        row,
        row_end,
        _take(ragged.visible, row_end - 1),
        _first_seen(_take(ragged.visible, row) - 1, shape) // shape.block_size,
        ragged.block_tables,
        ragged.visible,
        ends[-1],
    )


def attend(q: Array, k_cache: Array, v_cache: Array, plan: Plan, shape: Shape, scoring: Scoring) -> tuple[Array, Array]:
    scaled = q.astype(jnp.float32) * (scoring.scale * scoring.k_scale)
    out, lse = _attend(scaled, k_cache, v_cache, plan, shape, scoring)
    return out * scoring.v_scale, lse


def _attend(
    scaled: Array, k_cache: Array, v_cache: Array, plan: Plan, shape: Shape, scoring: Scoring
) -> tuple[Array, Array]:
    if plan.tiles is None:
        return _decode(scaled, k_cache, v_cache, plan.pairs, scoring)
    assert plan.starts is not None and plan.owner is not None
    decoded, lse = _decode(_take(scaled, plan.starts), k_cache, v_cache, plan.pairs, scoring)
    mine = (plan.owner < decoded.shape[0])[:, None, None]
    out = jnp.where(mine[..., None], _take(decoded, plan.owner), 0.0), jnp.where(mine, _take(lse, plan.owner), MASKED)
    return _prefill(out, scaled, (k_cache, v_cache), plan.tiles, shape, scoring)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="clip")


def _blocks(cache: Array, blocks: Array) -> Array:
    """Whole blocks in float32, gathered as flat rows."""
    rows = cache.reshape(cache.shape[0], -1).at[blocks].get(mode="promise_in_bounds")
    return rows.reshape(*blocks.shape, *cache.shape[1:]).astype(jnp.float32)


def _capped(scores: Array, scoring: Scoring) -> Array:
    return scores if scoring.softcap is None else jnp.tanh(scores / scoring.softcap) * scoring.softcap


def _first_seen(position: Array, shape: Shape) -> Array:
    """First position that a token at ``position`` sees."""
    return jnp.zeros_like(position) if shape.window is None else jnp.maximum(position - shape.window + 1, 0)


def _decode(q: Array, k_cache: Array, v_cache: Array, pairs: Pairs, scoring: Scoring) -> tuple[Array, Array]:
    """q [S,K,G,H], already scaled -> output [S,K,G,H] and log-sum-exp [S,K,G]; zero and nothing for sequences without
    pairs."""
    num_seqs, kv_heads, group, head_dim = q.shape
    offsets = jnp.arange(v_cache.shape[2])[None]
    step = _pairs_per_turn(num_seqs, 4 * math.prod(k_cache.shape[1:]))

    def turn(i: Array, so_far: Partial) -> Partial:
        sequence, block, low, high = (jax.lax.dynamic_slice_in_dim(x, i * step, step) for x in pairs[:4])
        seen = (offsets >= low[:, None]) & (offsets < high[:, None])
        k, v = _blocks(k_cache, block), _blocks(v_cache, block)
        scores = _capped(jnp.einsum("pkgh,pkht->pkgt", _take(q, sequence), k), scoring)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        block_max = jnp.max(scores, axis=-1)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - block_max[..., None]), 0.0)
        return _merge(so_far, Partial(block_max, jnp.sum(weights, axis=-1), _weighted(weights, v, seen)), sequence)

    empty = Partial.empty((num_seqs, kv_heads, group), head_dim)
    return jax.lax.fori_loop(0, -(-pairs.total // step), turn, empty).finished()


def _weighted(weights: Array, v: Array, seen: Array) -> Array:
    """Sum of v [P,K,t,H] by weights [P,K,G,t], leaving out what is not seen [P,t] -> [P,K,G,H].

    With one query head per KV head a sum of products reads V once and needs no masked copy of it; with more, a
    product is faster.
    """
    if weights.shape[2] == 1:
        terms = jnp.where(seen[:, None, :, None], weights[:, :, 0, :, None] * v, 0.0)
        return jnp.sum(terms, axis=2)[:, :, None]
    return jnp.einsum("pkgt,pkth->pkgh", weights, jnp.where(seen[:, None, :, None], v, 0.0))


def _merge(so_far: Partial, blocks: Partial, sequence: Array) -> Partial:
    """Fold per-pair partials [P, ...] into per-sequence ones [S, ...]."""
    owner = sequence[None] == jnp.arange(so_far.total.shape[0])[:, None]
    per_seq = jnp.where(owner[:, :, None, None], blocks.maximum[None], MASKED)
    maximum = jnp.maximum(so_far.maximum, jnp.max(per_seq, axis=1))
    keep = jnp.exp(so_far.maximum - maximum)
    weight = jnp.exp(jnp.minimum(blocks.maximum - _take(maximum, sequence), 0.0))
    one_hot = owner.astype(jnp.float32)
    return Partial(
        maximum,
        so_far.total * keep + jnp.einsum("sp,pkg->skg", one_hot, blocks.total * weight),
        so_far.values * keep[..., None] + jnp.einsum("sp,pkgh->skgh", one_hot, blocks.values * weight[..., None]),
    )


def _prefill(
    out: tuple[Array, Array], q: Array, caches: tuple[Array, Array], tiles: Tiles, shape: Shape, scoring: Scoring
) -> tuple[Array, Array]:
    """Fill the rows of output [T,K,G,H] and log-sum-exp [T,K,G] that belong to sequences with more than one query
    token."""
    num_tokens = q.shape[0]
    tile = min(QUERY_TILE, num_tokens)

    def with_room(x: Array) -> Array:
        """So that the last tile's slice is never moved back."""
        return jnp.pad(x, ((0, tile), *[(0, 0)] * (x.ndim - 1)))

    q, visible = with_room(q), with_room(tiles.visible)

    def one_tile(i: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
        row = tiles.row[i]
        attended = _tile_over_keys(
            jax.lax.dynamic_slice_in_dim(q, row, tile),
            jax.lax.dynamic_slice_in_dim(visible, row, tile),
            (tiles.first_block[i], tiles.end[i]),
            tiles.tables[tiles.sequence[i]],
            caches,
            (shape, scoring),
        )
        mine = row + jnp.arange(tile) < tiles.row_end[i]

        def put(whole: Array, rows: Array) -> Array:
            before = jax.lax.dynamic_slice_in_dim(whole, row, tile)
            kept = jnp.where(mine.reshape(-1, *[1] * (rows.ndim - 1)), rows, before)
            return jax.lax.dynamic_update_slice_in_dim(whole, kept, row, axis=0)

        return put(out[0], attended[0]), put(out[1], attended[1])

    filled, lse = jax.lax.fori_loop(0, tiles.total, one_tile, (with_room(out[0]), with_room(out[1])))
    return filled[:num_tokens], lse[:num_tokens]


def _tile_over_keys(
    q: Array,
    visible: Array,
    bounds: tuple[Array, Array],
    table: Array,
    caches: tuple[Array, Array],
    options: tuple[Shape, Scoring],
) -> tuple[Array, Array]:
    """One tile of query tokens [Q,K,G,H], each of which sees ``visible`` [Q] keys, against its sequence's keys, from
    block ``bounds[0]`` to key ``bounds[1]``."""
    (k_cache, v_cache), (shape, scoring), (first_block, end) = caches, options, bounds
    tile, kv_heads, group, head_dim = q.shape
    size = shape.block_size
    step = max(1, min(KEY_TILE // size, table.shape[0]))
    rows = jnp.moveaxis(q, 0, 2).reshape(kv_heads, group * tile, head_dim)
    row_visible = jnp.tile(visible, group)[:, None]
    table = jnp.pad(table, (0, step))

    def turn(i: Array, so_far: Partial) -> Partial:
        j = first_block + i * step
        at = j * size + jnp.arange(step * size)
        real = at < end
        block = jnp.where(real[::size], jax.lax.dynamic_slice_in_dim(table, j, step), 0)
        k = jnp.moveaxis(_blocks(k_cache, block), 0, 2).reshape(kv_heads, head_dim, -1)
        v = jnp.moveaxis(_blocks(v_cache, block), 0, 1).reshape(kv_heads, -1, head_dim)
        seen = real[None] & (at[None] < row_visible) & (at[None] >= _first_seen(row_visible - 1, shape))
        scores = _capped(jnp.einsum("kmh,kht->kmt", rows, k), scoring)
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

    turns = -(-(-(-end // size) - first_block) // step)
    done = jax.lax.fori_loop(0, turns, turn, Partial.empty((kv_heads, group * tile), head_dim))
    out, lse = done.finished()
    out = jnp.moveaxis(out.reshape(kv_heads, group, tile, head_dim), 2, 0)
    return out, jnp.moveaxis(lse.reshape(kv_heads, group, tile), 2, 0)


IMPLEMENTATION = PagedAttention("cpu", cache_shapes, before("cpu", write), plan, attend)
