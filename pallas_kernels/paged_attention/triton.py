"""Paged attention in the style of Triton, for NVIDIA GPUs from Ampere on: one kernel for decodes, drafts and prompts.

The plan cuts a step into items: a tile of query tokens of one sequence, and a run of keys that it sees. What is
parallel is (item, KV head, some heads of its group); each program is flash attention over its item's keys, which it
gathers through the block table, several blocks a turn. The rows of its products are tokens times heads of the group,
so that all of them share each K and V that is loaded.

Runs of keys are as long as lets all the sequences' keys together fill the GPU (flash decoding): one long sequence
beside many short ones becomes many items, not one slow one. Items that have their tile to themselves write the output;
the others write partial results, which a second kernel merges by their log-sum-exp. A kernel and not XLA: XLA would
merge the worst case's items, this one those that there are.

How many items there are is known on the device only, so a grid has room for the most, and programs without an item
return at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.kv_write import triton as kv_write
from pallas_kernels.paged_attention import CacheShapes, PagedAttention, Ragged, Scoring, Setting, Shape
from pallas_kernels.triton_tiles import addresses, check_offsets, lacks_shared_memory

AMPERE, ADA = (8, 0), (8, 9)
WIDE_DTYPES, NARROW_DTYPES = ("float32", "bfloat16", "float16"), ("float8_e4m3fn", "int8")
MASKED = -1e30
"""Instead of -inf as the maximum of no scores: a row that sees nothing must not turn into NaN."""
LOG2_E = math.log2(math.e)
"""Softmax is computed in powers of two, which the hardware has."""
LEAST = 16
"""Rows, columns and depth of the smallest product on tensor cores."""
SHARED_KIB = 130
"""Shared memory of the largest program, as compiled."""
MERGE_ELEMENTS = 8192
"""Of partial outputs that one turn of the merging kernel loads: 32 float32 registers in each thread of 8 warps."""


# -- sizes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Sizes of the attention kernel; powers of two."""

    heads: int
    """Query heads of a group that one program computes: its rows are these times the query tokens of its item."""
    keys: int
    """That it loads a turn."""
    num_warps: int
    num_stages: int
    """Of the loop over keys, as Triton counts them: see ``Cut``."""


@dataclass(frozen=True)
class Cut:
    """How the plan cuts up the work of some of the sequences."""

    tokens: int
    """Query tokens of an item; a power of two."""
    parts: int
    """Runs of keys, besides one per tile of query tokens, that there is room for: enough to fill a GPU."""
    unit: int = 64
    """Runs of keys are multiples of it."""
    min_keys: int = 256
    """Of a run, if its tile has more than one: partial results are traffic too, 2 * group / keys of the K and V that
    they are of, counting float32 results, written and read, against 16-bit keys."""
    num_stages: int = 5
    """Of the loop over keys. Loads through a table take stages of their own: with 3 and 4 what is loaded is waited for
    at once (PTX: ``cp.async.wait_group 0`` before the products), with 5 the next turn's K and V are under way."""
    tile: Tile | None = None
    """None = ``_tile_of``."""

    @property
    def min_units(self) -> int:
        return max(1, self.min_keys // self.unit)


@dataclass(frozen=True)
class Tiling:
    """A tuner may find better ones."""

    decode: Cut = Cut(tokens=1, parts=256)
    """Where every sequence has one token. 256 parts: two for each of an H200's 132 SMs, even of one KV head."""
    few: Cut = Cut(tokens=8, parts=128)
    """Sequences of at most ``few.tokens`` tokens in a mixed step: decodes and drafts."""
    many: Cut = Cut(tokens=64, parts=32, min_keys=1024)
    """Prompt chunks. They are cut along the keys only where there are few tiles of tokens with a long past."""


def tile_for(
    head_dim: int, group: int, dtype: str, tokens: int, kv_dtype: str | None = None, num_stages: int = 5
) -> Tile:
    """The sizes for queries of ``dtype`` in items of ``tokens`` tokens. ``kv_dtype``: of the cache; None = ``dtype``.

    Rows: all the group's heads if tokens are few, but at most 64; with many tokens 128, because each key is loaded
    once for all rows, and 64 where head_dim is over 128 or the cache int8. The accumulator has rows * head_dim
    float32: at most 32 registers of a thread in 4 warps, 64 in 8. (64 rows in 4 warps spill on an A100.) fp8 is widened
    in registers, and that by 8 warps: as many programs as a plan has leave an SM room for them, and in 4 a few cases
    spill.
    Keys: 64, as long as that keeps the loads under way within the shared memory of an A100 (163 KiB) for two programs
    of a decode or one of a prompt chunk. K and V of a turn are 32 KiB; with 5 stages a decode has 70 KiB in all, a
    prompt chunk 130.
    """
    width, kv_dtype = padded(head_dim), kv_dtype or dtype
    exact = operand_dtype(jnp.dtype(dtype), jnp.dtype(kv_dtype)) == jnp.float32
    narrow = tokens < LEAST
    most_rows = LEAST if exact else 64 if narrow or width > 128 or kv_dtype == "int8" else 128
    heads = max(1, LEAST // tokens, min(_power_of_2(group), most_rows // tokens))
    if exact:
        return _exact_tile(heads, heads * tokens, width, kv_dtype == "float32")
    keys = min(64, 64 * 128 // width)
    in_four = heads * tokens <= 32 and heads * tokens * width <= 32 * 128 and kv_dtype != "float8_e4m3fn"
    if (dtype, kv_dtype) == ("float16", "int8") and head_dim != width:
        keys //= 2  # masks of columns take registers too: 64 keys spill on an A100, and for three heads on an H100
    num_warps = 4 if in_four else 8
    if kv_dtype == "int8" and narrow and tokens > 1 and width > 128:
        num_warps = 16  # with jax 0.12, 8 spill
    return Tile(heads, keys, num_warps, num_stages)


def _exact_tile(heads: int, rows: int, width: int, as_it_is: bool) -> Tile:
    """For products of float32, of which no tensor core is exact enough: they are unrolled multiply-adds, and only small
    tiles keep these in registers. A thread has as many accumulators as ptxas (13.0, for A100 and H100) keeps without
    spills: 8, or 16 of tiles under 4,096 that go into the product ``as_it_is``; of prompts, 8 of 128 columns and 32 of
    256. Loads are under way while a turn is computed where they are few and as they are: else what was loaded ahead
    spills, up to 11 KB a thread. Programs without it use so few registers (66 instead of 255 in a decode with a
    bfloat16 cache) that others run meanwhile."""
    if rows * width <= 32 * 128:
        sums = 16 if as_it_is and rows * width < 32 * 128 else 8
        num_warps = max(4, rows * width // (32 * sums))
        return Tile(heads, LEAST, num_warps, 2 if as_it_is and width <= 128 else 1)
    return Tile(heads, LEAST, 32 if width <= 128 else 16, 1)


def _refuses_tile(shape: Mapping[str, str], tile: Tile) -> str | None:
    if min(tile.heads * int(shape["tokens"]), tile.keys) < LEAST:
        return f"heads * tokens and keys are at least {LEAST}"
    return tuning.powers_of_two(tile, "heads", "keys", "num_warps")


TUNED = tuning.read("paged_attention/triton", Tile, ("tokens", "head_dim", "group", "dtype", "kv_dtype"), _refuses_tile)


def _tile_of(cut: Cut, q: Array, cache: Array) -> Tile:
    """The cut's own, or what was tuned, or ``tile_for``."""
    dtype, kv_dtype, group, head_dim = str(q.dtype), str(cache.dtype), q.shape[2], q.shape[3]
    if cut.tile is not None:
        return cut.tile
    shape = {"tokens": cut.tokens, "head_dim": head_dim, "group": group, "dtype": dtype, "kv_dtype": kv_dtype}
    return TUNED.get(**shape) or tile_for(head_dim, group, dtype, cut.tokens, kv_dtype, cut.num_stages)


def padded(head_dim: int) -> int:
    """Arrays inside a kernel have powers of two for sizes."""
    return max(LEAST, _power_of_2(head_dim))


def _power_of_2(n: int) -> int:
    """The smallest that is not less."""
    return 1 << (n - 1).bit_length()


# -- the cache ---------------------------------------------------------------------------------------------------------


def cache_shapes(num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> CacheShapes:
    """Both [block, kv_head, token, head_dim]: a head's tokens in a block lie together, and so does what a thread
    loads at once."""
    shape = (num_blocks, kv_heads, block_size, head_dim)
    return shape, shape


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


# -- the plan ----------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Query tokens of one sequence. All int32 [N]. ``row`` and ``row_end``: its rows (none: a dead one); ``low`` and
    ``high``: the keys that any of them sees."""

    sequence: Array
    row: Array
    row_end: Array
    low: Array
    high: Array


class Items(NamedTuple):
    """A tile and a run of its keys. All int32 [W]; dead ones (behind the others) have no rows. ``slot``: where its
    partial result goes; -1: its tile has no other item, and it writes the output."""

    sequence: Array
    row: Array
    row_end: Array
    low: Array
    high: Array
    slot: Array


class Merges(NamedTuple):
    """A tile with several items. All int32 [M]; dead ones have no rows. ``slot``: of its first item; ``num_items``:
    how many it has."""

    row: Array
    row_end: Array
    slot: Array
    num_items: Array


class Work(NamedTuple):
    items: Items
    merges: Merges | None
    """None where tables are too short for a tile to have several items."""


class Plan(NamedTuple):
    """``tables`` [S, B], ``visible`` [T] as in ``Ragged``; ``attended`` [T]: whether a token sees anything; ``works``:
    of each of the step's cuts."""

    tables: Array
    visible: Array
    attended: Array
    works: tuple[Work, ...]


def cuts(tiling: Tiling, shape: Shape) -> tuple[Cut, ...]:
    return (tiling.decode,) if shape.one_token_each else (tiling.few, tiling.many)


def plan(ragged: Ragged, num_tokens: int, shape: Shape, tiling: Tiling) -> Plan:
    starts, ends = ragged.cu_q_lens[:-1], ragged.cu_q_lens[1:]
    q_lens = ends - starts
    sequences = jnp.arange(q_lens.shape[0], dtype=jnp.int32)
    first, *rest = cuts(tiling, shape)
    tiles = [(sequences, starts, jnp.where(q_lens <= first.tokens, ends, starts))]
    tiles += [_tiles_of_many(starts, jnp.where(q_lens > first.tokens, q_lens, 0), num_tokens, first, c) for c in rest]
    works = tuple(
        _work(_with_keys(*rows, ragged.visible, shape), ragged.block_tables.shape[1] * shape.block_size, cut)
        for rows, cut in zip(tiles, (first, *rest), strict=True)
    )
    attended = (jnp.arange(num_tokens) < ends[-1]) & (ragged.visible > 0)
    return Plan(ragged.block_tables, ragged.visible, attended, works)


def _tiles_of_many(starts: Array, q_lens: Array, num_tokens: int, few: Cut, cut: Cut) -> tuple[Array, Array, Array]:
    """Sequence, first row and row end of every tile of the sequences with more tokens than ``few`` has; q_lens of the
    others are 0."""
    tiles = -(-q_lens // cut.tokens)
    ends = jnp.cumsum(tiles)
    most = num_tokens // cut.tokens + min(q_lens.shape[0], num_tokens // (few.tokens + 1))
    i = jnp.arange(max(1, most), dtype=jnp.int32)
    sequence = jnp.minimum(_rank(i, ends), q_lens.shape[0] - 1)
    row = _take(starts, sequence) + (i - _take(ends - tiles, sequence)) * cut.tokens
    row_end = jnp.minimum(row + cut.tokens, _take(starts + q_lens, sequence))
    return sequence, row, jnp.where(i < ends[-1], row_end, row)


def _with_keys(sequence: Array, row: Array, row_end: Array, visible: Array, shape: Shape) -> Tiles:
    high = jnp.where(row_end > row, _take(visible, row_end - 1), 0)
    low = jnp.zeros_like(high) if shape.window is None else jnp.maximum(_take(visible, row) - shape.window, 0)
    return Tiles(sequence, row, row_end, jnp.minimum(low, high), high)


def _work(tiles: Tiles, max_keys: int, cut: Cut) -> Work:
    """Every tile's keys in runs of one length, in units: the shortest of which no more than ``cut.parts`` are full."""
    first = tiles.low // cut.unit
    units = -(-tiles.high // cut.unit) - first
    length = jnp.maximum(-(-jnp.sum(units) // cut.parts), cut.min_units)
    count = -(-units // length)
    several = jnp.where(count > 1, count, 0)
    ends, slot_ends = jnp.cumsum(count), jnp.cumsum(several)

    can_be_cut = -(-max_keys // cut.unit) > cut.min_units
    # In a sequence the last tile sees most keys: it goes first.
    w = ends[-1] - 1 - jnp.arange(count.shape[0] + (cut.parts if can_be_cut else 0), dtype=jnp.int32)
    tile = jnp.minimum(_rank(w, ends), count.shape[0] - 1)
    sequence, row, row_end, low, high = (_take(x, tile) for x in tiles)
    i = w - _take(ends - count, tile)
    start = _take(first, tile) + i * length
    items = Items(
        sequence,
        row,
        jnp.where(w >= 0, row_end, row),
        jnp.maximum(low, start * cut.unit),
        jnp.minimum(high, (start + length) * cut.unit),
        jnp.where(_take(several, tile) > 0, _take(slot_ends - several, tile) + i, -1),
    )
    return Work(items, _merges(tiles, several, slot_ends - several, cut) if can_be_cut else None)


def _merges(tiles: Tiles, several: Array, slot: Array, cut: Cut) -> Merges:
    """There are at most ``cut.parts``, because each has more than one full run; their items are at most ``cut.parts``
    full ones, and a rest in each."""
    rank = jnp.cumsum((several > 0).astype(jnp.int32))
    m = jnp.arange(min(cut.parts, several.shape[0]), dtype=jnp.int32)
    tile = jnp.minimum(_rank(m, rank), several.shape[0] - 1)
    row, row_end, slot, several = (_take(x, tile) for x in (tiles.row, tiles.row_end, slot, several))
    return Merges(row, jnp.where(m < rank[-1], row_end, row), slot, several)


def _rank(x: Array, ends: Array) -> Array:
    """How many of ``ends`` are not above each x."""
    return jnp.sum((x[:, None] >= ends[None]).astype(jnp.int32), axis=1)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="clip")


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Static:
    """What the attention kernel is compiled for."""

    cut: Cut
    tile: Tile
    shape: Shape
    scoring: Scoring
    kv_heads: int
    group: int
    table_width: int
    dtype: jnp.dtype
    """Of the products' operands."""
    aliased: bool
    """Whether it adds to outputs that another has begun."""
    interpret: bool

    @property
    def rows(self) -> int:
        return self.cut.tokens * self.tile.heads

    def row_of(self, token: Array, kv: Array, head: Array) -> Array:
        """Of q and the outputs, flattened."""
        return (token * self.kv_heads + kv) * self.group + head


def attend(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    plan: Plan,
    shape: Shape,
    scoring: Scoring,
    tiling: Tiling,
    interpret: bool,
) -> tuple[Array, Array]:
    check_offsets(k_cache)
    outputs: tuple[Array, Array] | None = None
    for cut, work in zip(cuts(tiling, shape), plan.works, strict=True):
        static = Static(
            cut,
            _tile_of(cut, q, k_cache),
            shape,
            scoring,
            q.shape[1],
            q.shape[2],
            plan.tables.shape[1],
            product_dtype(q.dtype, k_cache.dtype),
            outputs is not None,
            interpret,
        )
        outputs = attend_work((_rows(q), k_cache, v_cache), plan, work, outputs, static, _attend_item)
    assert outputs is not None
    attended = plan.attended[:, None]
    out, lse = outputs[0].reshape(q.shape), outputs[1].reshape(q.shape[:-1])
    return jnp.where(attended[..., None, None], out, 0.0), jnp.where(attended[..., None], lse, MASKED)


def operand_dtype(q: jnp.dtype, cache: jnp.dtype) -> jnp.dtype:
    """All 8-bit numbers are exact in 16 bits; 16 and 32 bits go up to the wider."""
    return q if cache.itemsize == 1 or cache == q else jnp.dtype(jnp.float32)


def product_dtype(q: jnp.dtype, cache: jnp.dtype) -> jnp.dtype:
    """As ``operand_dtype``, but float8 goes up to float16: the hardware converts two at a time to it, and none to
    bfloat16. It has all bits of a bfloat16 q from 6e-5 to 65,504; what is larger is cut off there."""
    return jnp.dtype(jnp.float16) if cache == jnp.float8_e4m3fn and q.itemsize == 2 else operand_dtype(q, cache)


def attend_work(
    operands: tuple[Array, ...],
    plan: Plan,
    work: Work,
    outputs: tuple[Array, Array] | None,
    static: Static,
    attend_item: AttendItem,
) -> tuple[Array, Array]:
    """Output [T*K*G, H] and log-sum-exp [T*K*G] of the rows of ``work``; the others are those of ``outputs``, or
    undefined if it is None. ``operands``: q [T*K*G, H], and two more arrays for ``attend_item``."""
    num_rows, head_dim = operands[0].shape
    out_shape = [
        jax.ShapeDtypeStruct((num_rows, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_rows,), jnp.float32),
    ]
    if work.merges is not None:
        num_slots = static.cut.parts + work.merges.row.shape[0]
        num_partial = num_slots * static.cut.tokens * static.kv_heads * static.group
        out_shape += [jax.ShapeDtypeStruct((num_partial, *x.shape[1:]), jnp.float32) for x in out_shape]
    inputs = (*work.items, plan.tables.reshape(-1), plan.visible, *operands)
    out, lse, *partials = pl.pallas_call(
        partial(_attend_kernel, static=static, attend_item=attend_item),
        grid=(pl.cdiv(static.group, static.tile.heads), static.kv_heads, work.items.row.shape[0]),
        out_shape=out_shape,
        input_output_aliases={} if outputs is None else {len(inputs): 0, len(inputs) + 1: 1},
        interpret=static.interpret,
        compiler_params=plt.CompilerParams(num_warps=static.tile.num_warps, num_stages=static.tile.num_stages),
        name="attend",
    )(*inputs, *(outputs or ()))
    if work.merges is None:
        return out, lse
    return _merge((out, lse), (partials[0], partials[1]), work.merges, static)


AttendItem = Callable[[Items, Array, Array, tuple[Any, Any], Static], None]
"""(item, KV head, first query head of its group, (inputs, outputs), static): what one program does. The inputs are
tables [S*B], visible [T] and the operands; the outputs are output and log-sum-exp, and if an item may be one of several
of its tile those of partial results."""


def _attend_kernel(*refs: Any, static: Static, attend_item: AttendItem) -> None:
    """One item, KV head and ``static.tile.heads`` heads of its group. refs: an item's fields [W]; tables [S*B],
    visible [T], q [T*K*G, H], caches [blocks, K, size, H]; the outputs so far, if any; output [T*K*G, H], log-sum-exp
    [T*K*G], and the same of partial results [slots*tokens*K*G, ...], if any."""
    items, inputs, outputs = Items(*refs[:6]), refs[6:11], refs[11 + 2 * static.aliased :]
    item = Items(*(field[pl.program_id(2)] for field in items))
    kv, first_head = pl.program_id(1), pl.program_id(0) * static.tile.heads

    @pl.when(item.row < item.row_end)
    def attend_live_item() -> None:
        attend_item(item, kv, first_head, (inputs, outputs), static)


class Rows(NamedTuple):
    """Of the products of a program: one per token of its item and head. All [rows]; ``mine``: whether there is such a
    token and head; ``at``: where q and the output have it; it sees keys from ``begin`` to ``end``."""

    token: Array
    head: Array
    mine: Array
    at: Array
    begin: Array
    end: Array


def rows_of(item: Items, kv: Array, first_head: Array, visible: Any, static: Static) -> Rows:
    r = jnp.arange(static.rows, dtype=jnp.int32)
    token = item.row + jax.lax.div(r, static.tile.heads)
    head = first_head + jax.lax.rem(r, static.tile.heads)
    mine = (token < item.row_end) & (head < static.group)
    at = static.row_of(token, kv, head)
    end = plt.load(visible.at[token], mask=mine, other=0)
    return Rows(token, head, mine, at, end - (static.shape.window or 0), jnp.minimum(end, item.high))


class Running(NamedTuple):
    """A softmax over the keys so far: the largest score and the sum of weights relative to it [rows], and V weighted
    by them [rows, width]."""

    maximum: Array
    total: Array
    values: Array

    @classmethod
    def start(cls, num_rows: int, width: int) -> Running:
        maximum = jnp.full((num_rows,), MASKED, jnp.float32)
        return cls(maximum, jnp.zeros((num_rows,), jnp.float32), jnp.zeros((num_rows, width), jnp.float32))


def weigh(
    products: Array, key: Array, rows: Rows | None, so_far: Running, static: Static
) -> tuple[Array, Array, Array]:
    """Of q.k [rows, keys] and the keys' places [keys]: the new maximum [rows], the weights relative to it [rows, keys],
    and what becomes of older ones [rows]. ``rows``: None = all see all."""
    scores = _scaled(products, static.scoring)
    if rows is not None:
        sees = key[None, :] < rows.end[:, None]
        if static.shape.window is not None:
            sees &= key[None, :] >= rows.begin[:, None]
        scores = jnp.where(sees, scores, -jnp.inf)
    maximum = jnp.maximum(so_far.maximum, jnp.max(scores, axis=1))
    keep = _exp2(so_far.maximum - maximum, static.interpret)
    return maximum, _exp2(scores - maximum[:, None], static.interpret), keep


def _exp2(x: Array, interpret: bool) -> Array:
    """Without what keeps results below 2**-126: three instructions more for each of them."""
    if interpret:
        return jnp.exp2(x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (y,) = plt.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=r,r", pack=1, result_shape_dtypes=[shape]
    )
    return y


def store_item(item: Items, kv: Array, rows: Rows, done: Running, outputs: tuple[Any, ...], static: Static) -> None:
    """To the output, or to the partial results if the item is one of several of its tile."""
    total = jnp.maximum(done.total, 1e-30)
    out = done.values * (static.scoring.v_scale / total)[:, None]
    lse = done.maximum / LOG2_E + jnp.log(total)
    _store_rows(outputs[:2], rows.at, rows.mine & (item.slot < 0), out, lse)
    if len(outputs) > 2:
        token = item.slot * static.cut.tokens + rows.token - item.row
        _store_rows(outputs[2:], static.row_of(token, kv, rows.head), rows.mine & (item.slot >= 0), out, lse)


def _attend_item(item: Items, kv: Array, first_head: Array, refs: tuple[Any, Any], static: Static) -> None:
    (tables, visible, q_ref, k_ref, v_ref), outputs = refs
    rows = rows_of(item, kv, first_head, visible, static)
    column, mask = columns(rows.mine, q_ref.shape[1])
    q = plt.load(q_ref.at[rows.at[:, None], column], mask=mask, other=0)
    if (q.dtype, static.dtype) == (jnp.bfloat16, jnp.float16):
        largest = float(jnp.finfo(jnp.float16).max)
        q = jnp.clip(q.astype(jnp.float32), -largest, largest)
    q = q.astype(static.dtype)
    width = column.shape[1]

    def turn(i: Array, so_far: Running, whole: bool = False) -> Running:
        """``whole``: every row sees all of the turn's keys, and nothing of them is masked."""
        key = item.low + i * static.tile.keys + jnp.arange(static.tile.keys, dtype=jnp.int32)
        real = jnp.full(key.shape, True) if whole else key < item.high
        column, mask = columns(real, k_ref.shape[3])
        place = (*_place_of(key, real, item.sequence, tables, kv, static), column)
        k = _loaded(k_ref, place, mask, static.dtype)
        maximum, weights, keep = weigh(_product(q, k.T), key, None if whole else rows, so_far, static)
        # Masked to zero and not only weighted by it: what nobody wrote may be NaN.
        v = _loaded(v_ref, place, mask, static.dtype)
        values = so_far.values * keep[:, None] + _product(weights.astype(static.dtype), v)
        return Running(maximum, so_far.total * keep + jnp.sum(weights, axis=1), values)

    turns = pl.cdiv(item.high - item.low, static.tile.keys)
    done, first = Running.start(static.rows, width), 0
    as_it_is = k_ref.dtype == static.dtype and k_ref.dtype.itemsize == 2  # with conversions the second loop spills
    if static.cut.tokens >= LEAST and static.shape.window is None and as_it_is:
        # Of prompts all turns but the last few. A few tokens have few turns, and between two loops nothing is loaded.
        first = _whole_turns(item, rows, static)
        done = jax.lax.fori_loop(0, first, partial(turn, whole=True), done)
    done = jax.lax.fori_loop(first, turns, turn, done)
    store_item(item, kv, rows, done, outputs, static)


def _whole_turns(item: Items, rows: Rows, static: Static) -> Array:
    """Turns from the first on whose keys every row sees."""
    seen = jnp.min(jnp.where(rows.mine, rows.end, item.high))
    return jax.lax.div(jnp.maximum(seen - item.low, 0), static.tile.keys)


def _place_of(key: Array, real: Array, sequence: Array, tables: Any, kv: Array, static: Static) -> tuple[Array, ...]:
    """Where a cache has each key [keys, 1], through the table."""
    size = static.shape.block_size
    block = plt.load(tables.at[sequence * static.table_width + jax.lax.div(key, size)], mask=real, other=0)
    return block[:, None], kv, jax.lax.rem(key, size)[:, None]


def _loaded(cache: Any, place: tuple[Array, ...], mask: Array, dtype: jnp.dtype) -> Array:
    """Zero where masked. Of float8, jax's Triton lowering cannot make the zero that a masked load fills in."""
    if cache.dtype == jnp.float8_e4m3fn:
        return jnp.where(mask, plt.load(cache.at[place], mask=mask).astype(dtype), jnp.zeros((), dtype))
    return plt.load(cache.at[place], mask=mask, other=0).astype(dtype)


def columns(rows: Array, head_dim: int) -> tuple[Array, Array]:
    """Columns [1, width] of rows of ``head_dim`` numbers, and which of them are there of which ``rows``."""
    column = jnp.arange(padded(head_dim), dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(rows[:, None], (rows.shape[0], column.shape[1]))
    return column, mask if column.shape[1] == head_dim else mask & (column < head_dim)


def _product(a: Array, b: Array) -> Array:
    """In float32 without TF32, which has 10 bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _scaled(scores: Array, scoring: Scoring) -> Array:
    """In units of log 2."""
    scale = scoring.scale * scoring.k_scale
    if scoring.softcap is None:
        return scores * (scale * LOG2_E)
    return jnp.tanh(scores * (scale / scoring.softcap)) * (scoring.softcap * LOG2_E)


def _store_rows(outputs: tuple[Any, ...], row: Array, mask: Array, out: Array, lse: Array) -> None:
    out_ref, lse_ref = outputs
    row = _nowhere_unless(mask, row, out_ref.shape[0])
    column, in_row = columns(mask, out_ref.shape[1])
    plt.store(out_ref.at[row[:, None], column], out, mask=in_row)
    plt.store(lse_ref.at[row], lse, mask=mask)


def _nowhere_unless(mask: Array, row: Array, num_rows: int) -> Array:
    """The interpreter writes what was there where a store is masked. Behind the end it writes nothing."""
    return jnp.where(mask, row, num_rows)


# -- merging partial results -------------------------------------------------------------------------------------------


def _merge(
    outputs: tuple[Array, Array], partials: tuple[Array, Array], merges: Merges, static: Static
) -> tuple[Array, Array]:
    """Fill the rows of the tiles that have several items."""
    heads = _power_of_2(static.group)
    # With one token there may be hundreds of items to merge, and few rows: a program for each. With many tokens a few
    # items of many rows.
    rows = min(8, static.cut.tokens)
    out, lse = pl.pallas_call(
        partial(_merge_kernel, static=static, rows=rows),
        grid=(pl.cdiv(heads * static.cut.tokens, rows), static.kv_heads, merges.row.shape[0]),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases={6: 0, 7: 1},
        interpret=static.interpret,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=2),
        name="merge",
    )(*merges, *partials, *outputs)
    return out, lse


def _merge_kernel(*refs: Any, static: Static, rows: int) -> None:
    """Some rows of a tile. refs: a merge's fields [M], partial output [slots*tokens*K*G, H] and log-sum-exp; the
    outputs so far; the outputs."""
    merges, partials, outputs = Merges(*refs[:4]), refs[4:6], refs[8:]
    merge = Merges(*(field[pl.program_id(2)] for field in merges))
    heads = _power_of_2(static.group)
    kv, first = pl.program_id(1), pl.program_id(0) * rows

    @pl.when(merge.row + jax.lax.div(first, heads) < merge.row_end)
    def merge_rows() -> None:
        r = first + jnp.arange(rows, dtype=jnp.int32)
        token, head = jax.lax.div(r, heads), jax.lax.rem(r, heads)
        mine = (merge.row + token < merge.row_end) & (head < static.group)
        of_slot = static.row_of(merge.slot * static.cut.tokens + token, kv, head)
        step = static.cut.tokens * static.kv_heads * static.group
        out, lse = _merge_rows(partials, of_slot, mine, merge.num_items, step)
        _store_rows(outputs, static.row_of(merge.row + token, kv, head), mine, out, lse)


def _merge_rows(partials: tuple[Any, ...], first: Array, mine: Array, count: Array, step: int) -> tuple[Array, Array]:
    """Of rows ``first``, ``first + step`` and so on, ``count`` in all, one output and log-sum-exp."""
    out_ref, lse_ref = partials
    rows, head_dim = first.shape[0], out_ref.shape[1]
    width = padded(head_dim)
    # Masks of columns take registers too: with as many elements head dims of 80 and 96 spill on an H100.
    items = max(1, MERGE_ELEMENTS // (rows * width) // (1 if width == head_dim else 2))
    column = jnp.arange(width, dtype=jnp.int32)[None, None, :]

    def turn(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, values = so_far
        item = i * items + jnp.arange(items, dtype=jnp.int32)[:, None]
        there = (item < count) & mine[None, :]
        row = first[None, :] + item * step
        lse = plt.load(lse_ref.at[row], mask=there, other=MASKED)
        mask = there[:, :, None] & (column < head_dim)
        out = plt.load(out_ref.at[row[:, :, None], column], mask=mask, other=0)
        new_maximum = jnp.maximum(maximum, jnp.max(lse, axis=0))
        keep = jnp.exp(maximum - new_maximum)
        weight = jnp.where(there, jnp.exp(lse - new_maximum[None, :]), 0.0)
        values = values * keep[:, None] + jnp.sum(out * weight[:, :, None], axis=0)
        return new_maximum, total * keep + jnp.sum(weight, axis=0), values

    empty = (
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, width), jnp.float32),
    )
    maximum, total, values = jax.lax.fori_loop(0, pl.cdiv(count, items), turn, empty)
    total = jnp.maximum(total, 1e-30)
    return values / total[:, None], maximum + jnp.log(total)


# -- what dispatch knows -----------------------------------------------------------------------------------------------


def refuses(setting: Setting) -> str | None:
    """Of the compiled kernels."""
    return _refuses_small(setting) or lacks_shared_memory(setting.capability, SHARED_KIB)


def _refuses_small(setting: Setting) -> str | None:
    capability = setting.capability or (0, 0)
    if setting.platform != "gpu" or capability < AMPERE:
        return "it is for NVIDIA GPUs of compute capability 8.0 and above"
    if setting.kv_dtype == "float8_e4m3fn" and capability < ADA:
        return "Triton reads float8_e4m3fn from compute capability 8.9 on only"
    return _refuses_types(setting)


def _refuses_interpreted(setting: Setting) -> str | None:
    return "the interpreter is for CPUs" if setting.platform != "cpu" else _refuses_types(setting)


def _refuses_types(setting: Setting) -> str | None:
    if setting.dtype not in WIDE_DTYPES:
        return f"queries are of {', '.join(WIDE_DTYPES)}"
    if setting.kv_dtype not in WIDE_DTYPES + NARROW_DTYPES:
        return f"caches are of {', '.join(WIDE_DTYPES + NARROW_DTYPES)}"
    return None


def implementation(
    name: str,
    refuses: Callable[[Setting], str | None],
    tiling: Tiling,
    interpret: bool = False,
) -> PagedAttention:
    return PagedAttention(
        name,
        cache_shapes,
        kv_write.INTERPRETED if interpret else kv_write.IMPLEMENTATION,
        partial(plan, tiling=tiling),
        partial(attend, tiling=tiling, interpret=interpret),
        refuses,
        addresses,
    )


SMALL = Tiling(
    decode=Cut(tokens=1, parts=8, unit=8, min_keys=8, tile=Tile(16, 16, 4, 1)),
    few=Cut(tokens=2, parts=4, unit=8, min_keys=8, tile=Tile(8, 16, 4, 1)),
    many=Cut(tokens=16, parts=4, unit=16, min_keys=16, tile=Tile(2, 16, 4, 1)),
)
"""For the interpreter: contexts of tests are cut into several items, and its turns are short."""

SMALL_MEMORY = Tiling(few=replace(Tiling.few, num_stages=3), many=replace(Tiling.many, num_stages=3))
"""For GPUs whose programs have 99 KiB: two turns' keys of a decode are there, one turn's of the others."""

IMPLEMENTATION = implementation("triton", refuses, Tiling())
SMALL_IMPLEMENTATION = implementation("triton_small", _refuses_small, SMALL_MEMORY)
INTERPRETED = implementation("triton_interpreted", _refuses_interpreted, SMALL, interpret=True)
