"""Paged attention for Hopper, in Pallas' Mosaic GPU style: TMA by block table, wgmma, warp specialisation.

One kernel serves prompts and decoding sequences. Its work is a list of items: a tile of query rows of one sequence
(rows are tokens x query heads of one KV head, so that grouped heads fill wgmma's 64 rows) and a range of its keys. Its
thread blocks, one per SM, live for the whole list. In each, one warpgroup brings queries, K and V into shared memory,
some tiles ahead; the others hold 64 rows each and compute. Two of them take turns: one has the tensor cores while the
other takes exponentials.

The keys of a tile are cut into several items where there are too few tiles for the SMs; partial results are merged by
their log-sum-exp, in XLA, by the same pass that brings the rows into the order of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.kv_write import triton as kv_write
from pallas_kernels.paged_attention import PagedAttention, Ragged, Scoring, Setting, Shape
from pallas_kernels.paged_attention.reference import cache_shapes

Kind = Literal["decode", "prefill"]

HOPPER = (9, 0)
NUM_SMS = 132
"""Of H100 and H200 (SXM): as many thread blocks are started."""
ROWS = 64
"""Query rows of one warpgroup: those of a wgmma."""
WARPGROUPS = 2
"""That compute, in a thread block that works on prompts."""
TILE_ROWS = WARPGROUPS * ROWS
TILING = 8
"""Rows of a tile of shared memory, for TMA and wgmma. What TMA copies must begin at a multiple of them in global memory
too: from any other row on it brings zeros in place of some rows, and others to the wrong place."""
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16")
BLOCK_SIZES = (16, 32, 64)
"""And multiples of ALIGNMENT."""
ALIGNMENT = 128
"""Keys at which items begin: a multiple of every key tile."""
LEAST_KEYS: Mapping[Kind, int] = {"decode": 256, "prefill": 1024}
"""That are worth an item of their own, whose partial result is written and merged: with a head_dim of 128 and up to 8
heads a group, a decoding one reads 128 KiB and writes 4."""
LEAST_ITEMS: Mapping[Kind, int] = {"decode": 16, "prefill": 1}
"""Into which the keys of one tile can be cut however many tiles there are, if they are many keys: one long sequence
among short ones must not take longer than they do together."""
MOST_ITEMS_PER_TILE = 128

SHARED_BYTES = 226 << 10
"""For tiles, of the 227 KiB that a thread block can have."""
MAX_STAGES = 4

MASKED = -1e30
LOWEST = -1e20
"""Where a row's maximum starts: above MASKED, so that the weight of a masked key is exp(MASKED - LOWEST) = 0 even
before the row has seen any key, and below every score."""
LOG2_E = math.log2(math.e)
FEW, MANY = 40, 232
"""Registers of a thread that copies and of one that computes: together what 384 threads start with, 168 each. A
warpgroup that asked for more would wait for ever."""


class Tiles(NamedTuple):
    """Runs of query rows of one sequence each. All int32 [N].

    ``row``: the first, a multiple of TILING: up to TILING - 1 rows of other sequences may come before the sequence's
    own; ``sequence``: whose, a row of the block tables; ``first``, ``end``: keys that any of its rows
    sees; ``low``, ``high``: keys that all of its rows see. An empty one has ``end`` 0.
    """

    row: Array
    sequence: Array
    first: Array
    end: Array
    low: Array
    high: Array


class Work(NamedTuple):
    """What the kernel does. All int32.

    ``items`` [W, 7], the longest first: columns as in ``Item``; ``total`` [1]: how many there are;
    ``slots``, ``counts`` [N]: of each tile, the first slot of its items, and how many it has.
    """

    items: Array
    total: Array
    slots: Array
    counts: Array


class Item(NamedTuple):
    """Scalars. Fields as in ``Tiles``, of one range of a tile's keys; ``slot``: where the result goes."""

    row: Array
    sequence: Array
    first: Array
    end: Array
    low: Array
    high: Array
    slot: Array

    @property
    def begin(self) -> Array:
        """Key at which its first tile of keys begins."""
        return self.first - lax.rem(self.first, jnp.int32(ALIGNMENT))


class Plan(NamedTuple):
    """``decode``: of the sequences that have one token. Prompts are cut up in ``attend``, which knows how many query
    heads share a KV head; XLA does that once for all layers."""

    ragged: Ragged
    decode: Work


# -- the work ----------------------------------------------------------------------------------------------------------


def plan(ragged: Ragged, num_tokens: int, shape: Shape) -> Plan:
    """The rows of a decoding sequence are its place among the sequences: ``_decode`` lays their queries out so."""
    starts, num_seqs = ragged.cu_q_lens[:-1], ragged.kv_lens.shape[0]
    sequence = jnp.arange(num_seqs, dtype=jnp.int32)
    tiles = _tiles(ragged, sequence, sequence, (starts, starts), ragged.cu_q_lens[1:] - starts == 1, shape)
    return Plan(ragged, _cut("decode", tiles, _most_items("decode", ragged, num_seqs, shape)))


def _tiles(
    ragged: Ragged, row: Array, sequence: Array, tokens: tuple[Array, Array], live: Array, shape: Shape
) -> Tiles:
    """Tiles from these rows on, of these sequences and their first and last of these tokens, all [N]."""
    first_token, last_token = tokens
    high, end = _take(ragged.visible, first_token), jnp.where(live, _take(ragged.visible, last_token), 0)
    if shape.window is None:
        first, low = jnp.zeros_like(end), jnp.zeros_like(end)
    else:
        first, low = jnp.maximum(high - shape.window, 0), jnp.maximum(end - shape.window, 0)
    return Tiles(row, sequence, jnp.where(live, first, 0), end, low, high)


def prefill_tiles(ragged: Ragged, num_tokens: int, group: int, shape: Shape) -> tuple[Tiles, Array]:
    """Tiles of the sequences that have several tokens, and the first tile of each sequence [S]."""
    num_seqs = ragged.kv_lens.shape[0]
    first_row, end_row = ragged.cu_q_lens[:-1] * group, ragged.cu_q_lens[1:] * group
    begin = first_row // TILING * TILING
    counts = jnp.where(end_row - first_row > group, pl.cdiv(end_row - begin, TILE_ROWS), 0)
    ends = jnp.cumsum(counts)
    most_seqs = min(num_seqs, num_tokens // 2)
    most_rows = num_tokens * group + most_seqs * (TILING - 1)
    i = jnp.arange(-(-most_rows // TILE_ROWS) + most_seqs, dtype=jnp.int32)
    sequence = jnp.minimum(_count(i, ends), num_seqs - 1)
    row = _take(begin, sequence) + (i - _take(ends - counts, sequence)) * TILE_ROWS
    first = jnp.maximum(row, _take(first_row, sequence))
    last = jnp.minimum(row + TILE_ROWS, _take(end_row, sequence)) - 1
    tiles = _tiles(ragged, row, sequence, (first // group, last // group), i < ends[-1], shape)
    return tiles, ends - counts


def _most_items(kind: Kind, ragged: Ragged, num_tiles: int, shape: Shape) -> int:
    """Into which the keys of one tile are cut: so many that few tiles keep all SMs busy."""
    most = -(-ragged.block_tables.shape[1] * shape.block_size // LEAST_KEYS[kind])
    wanted = max(LEAST_ITEMS[kind], 2 * NUM_SMS // max(1, num_tiles))
    return max(1, min(most, wanted, MOST_ITEMS_PER_TILE))


def _cut(kind: Kind, tiles: Tiles, most: int) -> Work:
    """Cut the keys of every tile into at most ``most`` items, of about equal length."""
    num_tiles, target = tiles.end.shape[0], 2 * NUM_SMS
    begin = tiles.first // ALIGNMENT * ALIGNMENT
    lengths = tiles.end - begin
    length = jnp.maximum(pl.cdiv(jnp.sum(lengths), target), pl.cdiv(jnp.max(lengths, initial=0), most))
    length = pl.cdiv(jnp.maximum(length, LEAST_KEYS[kind]), ALIGNMENT) * ALIGNMENT
    counts = pl.cdiv(lengths, length)
    ends = jnp.cumsum(counts)
    slot = jnp.arange(min(num_tiles * most, num_tiles + target), dtype=jnp.int32)
    live = slot < ends[-1]
    tile = jnp.minimum(_count(slot, ends), num_tiles - 1)
    item_begin = _take(begin, tile) + (slot - _take(ends - counts, tile)) * length
    first = jnp.maximum(item_begin, _take(tiles.first, tile))
    end = jnp.where(live, jnp.minimum(item_begin + length, _take(tiles.end, tile)), 0)
    first = jnp.minimum(first, end)
    row, sequence, low, high = (_take(x, tile) for x in (tiles.row, tiles.sequence, tiles.low, tiles.high))
    items = jnp.stack(Item(row, sequence, first, end, low, high, slot), axis=1)
    longest_first = jnp.argsort(first - end, stable=True)
    return Work(_take(items, longest_first), ends[-1:], ends - counts, counts)


def _count(i: Array, ends: Array) -> Array:
    """How many of the ascending ``ends`` are not above each ``i``: the run that it is in."""
    return jnp.sum((i[:, None] >= ends[None]).astype(jnp.int32), axis=1)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="clip")


# -- the kernel --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """``thread_blocks``: how many run. ``interpret``: of ``plgpu.kernel``; its interpreter has no wgmma whose left
    operand is in registers or whose accumulator starts at a value, so that there the weights go through shared memory
    and products are added in registers. ``ahead``: None = what was tuned, or ``ahead_for``."""

    thread_blocks: int = NUM_SMS
    interpret: Any = None
    ahead: Ahead | None = None


class Operands(NamedTuple):
    """Arrays, and in the kernel references to them. ``q`` [K,R,H]: rows are token * group + head; ``k``, ``v``
    [block,K,block_size,H]; ``tables`` [S,B]; ``visible`` [R]: how many keys each row sees."""

    q: Any
    k: Any
    v: Any
    tables: Any
    visible: Any


class Scratch(NamedTuple):
    """Shared memory, and its barriers: ``full`` when it is filled, ``free`` when all have read it; ``turn``: whose turn
    it is to have the tensor cores. ``probs``: see ``Config``; ``out``, ``lse``: where not all rows are kept."""

    q: Any
    k: Any
    v: Any
    probs: Any
    out: Any
    lse: Any
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    turn: Any


class Refs(NamedTuple):
    """Of a running kernel: arrays in global memory, [K,W,R,H] and [K,W,R] of results, and scratch."""

    inputs: Operands
    items: Any
    total: Any
    out: Any
    lse: Any
    scratch: Scratch


@dataclass(frozen=True)
class Call:
    """Static facts of one call of the kernel. ``warpgroups``: that compute; ``kept_rows``: the first of each item's
    rows; the others are those of somebody else, computed for nothing."""

    warpgroups: int
    kept_rows: int
    shape: Shape
    scoring: Scoring
    config: Config

    @property
    def keeps_all(self) -> bool:
        return self.kept_rows == self.warpgroups * ROWS


def _run(call: Call, operands: Operands, work: Work) -> tuple[Array, Array]:
    """Partial results of all items [K,W,R,H] and their log-sum-exp [K,W,R], float32; R = ``call.kept_rows``."""
    kv_heads, head_dim = operands.q.shape[0], operands.q.shape[2]
    partials = (kv_heads, work.items.shape[0], call.kept_rows)
    kernel = plgpu.kernel(
        partial(_thread_block, call),
        out_type=(
            jax.ShapeDtypeStruct((*partials, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        grid=(call.config.thread_blocks,),
        grid_names=("block",),
        num_threads=call.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="paged_attention_" + ("decode" if call.warpgroups == 1 else "prefill"),
        scratch_types=_scratch(call, operands),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
        interpret=call.config.interpret,
    )
    return kernel(*operands, work.items, work.total)


@dataclass(frozen=True)
class Ahead:
    """Keys of a tile, and the tiles of K and of V that are loaded or under way."""

    keys: int
    stages: int


def ahead_for(kind: Kind, head_dim: int) -> Ahead:
    keys = 128 if head_dim <= 128 else 64
    return Ahead(keys, min(MAX_STAGES, _room(kind, head_dim) // (2 * keys * head_dim * 2)))


def _room(kind: Kind, head_dim: int) -> int:
    """Bytes of shared memory beside the queries and, of a decoding item, the results."""
    groups = 1 if kind == "decode" else WARPGROUPS
    results = ROWS * (head_dim + 1) * 4 if kind == "decode" else 0
    return SHARED_BYTES - groups * ROWS * head_dim * 2 - results


def _refuses_ahead(shape: Mapping[str, str], ahead: Ahead) -> str | None:
    kind, head_dim = shape["kind"], int(shape["head_dim"])
    if kind not in ("decode", "prefill") or ahead.keys not in (64, 128):
        return f"kind={kind}, keys={ahead.keys}: decode or prefill, with 64 or 128 keys"
    needed, room = ahead.stages * 2 * ahead.keys * head_dim * 2, _room(kind, head_dim)
    return f"keys and stages need {needed:,} bytes of shared memory, and {room:,} are left" if needed > room else None


TUNED = tuning.read("paged_attention/mosaic", Ahead, ("kind", "head_dim"), _refuses_ahead)


def _scratch(call: Call, operands: Operands) -> Scratch:
    head_dim, dtype = operands.q.shape[2], operands.q.dtype
    groups = call.warpgroups
    kind: Kind = "decode" if groups == 1 else "prefill"
    ahead = call.config.ahead or TUNED.get(kind=kind, head_dim=head_dim) or ahead_for(kind, head_dim)
    tile, stages = ahead.keys, ahead.stages

    def barriers(arrivals: int) -> plgpu.Barrier:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    copies = tile // min(tile, call.shape.block_size)
    return Scratch(
        q=_matrices(groups * ROWS, head_dim, dtype=dtype),
        k=_matrices(stages, tile, head_dim, dtype=dtype),
        v=_matrices(stages, tile, head_dim, dtype=dtype),
        probs=None if call.config.interpret is None else _matrices(groups, ROWS, tile, dtype=dtype),
        out=None if call.keeps_all else _matrices(ROWS, head_dim, dtype=jnp.float32),
        lse=None if call.keeps_all else plgpu.SMEM((ROWS,), jnp.float32),
        q_full=plgpu.Barrier(),
        q_free=plgpu.Barrier(num_arrivals=groups),
        k_full=barriers(copies),
        k_free=barriers(groups),
        v_full=barriers(copies),
        v_free=barriers(groups),
        turn=plgpu.Barrier(num_arrivals=groups),
    )


def _matrices(*dims: int, dtype: Any) -> Any:
    """Shared memory that TMA, wgmma and the threads of a warpgroup reach without meeting in a bank: tiles of 8 rows,
    as wide as the swizzle."""
    columns = _tile_columns(dims[-1], dtype)
    swizzle = columns * jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((TILING, columns))  # pyright: ignore[reportAbstractUsage]
    swizzling = plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(dims, dtype, transforms=(tiling, swizzling))


def _tile_columns(columns: int, dtype: Any) -> int:
    """Numbers of the widest swizzle that divides rows of so many."""
    itemsize = jnp.dtype(dtype).itemsize
    return plgpu.find_swizzle(columns * itemsize * 8) // itemsize


def _thread_block(call: Call, *refs: Any) -> None:
    inputs, (items, total, out, lse, *scratch) = Operands(*refs[:5]), refs[5:]
    running = Refs(inputs, items, total, out, lse, Scratch(*scratch))
    me = lax.axis_index("warpgroup")

    @pl.when(me < call.warpgroups)
    def compute() -> None:
        if call.warpgroups > 1:
            plgpu.set_max_registers(MANY, action="increase")
        _for_items(call, running, partial(_compute, call, running, me))
        if not call.keeps_all:
            plgpu.wait_smem_to_gmem(0)

    @pl.when(me == call.warpgroups)
    def copy() -> None:
        if call.warpgroups > 1:
            plgpu.set_max_registers(FEW, action="decrease")
        _copy_all(call, running)


def _for_items(call: Call, refs: Refs, do: Callable[[Array, Item, Array, Array], Array]) -> Array:
    """``do(number, item, kv_head, step) -> step`` for every item of every head that falls to this thread block: they
    are dealt out to and fro, so that all get as much. ``step`` counts tiles of keys; the last one is returned."""
    me, blocks = lax.axis_index("block"), jnp.int32(call.config.thread_blocks)
    heads = jnp.int32(refs.inputs.q.shape[0])
    count = refs.total[0] * heads

    def position(turn: Array) -> Array:
        return turn * blocks + jnp.where(lax.rem(turn, jnp.int32(2)) == 0, me, blocks - 1 - me)

    def one(turn: Array, step: Array) -> Array:
        index = position(turn)
        at = lax.div(index, heads)
        item = Item(*(refs.items[at, column] for column in range(len(Item._fields))))
        return do(turn, item, lax.rem(index, heads), step)

    whole = lax.div(count, blocks)
    turns = whole + jnp.where(position(whole) < count, jnp.int32(1), jnp.int32(0))
    return lax.fori_loop(jnp.int32(0), turns, one, jnp.int32(0))


def _num_tiles(item: Item, tile: int) -> Array:
    return lax.div(item.end - item.begin + (tile - 1), jnp.int32(tile))


# -- the warpgroup that copies -----------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """What one warp copies: K or V. ``cache`` in global memory, ``buffer`` in shared memory, and its barriers."""

    cache: Any
    buffer: Any
    full: Any
    free: Any


def _copy_all(call: Call, refs: Refs) -> None:
    """One warp copies queries and K, another V. A warp each, because all threads that run a copy arrive at its barrier:
    with a warpgroup and blocks of 16 tokens, 1,024 times for a tile, and the warpgroup would meet for every copy."""
    scratch = refs.scratch
    k = Stream(refs.inputs.k, scratch.k, scratch.k_full, scratch.k_free)
    v = Stream(refs.inputs.v, scratch.v, scratch.v_full, scratch.v_free)

    def one_warp(warp: Array) -> None:
        @pl.when(warp == 0)
        def queries_and_keys() -> None:
            steps = _for_items(call, refs, partial(_copy_queries_and, call, refs, k))
            _drain(k, steps)

            @pl.when(steps > 0)
            def wait() -> None:
                plgpu.barrier_wait(scratch.q_free)

        @pl.when(warp == 1)
        def values() -> None:
            _drain(v, _for_items(call, refs, partial(_copy, call, refs, v)))

    plgpu.warp_map(one_warp)


def _copy_queries_and(
    call: Call, refs: Refs, stream: Stream, number: Array, item: Item, head: Array, step: Array
) -> Array:
    scratch = refs.scratch

    @pl.when(number > 0)
    def wait() -> None:
        plgpu.barrier_wait(scratch.q_free)

    rows = refs.inputs.q.at[head, pl.ds(item.row, call.kept_rows)]
    plgpu.copy_gmem_to_smem(rows, scratch.q.at[pl.ds(0, call.kept_rows)], scratch.q_full)
    return _copy(call, refs, stream, number, item, head, step)


def _copy(call: Call, refs: Refs, stream: Stream, number: Array, item: Item, head: Array, step: Array) -> Array:
    """The item's tiles of K or V."""
    stages, tile, _ = stream.buffer.shape
    size = call.shape.block_size
    unit = min(tile, size)

    def blocks(n: Array) -> tuple[Array, ...]:
        """Of a tile. Where nobody sees a key, any block of the sequence that somebody sees."""
        at = [item.begin + (n * tile + j * unit) for j in range(tile // unit)]
        seen = (jnp.minimum(jnp.maximum(p, item.first), item.end - 1) for p in at)
        return tuple(refs.inputs.tables[item.sequence, lax.div(p, jnp.int32(size))] for p in seen)

    def one_tile(n: Array, carry: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        step, of_tile = carry
        following = blocks(n + 1)  # asked for a tile ahead: it takes as long as a copy
        slot = lax.rem(step, jnp.int32(stages))
        offset = lax.rem(item.begin + n * tile, jnp.int32(size))

        @pl.when(step >= stages)
        def wait() -> None:
            plgpu.barrier_wait(stream.free.at[slot])

        for j, block in enumerate(of_tile):
            whole = stream.cache.at[block, head]
            source = whole if size <= tile else whole.at[pl.ds(offset, tile)]
            plgpu.copy_gmem_to_smem(source, stream.buffer.at[slot, pl.ds(j * unit, unit)], stream.full.at[slot])
        return step + 1, following

    start = (step, blocks(jnp.int32(0)))
    return lax.fori_loop(jnp.int32(0), _num_tiles(item, tile), one_tile, start)[0]


def _drain(stream: Stream, steps: Array) -> None:
    """Wait until everything that was copied has been read."""
    for slot in range(stream.buffer.shape[0]):

        @pl.when(steps > slot)
        def wait(slot: int = slot) -> None:
            plgpu.barrier_wait(stream.free.at[slot])


# -- the warpgroups that compute ---------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """Under way: values [ROWS,H], maximum and sum [ROWS]; in powers of two. ``step`` counts tiles of keys."""

    values: Array
    top: Array
    total: Array
    step: Array


MATRIX = plgpu.Layout.WGMMA
ROW = MATRIX.reduce(1)


def _compute(call: Call, refs: Refs, me: Array, number: Array, item: Item, head: Array, step: Array) -> Array:
    scratch = refs.scratch
    tile, head_dim = scratch.k.shape[1:]
    visible = plgpu.load(refs.inputs.visible.at[pl.ds(item.row + me * ROWS, ROWS)], layout=ROW, optimized=False)
    so_far = Softmax(
        plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
        step,
    )
    plgpu.barrier_wait(scratch.q_full)
    masked, plain = (partial(_attend_tile, call, refs, me, item, seen) for seen in (visible, None))
    count = _num_tiles(item, tile)
    start = jnp.int32(0)
    _pass_turn(call, scratch, me == 1)
    if call.shape.window is not None:
        start = jnp.minimum(lax.div(jnp.maximum(item.low - item.begin, 0) + (tile - 1), jnp.int32(tile)), count)
        so_far = lax.fori_loop(jnp.int32(0), start, masked, so_far)
    stop = jnp.minimum(lax.div(jnp.maximum(item.high - item.begin, 0), jnp.int32(tile)), count)
    stop = jnp.maximum(stop, start)
    so_far = lax.fori_loop(start, stop, plain, so_far)
    so_far = lax.fori_loop(stop, count, masked, so_far)
    _pass_turn(call, scratch, me == 0)
    plgpu.barrier_arrive(scratch.q_free)
    _store(call, refs, me, head, item.slot, so_far)
    return so_far.step


def _pass_turn(call: Call, scratch: Scratch, when: Array) -> None:
    """Of two warpgroups, the second runs half a tile behind the first."""
    if call.warpgroups == 1:
        return

    @pl.when(when)
    def pass_it() -> None:
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.turn)


def _attend_tile(
    call: Call, refs: Refs, me: Array, item: Item, visible: Array | None, n: Array, so_far: Softmax
) -> Softmax:
    """One tile of keys. ``visible`` [ROWS]: how many keys each row sees; None if all see the whole tile."""
    scratch = refs.scratch
    stages, tile, _ = scratch.k.shape
    slot = lax.rem(so_far.step, jnp.int32(stages))
    begin = item.begin + n * tile
    if visible is not None:  # before the scores take up registers
        plgpu.barrier_wait(scratch.v_full.at[slot])
        # A block that stands for those before ``first`` has keys that were never written only if it is the sequence's
        # last one, in which only a window shorter than a block begins.
        short = call.shape.window is not None and call.shape.window < call.shape.block_size
        _clear_unseen(scratch, me, slot, item.first - begin if short else None, item.end - begin)
    plgpu.barrier_wait(scratch.k_full.at[slot])
    scores, factor = _scores(call, scratch, me, slot)
    plgpu.barrier_arrive(scratch.k_free.at[slot])
    if visible is not None:
        scores = _masked(scores, visible, begin, call.shape.window)
    top = jnp.maximum(so_far.top, scores.max(axis=1) * factor)
    keep = jnp.exp2(so_far.top - top)
    probs = jnp.exp2(scores * factor - _across(top, scores))
    total = so_far.total * keep + probs.sum(axis=1)
    values = so_far.values * _across(keep, so_far.values)
    # What was computed before the turn is passed must not be put off until after.
    values, top, total, probs = lax.optimization_barrier((values, top, total, probs.astype(scratch.k.dtype)))
    if visible is None:
        plgpu.barrier_wait(scratch.v_full.at[slot])
    if call.warpgroups > 1:
        plgpu.barrier_arrive(scratch.turn)
        plgpu.barrier_wait(scratch.turn)
    values = _plus_weighted(call, scratch, me, slot, values, probs)
    plgpu.barrier_arrive(scratch.v_free.at[slot])
    return Softmax(values, top, total, so_far.step + 1)


def _across(x: Array, like: Array) -> Array:
    """One number a row -> a matrix."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _scores(call: Call, scratch: Scratch, me: Array, slot: Array) -> tuple[Array, float]:
    """[ROWS,tile], and what they are to be multiplied by: to the base of two."""
    # Else the addresses of all parts of the queries are kept in registers from item to item, and others are spilled.
    row = lax.optimization_barrier(me * ROWS)

    def product(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, scratch.q.at[pl.ds(row, ROWS)], scratch.k.at[slot].T)
        if call.warpgroups > 1:
            plgpu.barrier_arrive(scratch.turn)
            plgpu.barrier_wait(scratch.turn)
        return accumulator[...]

    scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, scratch.k.shape[1]), jnp.float32))
    scale, cap = call.scoring.scale * call.scoring.k_scale, call.scoring.softcap
    if cap is None:
        return scores, scale * LOG2_E
    # tanh(x) = 1 - 2 / (exp(2x) + 1): the approximate instruction is right to 2^-11 only
    return 1.0 - 2.0 / (jnp.exp2(scores * (2 * LOG2_E * scale / cap)) + 1.0), cap * LOG2_E


def _masked(scores: Array, visible: Array, begin: Array, window: int | None) -> Array:
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    ahead = _across(visible - begin, scores) - key
    seen = ahead > 0
    if window is not None:
        seen &= ahead <= window
    return jnp.where(seen, scores, MASKED)


def _clear_unseen(scratch: Scratch, me: Array, slot: Array, first: Array | None, end: Array) -> None:
    """Of a tile of V, zero the keys before ``first`` and from ``end`` on: it may be NaN what they hold, and 0 * NaN is
    NaN. The first warpgroup does it for both: the other one runs half a tile behind. Piece by piece, or registers are
    spilled."""
    tile, head_dim = scratch.v.shape[1:]
    columns = _tile_columns(head_dim, scratch.v.dtype)

    some = end < tile if first is None else (end < tile) | (first > 0)

    @pl.when(some & (me == 0))
    def clear() -> None:
        @pl.loop(0, tile // ROWS)
        def of_rows(i: Array) -> None:
            start = pl.multiple_of(i * ROWS, ROWS)

            @pl.loop(0, head_dim // columns)
            def of_columns(j: Array) -> None:
                piece = scratch.v.at[slot, pl.ds(start, ROWS), pl.ds(pl.multiple_of(j * columns, columns), columns)]
                values = plgpu.load(piece, layout=MATRIX)
                key = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=MATRIX) + start
                seen = key < end if first is None else (key < end) & (key >= first)
                piece[...] = jnp.where(seen, values, jnp.zeros_like(values))

        plgpu.commit_smem()


def _plus_weighted(call: Call, scratch: Scratch, me: Array, slot: Array, values: Array, probs: Array) -> Array:
    """values [ROWS,H] + probs [ROWS,tile] @ V [tile,H]."""
    start: Any = plgpu.WGMMAAccumulatorRef((ROWS, scratch.v.shape[2]), jnp.float32)
    if call.config.interpret is None:
        return pl.run_state(lambda sums: plgpu.wgmma(sums, probs, scratch.v.at[slot]))(start.init(values))
    scratch.probs[me] = probs
    plgpu.commit_smem()

    def product(sums: Any) -> Array:
        plgpu.wgmma(sums, scratch.probs.at[me], scratch.v.at[slot])
        return sums[...]

    return values + pl.run_scoped(product, start)


def _store(call: Call, refs: Refs, me: Array, head: Array, slot: Array, done: Softmax) -> None:
    scratch = refs.scratch
    out = done.values * _across(call.scoring.v_scale / jnp.maximum(done.total, 1e-30), done.values)
    lse = jnp.where(done.total > 0.0, done.top / LOG2_E + jnp.log(done.total), MASKED)
    if call.keeps_all:
        rows = pl.ds(me * ROWS, ROWS)
        refs.out[head, slot, rows] = out
        refs.lse[head, slot, rows] = lse
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    scratch.out[...] = out
    scratch.lse[...] = lse
    plgpu.commit_smem()
    kept = pl.ds(0, call.kept_rows)
    plgpu.copy_smem_to_gmem(scratch.out.at[kept], refs.out.at[head, slot])
    plgpu.copy_smem_to_gmem(scratch.lse.at[kept], refs.lse.at[head, slot])


# -- attention ---------------------------------------------------------------------------------------------------------


def attend(
    config: Config, q: Array, k_cache: Array, v_cache: Array, plan: Plan, shape: Shape, scoring: Scoring
) -> tuple[Array, Array]:
    if scoring.scale * scoring.k_scale <= 0:
        raise ValueError(f"scores are scaled by {scoring.scale} * {scoring.k_scale}: it must be positive")
    num_tokens, _, group, _ = q.shape
    ragged, num_seqs = plan.ragged, plan.ragged.kv_lens.shape[0]
    q = q.astype(k_cache.dtype)
    call = Call(1, -(-group // TILING) * TILING, shape, scoring, config)
    decoded = _decode(call, q, k_cache, v_cache, plan)
    if shape.one_token_each:
        return decoded
    call = replace(call, warpgroups=WARPGROUPS, kept_rows=TILE_ROWS)
    operands = _operands(q, k_cache, v_cache, ragged.block_tables, ragged.visible)
    t = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.minimum(_count(t, ragged.cu_q_lens[1:]), num_seqs - 1)
    start, end = _take(ragged.cu_q_lens, sequence), _take(ragged.cu_q_lens, sequence + 1)
    prefilled = _prefill(call, operands, ragged, sequence, group)
    real, single = (x[:, None, None] for x in (t < ragged.cu_q_lens[-1], end - start == 1))
    out, lse = (
        jnp.where(single.reshape(-1, *[1] * (several.ndim - 1)), _take(one, sequence), several)
        for one, several in zip(decoded, prefilled, strict=True)
    )
    return jnp.where(real[..., None], out, 0.0), jnp.where(real, lse, MASKED)


def _operands(q: Array, k_cache: Array, v_cache: Array, tables: Array, visible: Array) -> Operands:
    """``q`` [N,K,G,H], of tokens that see ``visible`` [N] keys."""
    num_tokens, kv_heads, group, head_dim = q.shape
    rows = jnp.moveaxis(q, 0, 1).reshape(kv_heads, num_tokens * group, head_dim)
    padding = TILE_ROWS + -num_tokens * group % TILING  # no tile reaches past it, and TMA wants whole tilings
    rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0)))
    return Operands(rows, k_cache, v_cache, tables, jnp.pad(jnp.repeat(visible, group), (0, padding)))


def _decode(call: Call, q: Array, k_cache: Array, v_cache: Array, plan: Plan) -> tuple[Array, Array]:
    """Output [S,K,G,H] and log-sum-exp [S,K,G] of the sequences that have one token; zero and nothing of others. Their
    queries are laid out anew, padded to groups of ``call.kept_rows`` heads."""
    ragged, group = plan.ragged, q.shape[2]
    num_seqs, token = ragged.kv_lens.shape[0], ragged.cu_q_lens[:-1]
    padded = jnp.pad(_take(q, token), ((0, 0), (0, 0), (0, call.kept_rows - group), (0, 0)))
    operands = _operands(padded, k_cache, v_cache, ragged.block_tables, _take(ragged.visible, token))
    work = plan.decode._replace(items=plan.decode.items.at[:, Item._fields.index("row")].multiply(call.kept_rows))
    tile = jnp.broadcast_to(jnp.arange(num_seqs, dtype=jnp.int32)[:, None], (num_seqs, group))
    row = jnp.broadcast_to(jnp.arange(group, dtype=jnp.int32)[None], (num_seqs, group))
    most = _most_items("decode", ragged, num_seqs, call.shape)
    return _merge(_run(call, operands, work), work, most, tile, row)


def _prefill(call: Call, operands: Operands, ragged: Ragged, sequence: Array, group: int) -> tuple[Array, Array]:
    """Output [T,K,G,H] and log-sum-exp [T,K,G] of the tokens of sequences [T] that have several; anything of others."""
    num_tokens = sequence.shape[0]
    tiles, first_tile = prefill_tiles(ragged, num_tokens, group, call.shape)
    most = _most_items("prefill", ragged, tiles.row.shape[0], call.shape)
    work = _cut("prefill", tiles, most)
    token = jnp.arange(num_tokens, dtype=jnp.int32) - _take(ragged.cu_q_lens, sequence)
    before = _take(ragged.cu_q_lens, sequence) * group % TILING  # rows of other sequences in its first tile
    row = (before + token * group)[:, None] + jnp.arange(group, dtype=jnp.int32)[None]
    tile = _take(first_tile, sequence)[:, None] + row // TILE_ROWS
    return _merge(_run(call, operands, work), work, most, tile, row % TILE_ROWS)


def _merge(partials: tuple[Array, Array], work: Work, most: int, tile: Array, row: Array) -> tuple[Array, Array]:
    """Rows ``row`` of tiles ``tile`` (both [N,G]) from the partial results [K,W,R,H] and their log-sum-exp [K,W,R] of
    at most ``most`` items a tile -> [N,K,G,H], [N,K,G]; zero and nothing of tiles without items."""
    out, lse = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in partials)
    part = jnp.arange(most, dtype=jnp.int32)[None, None]
    live = part < _take(work.counts, tile)[..., None]
    slot = _take(work.slots, tile)[..., None] + jnp.where(live, part, 0)
    at, live = slot * partials[0].shape[2] + row[..., None], live[None]
    parts = jnp.where(live, lse.at[:, at].get(mode="clip"), MASKED)
    top = jnp.max(parts, axis=-1, keepdims=True)
    weights = jnp.where(live, jnp.exp(parts - top), 0.0)
    total = jnp.maximum(jnp.sum(weights, axis=-1), 1e-30)
    values = jnp.where(live[..., None], weights[..., None] * out.at[:, at].get(mode="clip"), 0.0)
    merged = jnp.sum(values, axis=3) / total[..., None]
    merged_lse = jnp.where(live[..., 0], top[..., 0] + jnp.log(total), MASKED)
    return jnp.moveaxis(merged, 0, 1), jnp.moveaxis(merged_lse, 0, 1)


# -- the implementation ------------------------------------------------------------------------------------------------


def refuses(setting: Setting) -> str | None:
    if setting.platform != "gpu" or setting.capability != HOPPER:
        return "it is for GPUs of compute capability 9.0 (Hopper)"
    if setting.dtype not in DTYPES or setting.kv_dtype != setting.dtype:
        return f"queries and caches must both be {' or both '.join(DTYPES)}"
    if setting.head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}"
    if setting.group > ROWS:
        return f"at most {ROWS} query heads may share a KV head"
    if setting.block_size not in BLOCK_SIZES and setting.block_size % ALIGNMENT:
        return f"block_size must be {', '.join(map(str, BLOCK_SIZES))} or a multiple of {ALIGNMENT}"
    return None


def make(config: Config) -> PagedAttention:
    writes = kv_write.IMPLEMENTATION if config.interpret is None else kv_write.INTERPRETED
    return PagedAttention("mosaic", cache_shapes, writes, plan, partial(attend, config), refuses)


IMPLEMENTATION = make(Config())
