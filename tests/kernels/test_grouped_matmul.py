"""Every implementation of the grouped matmul against float64, with all that nobody may read at NaN; and its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from mosaic_interpreter import copy_whole_tiles_only, racing
from on_device import CAPABILITY, INTERPRET, PLATFORM

from pallas_kernels.grouped_matmul import NARROW, GroupedMatmul, Setting, Weights, mosaic, reference, triton
from pallas_kernels.triton_tiles import SMALLEST
from sharding import aot, build_mesh
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

TRITON = triton.INTERPRETED if INTERPRET else triton.IMPLEMENTATION
MOSAIC_REFUSES, RACING = (mosaic.refuses_arrays, racing()) if INTERPRET else (mosaic.refuses, None)
IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        reference.IMPLEMENTATION,
        TRITON,
        triton.implementation("triton's own tiles", TRITON.refuses, interpret=INTERPRET),
        mosaic.implementation("mosaic", MOSAIC_REFUSES, mosaic.Tiles(64, 128, 64, 2, band=2), RACING),
        mosaic.implementation("mosaic's own tiles", MOSAIC_REFUSES, interpret=RACING),
    )
}


@pytest.fixture(autouse=True)
def whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_whole_tiles_only(monkeypatch)


@dataclass(frozen=True)
class Case:
    """Static sizes, so that what is compiled for a case serves all of its examples."""

    num_rows: int
    depth: int
    columns: int
    num_experts: int
    dtype: Any = jnp.float32
    weight_dtype: Any = None
    """None = ``dtype``."""

    @property
    def weights_are(self) -> jnp.dtype:
        return jnp.dtype(self.weight_dtype or self.dtype)

    @property
    def narrow(self) -> bool:
        return str(self.weights_are) in NARROW

    @property
    def setting(self) -> Setting:
        names = str(jnp.dtype(self.dtype)), str(self.weights_are)
        return Setting(PLATFORM, CAPABILITY, *names, self.num_experts, self.depth, self.columns)

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == jnp.float32 else 1e-2


CASES = {
    "whole tiles": Case(64, 32, 32, 4),
    "nothing is whole": Case(37, 40, 23, 3),
    "many row tiles": Case(81, 16, 33, 2),
    "one expert": Case(18, 24, 16, 1),
    "more experts than rows": Case(5, 24, 40, 12),
    "one row": Case(1, 16, 16, 4),
    "bfloat16": Case(37, 40, 23, 3, jnp.bfloat16),
    "float16": Case(37, 40, 23, 3, jnp.float16),
    "int8": Case(37, 40, 23, 3, jnp.bfloat16, jnp.int8),
    "int8 by float32": Case(37, 40, 23, 3, jnp.float32, jnp.int8),
    "fp8": Case(37, 40, 23, 3, jnp.bfloat16, jnp.float8_e4m3fn),
    "long rows": Case(90, 128, 192, 3, jnp.bfloat16),
    "tall tiles": Case(290, 64, 64, 2, jnp.bfloat16),
    "long rows, float16": Case(5, 64, 40, 12, jnp.float16),
}
RUNS = [
    (name, label)
    for name, implementation in IMPLEMENTATIONS.items()
    for label, case in CASES.items()
    if implementation.refuses(case.setting) is None
]


@st.composite
def group_sizes(draw: st.DrawFn, num_rows: int, num_experts: int) -> list[int]:
    """Often empty groups, one group with everything, no rows at all, sums below M."""
    total = draw(st.sampled_from([0, num_rows, num_rows]) | st.integers(0, num_rows))
    cut = st.sampled_from([0, total, total // 2]) | st.integers(0, total)
    cuts = sorted(draw(st.lists(cut, min_size=num_experts - 1, max_size=num_experts - 1)))
    return np.diff([0, *cuts, total]).tolist()


def make_weights(case: Case, rng: np.random.Generator) -> Weights:
    shape = case.num_experts, case.depth, case.columns
    if not case.narrow:
        return Weights(rng.standard_normal(shape).astype(case.weights_are))  # pyright: ignore
    values = rng.integers(-127, 128, shape) if case.weights_are == jnp.int8 else rng.standard_normal(shape)
    scales = rng.uniform(0.5, 2.0, (case.num_experts, case.columns)).astype(np.float32)
    return Weights(values.astype(case.weights_are), scales)  # pyright: ignore


def expected(x: np.ndarray, weights: Weights, sizes: list[int]) -> np.ndarray:
    """One expert after the other, in float64; zero behind the last."""
    out = np.zeros((x.shape[0], weights.values.shape[2]))
    start = 0
    for expert, size in enumerate(sizes):
        w = np.asarray(weights.values[expert]).astype(np.float64)
        if weights.scales is not None:
            w *= np.asarray(weights.scales[expert])[None]
        out[start : start + size] = x[start : start + size].astype(np.float64) @ w
        start += size
    return out


@cache
def program(name: str, num_rows: int) -> Any:
    implementation = IMPLEMENTATIONS[name]

    @jax.jit
    def run(x: jax.Array, weights: Weights, sizes: jax.Array) -> jax.Array:
        return implementation.product(x, weights, implementation.plan(sizes, num_rows))

    return run


@pytest.mark.parametrize(("name", "label"), RUNS)
def test_conforms(name: str, label: str) -> None:
    case = CASES[label]

    @settings(max_examples=8)
    @given(group_sizes(case.num_rows, case.num_experts), st.integers(0, 2**32 - 1))
    def conforms(sizes: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((case.num_rows, case.depth)).astype(case.dtype)
        total = sum(sizes)
        x[total:] = np.nan
        weights = make_weights(case, rng)
        out = program(name, case.num_rows)(x, weights, np.array(sizes, np.int32))
        assert out.dtype == case.dtype and out.shape == (case.num_rows, case.columns)
        out, wanted = np.asarray(out).astype(np.float64), expected(x, weights, sizes)
        assert np.linalg.norm(out - wanted) <= case.tolerance * np.linalg.norm(wanted)
        assert not out[total:].any()

    conforms()


@pytest.mark.parametrize("name", [TRITON.name, "mosaic"])
def test_experts_without_rows_are_not_read(name: str) -> None:
    case = CASES["long rows"]
    if reason := IMPLEMENTATIONS[name].refuses(case.setting):
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    weights = make_weights(case, rng)
    np.asarray(weights.values)[[0, 2]] = np.nan
    x = rng.standard_normal((case.num_rows, case.depth)).astype(case.dtype)
    sizes = [0, 81, 0]
    out = np.asarray(program(name, case.num_rows)(x, weights, np.array(sizes, np.int32))).astype(np.float64)
    wanted = expected(x, weights, sizes)
    assert np.linalg.norm(out - wanted) <= case.tolerance * np.linalg.norm(wanted)


# -- the plan ----------------------------------------------------------------------------------------------------------

PLANS = [(64, 4, 16), (37, 3, 16), (5, 12, 16), (1, 1, 16), (300, 9, 32), (40, 128, 16)]


@pytest.mark.parametrize(("num_rows", "num_experts", "rows"), PLANS)
@pytest.mark.parametrize(("plan_tiles", "aligned"), [(triton.plan_tiles, 1), (mosaic.plan_tiles, 8)])
def test_tiles_hold_every_row_once_and_never_mix_experts(
    plan_tiles: Callable[[jax.Array, int, int], triton.Plan], aligned: int, num_rows: int, num_experts: int, rows: int
) -> None:
    """``aligned``: what the first row is a multiple of that a tile loads."""
    plan = jax.jit(plan_tiles, static_argnums=(1, 2))

    @settings(max_examples=40)
    @given(group_sizes(num_rows, num_experts))
    def hold(sizes: list[int]) -> None:
        tiles = plan(np.array(sizes, np.int32), num_rows, rows)
        owner = np.full(num_rows, -1)
        for expert, row, row_end in zip(tiles.expert, tiles.row, tiles.row_end, strict=True):
            if row < row_end:
                assert row_end - row // aligned * aligned <= rows
                assert (owner[row:row_end] == -1).all()
                owner[row:row_end] = expert
        whose = [*sizes, num_rows - sum(sizes)]
        np.testing.assert_array_equal(owner, np.repeat(np.arange(num_experts + 1), whose))
        ends = np.cumsum(whose)
        starts = ends - whose
        fewest = np.where(ends > starts, -(-(ends - starts // aligned * aligned) // rows), 0)
        assert np.sum(np.asarray(tiles.row < tiles.row_end)) == np.sum(fewest)

    hold()


@pytest.mark.parametrize(("num_rows", "num_experts", "rows"), PLANS)
def test_there_is_room_for_the_worst_case_and_no_more(num_rows: int, num_experts: int, rows: int) -> None:
    """Of one row each, but the last group, which has the rest."""
    groups = min(num_experts + 1, num_rows)
    sizes = np.zeros(num_experts + 1, np.int32)
    sizes[: groups - 1] = 1
    sizes[groups - 1] = num_rows - groups + 1
    assert triton.max_tiles(num_rows, num_experts, rows) == np.sum(-(-sizes // rows))


# -- tiles -------------------------------------------------------------------------------------------------------------

A100_SHARED_BYTES = 163 << 10


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 16, 64, 300, 4096, 65536])
@pytest.mark.parametrize(("num_experts", "depth", "columns"), [(8, 4096, 14336), (128, 2048, 768), (3, 40, 24)])
def test_tiles_fit(itemsize: int, num_rows: int, num_experts: int, depth: int, columns: int) -> None:
    tiles = triton.tiles_for(triton.tile_rows(num_rows, num_experts), depth, columns, itemsize)
    sizes = tiles.rows, tiles.columns, tiles.depth, tiles.num_warps
    assert all(size & (size - 1) == 0 for size in sizes) and min(sizes[:3]) >= SMALLEST
    step = tiles.rows * tiles.depth * max(itemsize, 2) + tiles.depth * tiles.columns * itemsize
    assert step * tiles.num_stages <= A100_SHARED_BYTES
    assert tiles.rows * tiles.columns <= 64 * 32 * tiles.num_warps


def test_a_plan_serves_products_with_tiles_of_its_rows() -> None:
    sizes, x, weights = jnp.array([3, 5]), jnp.ones((8, 16)), Weights(jnp.ones((2, 16, 16)))
    plan = triton.plan_tiles(sizes, 8, 32)
    with pytest.raises(ValueError, match="the plan has tiles of 32 rows, the product of 16"):
        triton.product(x, weights, plan, triton.SMALL, interpret=True)
    with pytest.raises(ValueError, match="the plan has tiles of 32 rows, the product of 64"):
        mosaic.product(x, weights, plan, mosaic.Tiles(64, 64, 64, 2))


def test_tuned_tiles_that_would_spill_are_refused() -> None:
    shape = {"rows": "128", "depth": "4096", "columns": "14336"}
    assert mosaic.TUNED.refuses(shape, mosaic.Tiles(128, 128, 64, 3)) is None
    assert "spill" in str(mosaic.TUNED.refuses(shape, mosaic.Tiles(128, 256, 64, 3)))


# -- what dispatch is told ---------------------------------------------------------------------------------------------

H100 = Setting("gpu", (9, 0), "bfloat16", "bfloat16", 8, 4096, 14336)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (H100, None),
        (H100._replace(weight_dtype="int8"), None),
        (H100._replace(weight_dtype="float8_e4m3fn"), None),
        (H100._replace(platform="cpu", capability=None), "NVIDIA"),
        (H100._replace(capability=(7, 5)), "8.0"),
        (H100._replace(capability=(8, 0), weight_dtype="float8_e4m3fn"), "8.9"),
        (H100._replace(dtype="float32"), "weights are of the dtype of x"),
        (H100._replace(dtype="int8"), "x is of"),
        (H100._replace(weight_dtype="int8", num_experts=50), "overflow"),
        (H100._replace(weight_dtype="int8", num_experts=80), None),
    ],
    ids=str,
)
def test_what_triton_refuses(setting: Setting, reason: str | None) -> None:
    said = triton.IMPLEMENTATION.refuses(setting)
    assert said is None if reason is None else said is not None and reason in said
    assert triton.INTERPRETED.refuses(H100) == "the interpreter is for CPUs"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (H100, None),
        (H100._replace(platform="cpu", capability=None), "Hopper"),
        (H100._replace(capability=(10, 0)), "Hopper"),
        (H100._replace(weight_dtype="int8"), "both"),
        (H100._replace(dtype="float32", weight_dtype="float32"), "both"),
        (H100._replace(depth=4000), "multiple of 64"),
        (H100._replace(columns=4001), "multiple of 8"),
        (H100._replace(columns=40), None),
        (H100._replace(columns=136), "at most 64"),
    ],
    ids=str,
)
def test_what_mosaic_refuses(setting: Setting, reason: str | None) -> None:
    said = mosaic.IMPLEMENTATION.refuses(setting)
    assert said is None if reason is None else said is not None and reason in said


# -- GPUs that are not there -------------------------------------------------------------------------------------------
# That Triton's kernels compile is test_chosen_compiles.py's matter.

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
FAIL_ON_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}

MIXTRAL = Case(4096, 4096, 14336, 8, jnp.bfloat16)
QWEN3 = Case(4096, 2048, 768, 128, jnp.bfloat16)
QWEN3_DECODE = replace(QWEN3, num_rows=64)
FEW, ODD = replace(QWEN3_DECODE, num_rows=5, columns=40), replace(QWEN3, num_rows=90)


def compiled(implementation: GroupedMatmul, gpu: str, case: Case) -> str:
    """The program of a plan and a product for a GPU; an error if registers of Triton's kernel spill."""
    target = Cluster.parse(f"{gpu}:1")
    setting = case.setting._replace(platform="gpu", capability=target.gpu.chip.capability)
    assert implementation.refuses(setting) is None
    mesh = build_mesh(MeshConfig(), aot.devices(target))

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    weights = Weights(
        array((case.num_experts, case.depth, case.columns), case.weights_are),
        array((case.num_experts, case.columns), jnp.float32) if case.narrow else None,
    )

    def run(x: jax.Array, weights: Weights, sizes: jax.Array) -> jax.Array:
        return implementation.product(x, weights, implementation.plan(sizes, case.num_rows))

    inputs = array((case.num_rows, case.depth), case.dtype), weights, array((case.num_experts,), jnp.int32)
    with jax.set_mesh(mesh), aot.not_cached():
        program = jax.jit(run).lower(*inputs).compile({**aot.COMPILER_OPTIONS, **FAIL_ON_SPILLS})
    return program.as_text() or ""


@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "case"), [("h100", QWEN3_DECODE), ("h100", FEW), ("h100", ODD), ("h200", MIXTRAL)], ids=str
)
def test_mosaic_compiles_without_spills(
    gpu: str, case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    assert "grouped_matmul" in compiled(mosaic.IMPLEMENTATION, gpu, case)
    said = "".join(capfd.readouterr())
    assert "0 bytes spill stores, 0 bytes spill loads" in said
