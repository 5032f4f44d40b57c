"""Product with weights of 8 or 4 bits in Pallas's Triton backend: A100, Ada, Hopper and Blackwell from one source.

Integers are widened to x's dtype, in which they are exact, and scaled in the accumulator: of 8 bits once at the end, of
4 bits after each group. With few rows the time goes into reading weights; then K is cut into parts, if the columns
alone do not keep the GPU busy. Every part writes its own float32 sums and XLA adds them, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.dequant_matmul import GROUPS, SYMMETRIC_ZERO, DequantMatmul, Int4Weights, Setting, Weights
from pallas_kernels.triton_tiles import SMALLEST, WIDE, dot, load_tile, place, power_of_two, store_tile, uneven

FEW_ROWS = 16
"""Up to here K is cut into parts."""
BUSY = 2 * 132
"""Programs that keep a GPU reading: two for each of the 132 SMs of an H100 or H200."""
SHORTEST_PART = 512
"""Of K: a shorter part is over before its loads are all under way."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up. ``rows`` x ``columns`` of the output are one program's, which goes through its part of
    K (of ``parts``) in steps of ``depth``; rows, columns and depth are powers of two. Of weights of 4 bits a step is
    whole groups."""

    rows: int
    columns: int
    depth: int
    parts: int
    num_warps: int
    num_stages: int
    band: int = 32
    """Row tiles that are done for one tile of columns before the next, so that they share it in the L2 cache."""


def tiles_for(num_rows: int, depth: int, columns: int, group: int | None) -> Tiles:
    """Of M, K, N and the rows of a group (None: weights of 8 bits).

    Few rows: the time goes into reading weights, so their rows in a tile are 128 bytes, what a cache reads at once, and
    a step is 8 or 16 KiB of them, with three more under way. Many rows: accumulators of 64 registers a thread and steps
    that fit the A100's 163 KiB of shared memory four times. Weights of 4 bits have two accumulators, the group's and
    the sum: half as many rows, and twice the threads (with 4 warps for 64 rows registers spill on an A100).
    """
    rows = min(128 if group is None else 64, power_of_two(num_rows))
    step, num_warps = (128, 8) if rows <= 32 else (64, max(4, rows // 16))
    if group is None:
        step = min(step, power_of_two(depth))
    else:
        step, num_warps = max(step, group), max(4, rows // 8)
        while depth % step:
            step //= 2
    width = min(128, power_of_two(columns))
    parts = 1
    if num_rows <= FEW_ROWS:
        parts = max(1, min(BUSY // pl.cdiv(columns, width), depth // SHORTEST_PART))
    return Tiles(rows, width, step, parts, num_warps, num_stages=4)


def _refuses_tiles(shape: Mapping[str, str], tiles: Tiles) -> str | None:
    depth, group = int(shape["depth"]), int(shape["group"])
    if group and (tiles.depth % group or depth % tiles.depth):
        return f"depth={tiles.depth}: steps of {depth} rows are whole groups of {group}, and all the same"
    if min(tiles.rows, tiles.columns, tiles.depth) < SMALLEST:
        return f"rows, columns and depth are at least {SMALLEST}"
    return tuning.powers_of_two(tiles, "rows", "columns", "depth", "num_warps")


TUNED = tuning.read("dequant_matmul/triton", Tiles, ("rows", "depth", "columns", "group"), _refuses_tiles)
"""``rows``: the next power of two; ``group``: 0 is weights of 8 bits."""


def _kernel(x_ref: Any, weights: Any, out_ref: Any, *, tiles: Tiles) -> None:
    num_rows, depth = x_ref.shape
    columns = out_ref.shape[2]
    m, n = place(pl.program_id(0), pl.cdiv(num_rows, tiles.rows), pl.cdiv(columns, tiles.columns), tiles.band)
    row, column, part = m * tiles.rows, n * tiles.columns, pl.program_id(1)
    ends = uneven(num_rows, tiles.rows), uneven(columns, tiles.columns)
    steps = pl.cdiv(depth, tiles.depth)
    first = part * pl.cdiv(steps, tiles.parts)
    last = jnp.minimum(first + pl.cdiv(steps, tiles.parts), steps)
    add = _add_groups if isinstance(weights, Int4Weights) else _add_step

    def step(i: Array, acc: Array) -> Array:
        return add(acc, x_ref, weights, (row, i * tiles.depth, column), ends, tiles)

    acc = jax.lax.fori_loop(first, last, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    if not isinstance(weights, Int4Weights):
        acc *= load_tile(weights.scales, (0, column), (1, tiles.columns), (None, ends[1]))
    store_tile(out_ref, acc, (row, column), ends, (part,))


Place = tuple[Any, Any, Any]
"""First row, first of K and first column."""
Ends = tuple[int | None, int | None]
"""Of rows and columns, where tiles reach them."""


def _add_step(acc: Array, x_ref: Any, weights: Any, at: Place, ends: Ends, tiles: Tiles) -> Array:
    """One step of weights of 8 bits."""
    row, k, column = at
    depth_end = uneven(x_ref.shape[1], tiles.depth)
    x = load_tile(x_ref, (row, k), (tiles.rows, tiles.depth), (ends[0], depth_end))
    w = load_tile(weights.values, (k, column), (tiles.depth, tiles.columns), (depth_end, ends[1]))
    return acc + dot(x, w.astype(x.dtype))


def _add_groups(acc: Array, x_ref: Any, weights: Any, at: Place, ends: Ends, tiles: Tiles) -> Array:
    """One step of weights of 4 bits: some groups, each of two halves.

    Products are of nibbles plus ``base``. That and the zero point come off the sums, as multiples of the sum of a row
    of x: taken off the nibbles, they would be work for every weight (with zero points, few rows and groups of 128 the
    compiled kernel has 1032 instructions instead of 1352 on an H200).
    """
    row, k, column = at
    half = weights.packed.shape[0] // weights.scales.shape[0]
    for start in range(0, tiles.depth, 2 * half):
        group = (k + start) // (2 * half)

        def of_group(ref: Any, group: Array = group) -> Array:
            return load_tile(ref, (group, column), (1, tiles.columns), (None, ends[1])).astype(jnp.float32)

        packed = load_tile(weights.packed, (group * half, column), (half, tiles.columns), (None, ends[1]))
        sums = jnp.zeros_like(acc)
        of_x = jnp.zeros((tiles.rows,), jnp.float32)
        for nibbles, offset in ((packed & 15, 0), (packed >> 4, half)):
            x = load_tile(x_ref, (row, k + start + offset), (tiles.rows, half), (ends[0], None))
            wide, base = _widened(nibbles, x.dtype)
            sums += dot(x, wide)
            of_x += jnp.sum(x.astype(jnp.float32), axis=1)
        zero = base + (SYMMETRIC_ZERO if weights.zeros is None else of_group(weights.zeros))
        acc += (sums - of_x[:, None] * zero) * of_group(weights.scales)
    return acc


def _widened(nibbles: Array, dtype: Any) -> tuple[Array, float]:
    """nibbles + base in x's dtype, and base. 16-bit floats are put together from bits, without a conversion: those of
    128 (bfloat16) or 1024 (float16) end in zeros, and a nibble takes their place."""
    if dtype == jnp.float32:
        return nibbles.astype(dtype), 0.0
    base, bits = (128.0, 0x4300) if dtype == jnp.bfloat16 else (1024.0, 0x6400)
    return jax.lax.bitcast_convert_type(nibbles.astype(jnp.uint16) | bits, dtype), base


def product(x: Array, weights: Weights, tiles: Tiles | None = None, interpret: bool = False) -> Array:
    """[M, K] by [K, N] -> [M, N]. ``tiles``: None = those tuned, or ``tiles_for``."""
    num_rows, depth = x.shape
    columns = weights.shape[1]
    group = weights.group if isinstance(weights, Int4Weights) else None
    rows = pl.next_power_of_2(num_rows)
    tuned = TUNED.get(rows=rows, depth=depth, columns=columns, group=group or 0) if tiles is None else None
    tiles = tiles or tuned or tiles_for(num_rows, depth, columns, group)
    if group is not None and (tiles.depth % group or depth % tiles.depth):
        raise ValueError(f"steps of {tiles.depth} of {depth} rows: they are whole groups of {group}, and all the same")
    if not isinstance(weights, Int4Weights):
        weights = weights._replace(scales=weights.scales[None])
    programs = pl.cdiv(num_rows, tiles.rows) * pl.cdiv(columns, tiles.columns)
    sums = pl.pallas_call(
        partial(_kernel, tiles=tiles),
        grid=(programs, tiles.parts),
        out_shape=jax.ShapeDtypeStruct((tiles.parts, num_rows, columns), x.dtype if tiles.parts == 1 else jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="dequant_matmul",
    )(x, weights)
    return sums[0] if tiles.parts == 1 else jnp.sum(sums, axis=0).astype(x.dtype)


# -- what dispatch knows -----------------------------------------------------------------------------------------------


def refuses(setting: Setting) -> str | None:
    """Of the compiled kernel."""
    if setting.platform != "gpu" or setting.capability is None or setting.capability < (8, 0):
        return "it is for NVIDIA GPUs of compute capability 8.0 (A100) and above"
    if 1 << 31 < setting.depth * setting.columns * setting.bits // 8 <= 1 << 32:
        return "Triton's backend has places in weights of 2 to 4 GiB overflow: it gives them 32 bits, signed"
    return _refuses_types(setting)


def _refuses_interpreted(setting: Setting) -> str | None:
    return "the interpreter is for CPUs" if setting.platform != "cpu" else _refuses_types(setting)


def _refuses_types(setting: Setting) -> str | None:
    if setting.dtype not in WIDE:
        return f"x is of {', '.join(WIDE)}"
    if setting.bits not in (4, 8):
        return "weights have 4 or 8 bits"
    if setting.bits == 4 and (setting.group not in GROUPS or setting.depth % setting.group):
        return f"groups have {', '.join(map(str, GROUPS))} rows, and all the same"
    return None


def implementation(
    name: str, refuses: Callable[[Setting], str | None], tiles: Tiles | None = None, interpret: bool = False
) -> DequantMatmul:
    """With ``tiles`` for all products, or those of ``tiles_for``."""
    return DequantMatmul(name, partial(product, tiles=tiles, interpret=interpret), refuses)


IMPLEMENTATION = implementation("triton", refuses)
INTERPRETED = implementation("triton_interpreted", _refuses_interpreted, interpret=True)
"""The same kernel, step by step, on a CPU: far too slow for anything but tests."""
