"""Grouped matmul with Pallas's Triton backend: A100, Ada, Hopper and Blackwell from one source.

The work is a list of row tiles, each of one expert, made of the group sizes by XLA. The grid has room for the longest
list that M rows can give; programs past the end of the real one return at once, so an expert without rows costs
nothing. The padding behind the last expert's rows is a group like the others, whose tiles write zeros and read nothing.
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
from pallas_kernels.grouped_matmul import NARROW, GroupedMatmul, Setting, Weights
from pallas_kernels.triton_tiles import SMALLEST, WIDE, dot, load_tile, place, power_of_two, store_tile, uneven


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up. ``rows`` x ``columns`` of the output are one program's, which goes through K in steps
    of ``depth``; all three are powers of two. ``band``: how many row tiles are done for one tile of columns before the
    next: it is what shares a tile of weights in the L2 cache."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    band: int = 32


def tile_rows(num_rows: int, num_experts: int) -> int:
    """The rows an expert has on average: a tile that is taller multiplies rows that are not there, one that is lower
    reads the expert's weights again. It is the same for all products of a layer, because they share a plan."""
    return min(128, power_of_two(-(-num_rows // num_experts)))


def tiles_for(rows: int, depth: int, columns: int, itemsize: int) -> Tiles:
    """Of tiles of ``rows`` rows, K, N and the weights' bytes each.

    Few rows: the time goes into reading weights, so narrow tiles, to have many programs, but lines of 128 bytes, which
    is what a cache reads at once, and a step of 16 KiB with three more under way. Many rows: as large as the
    accumulator's registers allow, 64 a thread, and steps that fit the A100's 163 KiB of shared memory four times.
    """
    few = rows <= 32
    width = 128 // min(itemsize, 2) if few else 128
    step = (128 if few else 64) // max(1, itemsize // 2)
    num_warps = 8 // min(itemsize, 2) if few else rows // 16
    return Tiles(rows, min(width, power_of_two(columns)), min(step, power_of_two(depth)), num_warps, num_stages=4)


def _refuses_tiles(shape: Mapping[str, str], tiles: Tiles) -> str | None:
    if tiles.rows != int(shape["rows"]):
        return f"rows={tiles.rows}: the plan decides that there are {shape['rows']}"
    if min(tiles.rows, tiles.columns, tiles.depth) < SMALLEST:
        return f"rows, columns and depth are at least {SMALLEST}"
    return tuning.powers_of_two(tiles, "rows", "columns", "depth", "num_warps")


TUNED = tuning.read("grouped_matmul/triton", Tiles, ("rows", "depth", "columns", "itemsize"), _refuses_tiles)


@partial(jax.tree_util.register_dataclass, data_fields=["expert", "row", "row_end"], meta_fields=["rows"])
@dataclass(frozen=True)
class Plan:
    """Row tiles in order. All int32 [P].

    ``row``: first row of the tile; ``row_end``: one past its last (no more than ``row``: nothing to do); ``expert``:
    whose rows they are, or E: padding. ``rows``: what a tile has room for.
    """

    expert: Array
    row: Array
    row_end: Array
    rows: int


def max_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """Most tiles that ``num_rows`` rows can make: all groups, the padding included, have one row too many."""
    groups = min(num_experts + 1, num_rows)
    return (num_rows - groups) // rows + groups


def plan_tiles(group_sizes: Array, num_rows: int, rows: int) -> Plan:
    """Sums over masks, which XLA makes two or three small kernels of; cumsum, append and gathers would be six."""
    num_experts = group_sizes.shape[0]
    tiles = -(-group_sizes // rows)
    e = jnp.arange(num_experts)
    until = e[None] <= e[:, None]
    row_ends, tile_ends = (jnp.sum(jnp.where(until, x[None], 0), axis=1) for x in (group_sizes, tiles))
    i = jnp.arange(max_tiles(num_rows, num_experts, rows), dtype=jnp.int32)
    before = tile_ends[None] <= i[:, None]
    expert = jnp.sum(before.astype(jnp.int32), axis=1)
    row = i * rows - jnp.sum(jnp.where(before, (tiles * rows - group_sizes)[None], 0), axis=1)
    group_end = jnp.min(jnp.where(before, num_rows, row_ends[None]), axis=1)
    return Plan(expert, row, jnp.minimum(row + rows, group_end), rows)


def _kernel(plan: Any, x_ref: Any, weights: Any, out_ref: Any, *, tiles: Tiles) -> None:
    num_experts, depth, columns = weights.values.shape
    tile, n = place(pl.program_id(0), plan.row.shape[0], pl.cdiv(columns, tiles.columns), tiles.band)
    expert, row, row_end = plan.expert[tile], plan.row[tile], plan.row_end[tile]
    column = n * tiles.columns
    column_end, depth_end = uneven(columns, tiles.columns), uneven(depth, tiles.depth)

    @pl.when(row < row_end)
    def _() -> None:
        real = expert < num_experts
        own = jnp.minimum(expert, num_experts - 1)

        def step(i: Array, acc: Array) -> Array:
            k = i * tiles.depth
            x = load_tile(x_ref, (row, k), (tiles.rows, tiles.depth), (row_end, depth_end))
            w = load_tile(weights.values, (k, column), (tiles.depth, tiles.columns), (depth_end, column_end), (own,))
            return acc + dot(x, w.astype(x.dtype))

        steps = real.astype(jnp.int32) * pl.cdiv(depth, tiles.depth)
        acc = jax.lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
        if weights.scales is not None:
            acc *= load_tile(weights.scales, (own, column), (1, tiles.columns), (None, column_end))
        store_tile(out_ref, acc, (row, column), (row_end, column_end))


def product(x: Array, weights: Weights, plan: Plan, tiles: Tiles | None = None, interpret: bool = False) -> Array:
    """[M, K] by [E, K, N] -> [M, N]. ``tiles`` of the plan's rows: None = those tuned, or ``tiles_for``."""
    _, depth, columns = weights.values.shape
    if tiles is None:
        itemsize = weights.values.dtype.itemsize
        tuned = TUNED.get(rows=plan.rows, depth=depth, columns=columns, itemsize=itemsize)
        tiles = tuned or tiles_for(plan.rows, depth, columns, itemsize)
    if tiles.rows != plan.rows:
        raise ValueError(f"the plan has tiles of {plan.rows} rows, the product of {tiles.rows}")
    return pl.pallas_call(
        partial(_kernel, tiles=tiles),
        grid=(plan.row.shape[0] * pl.cdiv(columns, tiles.columns),),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="grouped_matmul",
    )(plan, x, weights)


# -- what dispatch knows -----------------------------------------------------------------------------------------------


def refuses(setting: Setting) -> str | None:
    """Of the compiled kernel."""
    if setting.platform != "gpu" or setting.capability is None or setting.capability < (8, 0):
        return "it is for NVIDIA GPUs of compute capability 8.0 (A100) and above"
    if setting.weight_dtype == "float8_e4m3fn" and setting.capability < (8, 9):
        return "Triton reads float8_e4m3fn from compute capability 8.9 (Ada) on only"
    size = setting.num_experts * setting.depth * setting.columns
    if setting.weight_dtype in NARROW and 1 << 31 < size <= 1 << 32:
        return "Triton's backend has places in 8-bit weights of 2 to 4 GiB overflow: it gives them 32 bits, signed"
    return _refuses_dtypes(setting)


def _refuses_interpreted(setting: Setting) -> str | None:
    return "the interpreter is for CPUs" if setting.platform != "cpu" else _refuses_dtypes(setting)


def _refuses_dtypes(setting: Setting) -> str | None:
    if setting.dtype not in WIDE:
        return f"x is of {', '.join(WIDE)}"
    if setting.weight_dtype not in (setting.dtype, *NARROW):
        return f"weights are of the dtype of x, {', '.join(NARROW)}"
    return None


def implementation(
    name: str, refuses: Callable[[Setting], str | None], tiles: Tiles | None = None, interpret: bool = False
) -> GroupedMatmul:
    """With ``tiles`` for all products, or those of ``tiles_for``."""

    def plan(group_sizes: Array, num_rows: int) -> Plan:
        rows = tile_rows(num_rows, group_sizes.shape[0]) if tiles is None else tiles.rows
        return plan_tiles(group_sizes, num_rows, rows)

    return GroupedMatmul(name, plan, partial(product, tiles=tiles, interpret=interpret), refuses)


SMALL = Tiles(rows=16, columns=16, depth=16, num_warps=4, num_stages=2, band=2)
"""For the interpreter: small products are cut into several."""

IMPLEMENTATION = implementation("triton", refuses)
INTERPRETED = implementation("triton_interpreted", _refuses_interpreted, SMALL, interpret=True)
"""The same kernel, step by step, on a CPU: far too slow for anything but tests."""
