"""Multi-head latent attention in the style of Triton, for NVIDIA GPUs from Ampere on.

The plan, the softmax and the kernel that merges partial results are those of ``paged_attention.triton``, with one KV
head that all N query heads share. What differs is how a program multiplies: c is loaded once and serves as keys and as
values, and a row of the output is 512 numbers instead of 128, so that registers decide how many rows there are.

c and r are loaded apart. Arrays in a kernel have powers of two for sizes, and as one they would be 1,024 wide instead
of 512 and 64.

A turn that is not full loads its last key again instead of masking what is behind it. That key was written, so no NaN
of an unwritten one can come in through a weight of zero, and the scores are masked anyway. With masks instead, 32 heads
on an fp8 cache spilled 650 bytes of registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.mla_attention import MlaAttention, Queries, Setting, check_scales
from pallas_kernels.paged_attention import Ragged, Scoring, Shape
from pallas_kernels.paged_attention import triton as paged
from pallas_kernels.paged_attention.triton import Cut, Items, Plan, Running, Static, Tile, Tiling
from pallas_kernels.triton_tiles import SMALLEST, WIDE, check_offsets, dot, lacks_shared_memory, power_of_two

AMPERE, ADA = (8, 0), (8, 9)
FP8 = "float8_e4m3fn"
LARGEST_LATENT = 512
"""Numbers in c: with more, no tile here keeps its output in registers."""
PROGRAMS = 256
"""That runs of keys should make of one long sequence: two for each of an H200's 132 SMs."""
SHARED_KIB = 111
"""Shared memory of the largest program, as compiled."""
WRITE_TOKENS = 4
"""Of a program of the kernel that writes: one for each of its warps."""


# -- sizes -------------------------------------------------------------------------------------------------------------


def tile_for(num_heads: int, tokens: int, dtype: jnp.dtype, kv_dtype: jnp.dtype) -> Tile:
    """The sizes for products of ``dtype`` in items of ``tokens`` tokens, for C = 512 and R = 64.

    Rows: 32, whose output is 64 float32 registers of a thread in 8 warps; with the queries and what is loaded a thread
    uses up to 218 of its 255. 64 rows use 251 to 255, and whether they spill changes with the number of stages and the
    GPU. (Two programs for halves of C would take 64, but each needs all of the scores: 1.53 times the products.) One
    token of 16 heads is 16 rows, in 4 warps. 16 rows, but in 8 warps, are for 8-bit caches, which are converted in
    registers, and for float32, for which no tensor core is exact enough.
    Keys: 32, of 36 KiB in 16 bits. With 5 stages two turns of them are under way (loads through a table take stages of
    their own), and a program takes 111 KiB of shared memory for 32 rows, 92 for 16.
    """
    exact, converted = dtype.itemsize == 4, kv_dtype.itemsize == 1
    most_rows = SMALLEST if exact or converted else 2 * SMALLEST
    heads = max(SMALLEST // tokens, min(pl.next_power_of_2(num_heads), most_rows // tokens))
    if exact:
        return Tile(heads, SMALLEST, num_warps=8, num_stages=2)
    one_token_of_few = tokens == 1 and heads == SMALLEST and not converted
    return Tile(heads, 32, 4 if one_token_of_few else 8, 5)


def tiling_for(num_heads: int) -> Tiling:
    """Items of one token where a sequence has one, and else of two, for drafts of one token more. With 16 heads or
    more these fill a tile's rows, so that longer items would share no more loads of keys.

    Partial results are traffic too: float32, written and read, they are 3.6 * heads * tokens / keys of the keys that
    they are of, in 16 bits. For 16 heads that is a quarter at 256 keys. For 128 it is more than the keys, but there
    the products are what takes time, 242 operations for each byte of keys, and a sequence cut up less leaves SMs
    without work."""

    def cut(tokens: int, min_keys: int) -> Cut:
        per_item = pl.cdiv(num_heads * tokens, 2 * SMALLEST)
        return Cut(tokens, parts=max(SMALLEST, PROGRAMS // per_item), min_keys=min_keys)

    return Tiling(decode=cut(1, 256), few=cut(1, 256), many=cut(2, 512))


# -- attention ---------------------------------------------------------------------------------------------------------


def plan(ragged: Ragged, num_tokens: int, num_heads: int, shape: Shape, tiling: Tiling | None) -> Plan:
    return paged.plan(ragged, num_tokens, shape, tiling or tiling_for(num_heads))


def attend(
    queries: Queries,
    cache: Array,
    plan: Plan,
    shape: Shape,
    scoring: Scoring,
    tiling: Tiling | None,
    interpret: bool,
) -> tuple[Array, Array]:
    check_scales(scoring)
    check_offsets(cache)
    num_heads, latent_dim = queries.latent.shape[1:]
    dtype = paged.operand_dtype(queries.latent.dtype, cache.dtype)
    operands = (*(x.reshape(-1, x.shape[-1]) for x in queries), cache)
    outputs: tuple[Array, Array] | None = None
    for cut, work in zip(paged.cuts(tiling or tiling_for(num_heads), shape), plan.works, strict=True):
        tile = cut.tile or tile_for(num_heads, cut.tokens, dtype, cache.dtype)
        width = plan.tables.shape[1]
        static = Static(cut, tile, shape, scoring, 1, num_heads, width, dtype, outputs is not None, interpret)
        outputs = paged.attend_work(operands, plan, work, outputs, static, _attend_item)
    assert outputs is not None
    attended = plan.attended[:, None]
    out, lse = outputs[0].reshape(-1, num_heads, latent_dim), outputs[1].reshape(-1, num_heads)
    return jnp.where(attended[..., None], out, 0.0), jnp.where(attended, lse, paged.MASKED)


def _attend_item(item: Items, kv: Array, first_head: Array, refs: tuple[Any, Any], static: Static) -> None:
    (tables, visible, q_latent_ref, q_rope_ref, cache), outputs = refs
    rows = paged.rows_of(item, kv, first_head, visible, static)
    q_latent, q_rope = (_queries(ref, rows, static.dtype) for ref in (q_latent_ref, q_rope_ref))
    latent_dim, rope_dim = q_latent_ref.shape[1], q_rope_ref.shape[1]

    def turn(i: Array, so_far: Running) -> Running:
        key = item.low + i * static.tile.keys + jnp.arange(static.tile.keys, dtype=jnp.int32)
        place = _place_of(jnp.minimum(key, item.high - 1), item.sequence, tables, static)
        latent = _cached(cache, place, 0, latent_dim, static.dtype)
        rope = _cached(cache, place, latent_dim, rope_dim, static.dtype)
        products = dot(q_latent, latent.T) + dot(q_rope, rope.T)
        maximum, weights, keep = paged.weigh(products, key, rows, so_far, static)
        values = so_far.values * keep[:, None] + dot(weights.astype(static.dtype), latent)
        return Running(maximum, so_far.total * keep + jnp.sum(weights, axis=1), values)

    turns = pl.cdiv(item.high - item.low, static.tile.keys)
    done = jax.lax.fori_loop(0, turns, turn, Running.start(static.rows, q_latent.shape[1]))
    paged.store_item(item, kv, rows, done, outputs, static)


def _queries(ref: Any, rows: paged.Rows, dtype: jnp.dtype) -> Array:
    """Some rows of [T*N, C or R]."""
    column, mask = paged.columns(rows.mine, ref.shape[1])
    return plt.load(ref.at[rows.at[:, None], column], mask=mask, other=0).astype(dtype)


def _place_of(key: Array, sequence: Array, tables: Any, static: Static) -> tuple[Array, Array]:
    """Block and token of each key [keys, 1], through the table."""
    size = static.shape.block_size
    block = plt.load(tables.at[sequence * static.table_width + jax.lax.div(key, size)])
    return block[:, None], jax.lax.rem(key, size)[:, None]


def _cached(cache: Any, place: tuple[Array, Array], first: int, size: int, dtype: jnp.dtype) -> Array:
    """Columns from ``first`` on of the keys there, and zeros up to a power of two."""
    column = jnp.arange(power_of_two(size), dtype=jnp.int32)[None, :]
    part = cache.at[*place, first + column]
    if column.shape[1] == size:
        return plt.load(part).astype(dtype)
    mask = jnp.broadcast_to(column < size, (place[0].shape[0], column.shape[1]))
    # Not by ``other``: of float8, jax's Triton lowering cannot make the zero.
    return jnp.where(mask, plt.load(part, mask=mask).astype(dtype), jnp.zeros((), dtype))


# -- the write ---------------------------------------------------------------------------------------------------------


def write(
    cache: Array, latent: Array, rope: Array, slot_mapping: Array, scoring: Scoring, *, interpret: bool = False
) -> Array:
    check_scales(scoring)
    check_offsets(cache)
    return pl.pallas_call(
        partial(_write_kernel, scale=scoring.k_scale),
        grid=(pl.cdiv(latent.shape[0], WRITE_TOKENS),),
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        input_output_aliases={3: 0},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="mla_write",
    )(latent, rope, slot_mapping, cache)


def _write_kernel(latent: Any, rope: Any, slots: Any, old: Any, cache: Any, *, scale: float) -> None:
    """Some tokens. refs: [T, C], [T, R], [T], and the cache before and after, which are the same."""
    token = pl.program_id(0) * WRITE_TOKENS + jnp.arange(WRITE_TOKENS, dtype=jnp.int32)
    live = token < slots.shape[0]
    size = cache.shape[1]
    # The interpreter writes what was there where a store is masked. Behind the end it writes nothing.
    slot = plt.load(slots.at[token], mask=live, other=cache.shape[0] * size)
    place = jax.lax.div(slot, size)[:, None], jax.lax.rem(slot, size)[:, None]
    for part, first in ((latent, 0), (rope, latent.shape[1])):
        column, mask = paged.columns(live, part.shape[1])
        x = plt.load(part.at[token[:, None], column], mask=mask, other=0)
        plt.store(cache.at[*place, first + column], _stored(x, cache.dtype, scale), mask=mask)


def _stored(x: Array, dtype: jnp.dtype, scale: float) -> Array:
    """As ``paged_attention.stored``, by comparisons: ``max`` and ``min`` in a kernel would drop NaN."""
    if dtype.itemsize > 1:
        return x.astype(dtype)
    scaled, largest = x.astype(jnp.float32) / scale, float(jnp.finfo(dtype).max)
    return jnp.where(scaled > largest, largest, jnp.where(scaled < -largest, -largest, scaled)).astype(dtype)


# -- what dispatch knows -----------------------------------------------------------------------------------------------


def refuses(setting: Setting) -> str | None:
    """Of the compiled kernels."""
    capability = setting.capability or (0, 0)
    if setting.platform != "gpu" or capability < AMPERE:
        return "it is for NVIDIA GPUs of compute capability 8.0 and above"
    if setting.kv_dtype == FP8 and capability < ADA:
        return f"Triton reads {FP8} from compute capability 8.9 on only"
    return _refuses_sizes(setting) or lacks_shared_memory(setting.capability, SHARED_KIB)


def _refuses_interpreted(setting: Setting) -> str | None:
    return "the interpreter is for CPUs" if setting.platform != "cpu" else _refuses_sizes(setting)


def _refuses_sizes(setting: Setting) -> str | None:
    if setting.latent_dim > LARGEST_LATENT:
        return f"latent vectors have at most {LARGEST_LATENT} numbers"
    if setting.dtype not in WIDE:
        return f"queries are of {', '.join(WIDE)}"
    if setting.kv_dtype not in (*WIDE, FP8):
        return f"caches are of {', '.join((*WIDE, FP8))}"
    return None


def implementation(
    name: str, refuses: Callable[[Setting], str | None], tiling: Tiling | None = None, interpret: bool = False
) -> MlaAttention:
    """``tiling``: None = ``tiling_for`` the number of heads."""
    return MlaAttention(
        name,
        partial(write, interpret=interpret),
        partial(plan, tiling=tiling),
        partial(attend, tiling=tiling, interpret=interpret),
        refuses,
    )


SMALL = Tiling(
    decode=Cut(tokens=1, parts=8, unit=8, min_keys=8, tile=Tile(16, 16, 4, 1)),
    few=Cut(tokens=1, parts=4, unit=8, min_keys=8, tile=Tile(16, 16, 4, 1)),
    many=Cut(tokens=2, parts=4, unit=16, min_keys=16, tile=Tile(8, 16, 4, 1)),
)
"""For the interpreter: contexts of tests are cut into several items, and its turns are short."""

IMPLEMENTATION = implementation("triton", refuses)
INTERPRETED = implementation("triton_interpreted", _refuses_interpreted, SMALL, interpret=True)
