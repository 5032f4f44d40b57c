"""Grouped matmul with Pallas's Mosaic backend, for Hopper: tiles come by TMA, products are wgmma.

The plan is a list of row tiles of one expert each, as the Triton implementation's. But what TMA loads for wgmma begins
at a multiple of 8 rows, and an expert's rows begin anywhere: its first tile begins with up to 7 rows of those before
it, and its last goes on into rows of those behind it, or past the end. A row of x only changes its own row of the
output, and only the expert's rows are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import GroupedMatmul, Setting, Weights
from pallas_kernels.grouped_matmul.triton import Plan
from pallas_kernels.triton_tiles import place, power_of_two

DTYPES = ("bfloat16", "float16")
STEP = 64
"""128 bytes."""
PATTERN = 8
"""Rows of 128 bytes that a swizzle permutes among themselves."""
SWIZZLE = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
SWIZZLED = plgpu.TilingTransform((PATTERN, STEP)), SWIZZLE  # pyright: ignore[reportAbstractUsage]
"""How wgmma wants 16-bit tiles to lie in shared memory. TMA makes such tiles of an array that it sees as [rows / 8, 8]:
a load that begins inside of 8 rows gets zeros for what lies behind these 8, and no error. Columns likewise, by 64."""
MOST_SUMS = 128 * 128
"""Of a tile: 128 registers of each thread. Twice as many spilled 1,792 bytes (ptxas 13.0)."""
WARPGROUP_ROWS = 64
"""Of the smallest wgmma."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up. ``rows`` x ``columns`` of the output are one program's, which goes through K in steps
    of ``depth``, of which ``num_stages`` are loaded or under way. ``band``: row tiles that are done for one tile of
    columns before the next, so that they share it in the L2 cache."""

    rows: int
    columns: int
    depth: int
    num_stages: int
    band: int = 32


def tile_rows(num_rows: int, num_experts: int) -> int:
    """The rows an expert has on average, between what one wgmma takes and two: see ``triton.tile_rows``."""
    return min(128, max(WARPGROUP_ROWS, power_of_two(-(-num_rows // num_experts))))


def tiles_for(rows: int, columns: int) -> Tiles:
    """128 columns: the accumulator is 128 registers a thread of one warpgroup. Steps of 128 bytes of K, the widest
    swizzle; three of them are 96 of 227 KiB of shared memory, so that two programs share an SM and one loads or
    stores while the other multiplies."""
    return Tiles(rows, 128 if columns > STEP else STEP, STEP, num_stages=3)


def _refuses_tiles(shape: Mapping[str, str], tiles: Tiles) -> str | None:
    if tiles.rows != int(shape["rows"]) or tiles.depth != STEP:
        return f"rows={tiles.rows}, depth={tiles.depth}: the plan has {shape['rows']} rows, the swizzle {STEP} of K"
    if tiles.columns % STEP or tiles.columns > 256:
        return f"columns={tiles.columns}: a wgmma has at most 256, in multiples of {STEP}"
    if tiles.rows * tiles.columns > MOST_SUMS:
        return f"rows * columns is at most {MOST_SUMS}: more sums than that spill"
    return None


TUNED = tuning.read("grouped_matmul/mosaic", Tiles, ("rows", "depth", "columns"), _refuses_tiles)


def max_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """No fewer than ``num_rows`` rows can make: all groups, the padding included, have one row too many, and all but
    the first begin at the last row of a pattern."""
    groups = min(num_experts + 1, num_rows)
    return (num_rows + (PATTERN - 1) * (groups - 1) - groups) // rows + groups


def plan_tiles(group_sizes: Array, num_rows: int, rows: int) -> Plan:
    """As ``triton.plan_tiles``, of tiles that begin at multiples of 8 rows, an expert's first at the last one up to its
    own rows. ``row`` is the first row that is the expert's; the tile begins at ``_pattern(row)`` and ends at most
    ``rows`` behind that."""
    e = jnp.arange(group_sizes.shape[0])
    row_ends = _sums(group_sizes, e[None] <= e[:, None])
    first = _pattern(row_ends - group_sizes)
    tiles = jnp.where(group_sizes > 0, -(-(row_ends - first) // rows), 0)
    tile_ends = _sums(tiles, e[None] <= e[:, None])
    i = jnp.arange(max_tiles(num_rows, group_sizes.shape[0], rows), dtype=jnp.int32)
    before = tile_ends[None] <= i[:, None]
    start = _sums(group_sizes, before)
    begin = _pattern(start) + (i - _sums(tiles, before)) * rows
    end = jnp.min(jnp.where(before, num_rows, row_ends[None]), axis=1)
    expert = jnp.sum(before.astype(jnp.int32), axis=1)
    return Plan(expert, jnp.maximum(begin, start), jnp.minimum(begin + rows, end), rows)


def _sums(x: Array, mask: Array) -> Array:
    """Of those of ``x`` [E] that each row of ``mask`` [P, E] has. [P]"""
    return jnp.sum(jnp.where(mask, x[None], 0), axis=1)


def _pattern(row: Array) -> Array:
    """The last multiple of 8 up to a row."""
    return row // PATTERN * PATTERN


def _body(plan: Any, x: Any, w: Any, out: Any, *, tiles: Tiles) -> None:
    num_experts, depth, columns = w.shape
    tile, n = place(lax.axis_index("program"), plan.row.shape[0], pl.cdiv(columns, tiles.columns), tiles.band)
    expert, row, row_end = plan.expert[tile], plan.row[tile], plan.row_end[tile]
    shape = tiles.rows, tiles.columns
    strips = tiles.columns // STEP, tiles.rows, STEP
    staged = plgpu.SMEM(strips, out.dtype, transforms=(SWIZZLE,))

    def store(sums: Array) -> None:
        to = partial(_store, sums.astype(out.dtype), out, row, row_end, n * tiles.columns)
        pl.run_scoped(to, staged, plgpu.SMEM(strips, out.dtype))

    @pl.when((row < row_end) & (expert < num_experts))
    def _() -> None:
        def product(acc: Any) -> Array:
            pipeline = plgpu.emit_pipeline(
                lambda _, x_tile, w_tile: plgpu.wgmma(acc, x_tile, w_tile),
                grid=(depth // tiles.depth,),
                in_specs=[
                    plgpu.BlockSpec((tiles.rows, tiles.depth), lambda k: (0, k), transforms=SWIZZLED, delay_release=1),
                    plgpu.BlockSpec(
                        (tiles.depth, tiles.columns), lambda k: (k, n), transforms=SWIZZLED, delay_release=1
                    ),
                ],
                max_concurrent_steps=tiles.num_stages,
            )
            pipeline(x.at[pl.ds(_pattern(row), tiles.rows)], w.at[expert])
            return acc[...]

        store(pl.run_scoped(product, plgpu.ACC(shape)))  # pyright: ignore[reportPrivateImportUsage]

    @pl.when((row < row_end) & (expert == num_experts))
    def _() -> None:
        store(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA))


def _store(values: Array, out: Any, row: Array, row_end: Array, column: Array, staged: Any, plain: Any) -> None:
    """``staged``, ``plain`` [columns / STEP, rows, STEP]: strips of the 128 bytes that a swizzle permutes, so that
    threads do not meet in a bank. Whole patterns go to memory from the swizzled one. Where an expert's rows begin or
    end inside of one, rows go from anywhere, and so from a copy that is not swizzled; it is made in runs of 16 bytes a
    thread, because the accumulator's own layout would have 8 rows meet in a bank.
    """
    strips, rows, width = staged.shape
    for strip in range(strips):
        staged[strip] = lax.slice(values, (0, strip * width), (rows, (strip + 1) * width))
    whole = (row % PATTERN == 0) & (row_end % PATTERN == 0)

    @pl.when(whole)
    def _() -> None:
        _send(staged, out, row, row_end, column, PATTERN)

    @pl.when(~whole)
    def _() -> None:
        layout = plgpu.Layout.SMEM_GMEM_COPY((rows, width), staged.dtype, swizzle=SWIZZLE.swizzle)
        for strip in range(strips):
            plain[strip] = plgpu.load(staged.at[strip], layout=layout)
        _send(plain, out, row, row_end, column, 1)


def _send(strips: Any, out: Any, row: Array, row_end: Array, column: Array, smallest: int) -> None:
    """TMA stores have sizes that are known beforehand: as many rows as there are go in powers of two, ``smallest`` of
    them at least."""
    count, width = row_end - row, strips.shape[2]
    done: Any = 0
    now = strips.shape[1]
    plgpu.commit_smem()
    while now >= smallest:

        @pl.when(count & now != 0)
        def _(now: int = now, done: Any = done) -> None:
            for strip in range(strips.shape[0]):
                to = out.at[pl.ds(row + done, now), pl.ds(column + strip * width, width)]
                plgpu.copy_smem_to_gmem(strips.at[strip, pl.ds(row - _pattern(row) + done, now)], to)

        done = done + (count & now)
        now //= 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def product(x: Array, weights: Weights, plan: Plan, tiles: Tiles | None = None, interpret: Any = False) -> Array:
    """[M, K] by [E, K, N] -> [M, N]. ``plan`` is of this file's ``plan_tiles``. ``tiles`` of its rows: None =
    those tuned, or ``tiles_for``."""
    _, depth, columns = weights.values.shape
    tiles = tiles or TUNED.get(rows=plan.rows, depth=depth, columns=columns) or tiles_for(plan.rows, columns)
    if tiles.rows != plan.rows:
        raise ValueError(f"the plan has tiles of {plan.rows} rows, the product of {tiles.rows}")
    kernel = plgpu.kernel(
        partial(_body, tiles=tiles),
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        grid=(plan.row.shape[0] * pl.cdiv(columns, tiles.columns),),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="grouped_matmul",
        interpret=interpret,
    )
    # Tiles of 8 rows: an array that TMA is to see as such has whole ones.
    return kernel(plan, jnp.pad(x, ((0, -x.shape[0] % PATTERN), (0, 0))), weights.values)


# -- what dispatch knows -----------------------------------------------------------------------------------------------


def refuses(setting: Setting) -> str | None:
    if setting.platform != "gpu" or setting.capability is None or setting.capability[0] != 9:
        return "it is for Hopper GPUs, the ones with wgmma"
    return refuses_arrays(setting)


def refuses_arrays(setting: Setting) -> str | None:
    """What it refuses anywhere."""
    if setting.dtype not in DTYPES or setting.weight_dtype != setting.dtype:
        return f"x and weights are both of {' or '.join(DTYPES)}"
    if setting.depth % STEP:
        return f"K is a multiple of {STEP}"
    if setting.columns % 8:
        return "N is a multiple of 8, because rows that TMA reads are multiples of 16 bytes"
    if setting.columns > STEP and setting.columns % STEP:
        return f"N is at most {STEP} or a multiple of it: so many columns go together in a swizzle"
    return None


def implementation(
    name: str, refuses: Callable[[Setting], str | None], tiles: Tiles | None = None, interpret: Any = False
) -> GroupedMatmul:
    """With ``tiles`` for all products, or those of ``tiles_for``."""

    def plan(group_sizes: Array, num_rows: int) -> Plan:
        rows = tile_rows(num_rows, group_sizes.shape[0]) if tiles is None else tiles.rows
        return plan_tiles(group_sizes, num_rows, rows)

    return GroupedMatmul(name, plan, partial(product, tiles=tiles, interpret=interpret), refuses)


IMPLEMENTATION = implementation("mosaic", refuses)
