"""The Mosaic kernel: run on a Hopper GPU if that is what is tested (JAXSERVE_TEST_PLATFORM=gpu), elsewhere by jax's
interpreter, which finds races; and compiled for Hopper GPUs that are not there.

The interpreter does not have: weights as the left operand of a wgmma from registers, an accumulator that starts at a
value, the registers handed from one warpgroup to others, and what swizzles do to memory.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from mosaic_interpreter import copy_whole_tiles_only, racing
from on_device import CAPABILITY, PLATFORM
from test_paged_attention import (
    Case,
    Sequence,
    assert_conforms,
    batches,
    dense,
    make_problem,
    part_of,
    programs,
    solve,
)

from pallas_kernels.dispatch import PAGED_ATTENTION
from pallas_kernels.kv_write import HeadNorm, Inputs
from pallas_kernels.paged_attention import Ragged, Scoring, Setting, Shape, mosaic
from sharding import aot, build_mesh
from sharding.audit import audit
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

HOPPER = Setting("gpu", (9, 0), "bfloat16", "bfloat16", 128, 4, 16)
ON_HOPPER = mosaic.IMPLEMENTATION.refuses(HOPPER._replace(platform=PLATFORM, capability=CAPABILITY)) is None
NAME = "mosaic, two thread blocks"
FEW_BLOCKS = mosaic.make(mosaic.Config(thread_blocks=2, interpret=None if ON_HOPPER else racing()))
NAMES = (NAME, mosaic.IMPLEMENTATION.name) if ON_HOPPER else (NAME,)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # products with NaN keys


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAGED_ATTENTION, NAME, FEW_BLOCKS)
    copy_whole_tiles_only(monkeypatch)


MIXED = Case(40, 3, 20, 16, 1, 4, 64, dtype=jnp.bfloat16)
WINDOW = Case(20, 3, 12, 32, 1, 7, 64, window=200, softcap=2.0, dtype=jnp.float16)
DECODE = Case(4, 4, 20, 16, 2, 4, 64, one_token_each=True, dtype=jnp.bfloat16)
DECODE_WINDOW = replace(DECODE, kv_heads=1, group=7, head_dim=96, window=40, softcap=3.0)
SEVERAL_TILES = Case(130, 2, 9, 16, 1, 1, 128, dtype=jnp.bfloat16)
LARGE_BLOCKS = Case(2, 2, 2, 256, 1, 3, 64, one_token_each=True, dtype=jnp.bfloat16)


@pytest.mark.parametrize("case", [MIXED, WINDOW, DECODE, DECODE_WINDOW], ids=["mixed", "window", "decode", "7"])
def test_conforms(case: Case) -> None:
    @settings(max_examples=3)
    @given(batches(case))
    def conforms(batch: tuple[list[Sequence], int]) -> None:
        assert_conforms(NAME, case, make_problem(case, *batch))

    conforms()


@pytest.mark.parametrize(
    ("case", "sequences"),
    [
        (MIXED, [Sequence(30, 284), Sequence(1, 257), Sequence(9, 9)]),
        (WINDOW, [Sequence(17, 329), Sequence(1, 384), Sequence(2, 129)]),
        (SEVERAL_TILES, [Sequence(129, 140), Sequence(1, 128)]),
        (LARGE_BLOCKS, [Sequence(1, 290), Sequence(1, 512)]),
        (DECODE, [Sequence(1, 320), Sequence(1, 1), Sequence(1, 256)]),
    ],
    ids=["mixed", "window", "several tiles", "large blocks", "decode"],
)
def test_more_than_one_of_each(case: Case, sequences: list[Sequence]) -> None:
    """Tiles of queries, tiles of keys, items of one tile, tiles that a window cuts off on the left."""
    assert_conforms(NAME, case, make_problem(case, sequences, 0))


SIZES = {
    "heads of 64": Case(26, 4, 13, 16, 2, 1, 64, dtype=jnp.bfloat16),
    "heads of 64 by 4": Case(26, 4, 4, 64, 1, 4, 64, softcap=3.0, dtype=jnp.float16),
    "heads of 64 by 7": Case(26, 4, 13, 16, 1, 7, 64, window=100, dtype=jnp.bfloat16),
    "heads of 128": Case(26, 4, 4, 64, 1, 1, 128, window=40, softcap=2.0, dtype=jnp.bfloat16),
    "heads of 128 by 4": Case(26, 4, 13, 16, 1, 4, 128, dtype=jnp.bfloat16),
    "heads of 128 by 7": Case(26, 4, 4, 64, 1, 7, 128, dtype=jnp.float16),
}


SLOW = ("heads of 64", "heads of 128 by 4")
"""For the interpreter."""


@pytest.mark.parametrize("one_token_each", [False, True], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=label, marks=pytest.mark.slow if label in SLOW and not ON_HOPPER else ())
        for label, case in SIZES.items()
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_in_use(name: str, case: Case, one_token_each: bool) -> None:
    """Queries that begin at odd rows; a sequence without a token. (A cache of fp8 is refused.)"""
    sequences = [Sequence(3, 75), Sequence(1, 131), Sequence(0, 5), Sequence(21, 203)]
    if one_token_each:
        case, sequences = replace(case, num_tokens=4, one_token_each=True), [Sequence(1, n) for _, n in sequences]
    assert_conforms(name, case, make_problem(case, sequences, 0))


@pytest.mark.parametrize("case", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", NAMES)
def test_what_runs(name: str, case: Case) -> None:
    """On a Hopper GPU what is compiled for it, elsewhere the interpreter."""
    assert (CAPABILITY == mosaic.HOPPER) == ON_HOPPER
    problem = make_problem(case, [Sequence(1, 1)], 0)
    shapes = PAGED_ATTENTION[name].cache_shapes(case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    caches = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes]
    program = programs(name, case)[1].lower(problem.q, *caches, problem.ragged).as_text()
    kernels = 1 if case.one_token_each else 2
    assert len(re.findall(r"custom_call @mosaic_gpu", program)) == (kernels if ON_HOPPER else 0)
    assert ON_HOPPER or "callback" in program


@pytest.mark.parametrize("group", [1, 4, 7])
def test_unwritten_keys_of_the_block_that_a_short_window_begins_in(group: int) -> None:
    """It stands for those before it in its tile, and 0 * NaN is NaN."""
    case = Case(24, 3, 20, 32, 1, group, 64, window=8, dtype=jnp.bfloat16)
    assert_conforms(NAME, case, make_problem(case, [Sequence(19, 227), Sequence(1, 203), Sequence(2, 100)], 0))


@pytest.mark.parametrize(
    ("head_dim", "window", "keys", "block_size"),
    [(128, 8, 203, 16), (256, 3, 203, 16), (256, 40, 240, 64), (64, 40, 500, 64)],
)
def test_the_same_in_decoding(head_dim: int, window: int, keys: int, block_size: int) -> None:
    case = replace(DECODE, num_tokens=2, num_seqs=2, block_size=block_size, head_dim=head_dim, window=window)
    assert_conforms(NAME, case, make_problem(case, [Sequence(1, keys)], 0))


@pytest.mark.parametrize(
    ("case", "sequence", "row", "key"),
    [(MIXED, Sequence(30, 284), 0, 255), (WINDOW, Sequence(17, 329), 16, 128)],
    ids=["the last of a tile", "the first of a tile"],
)
def test_the_only_key_of_a_tile_that_a_row_must_not_see(case: Case, sequence: Sequence, row: int, key: int) -> None:
    """It would outweigh all others."""
    problem = make_problem(case, [sequence], 0)
    problem.keys[0][key] = (2 * problem.q[row, :, 0]).astype(case.dtype)
    assert_conforms(NAME, case, problem)


def test_a_context_cut_in_two_merges_exactly() -> None:
    problem = make_problem(MIXED, [Sequence(2, 301), Sequence(1, 1), Sequence(20, 20)], 0)
    parts = [solve(NAME, MIXED, part_of(problem, rank)) for rank in range(2)]
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    weights = np.exp(lses - lses.max(0))
    merged = (outs * weights[..., None]).sum(0) / weights.sum(0)[..., None]
    expected, _ = dense(MIXED, problem)
    assert np.linalg.norm(merged - expected) <= MIXED.tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(("num_tokens", "window"), [(24, None), (160, 20)])
def test_tiles_begin_where_they_can_be_copied_and_have_every_row_once(num_tokens: int, window: int | None) -> None:
    case = Case(num_tokens, 12, 20, 16, 1, 1, 1, window=window)

    @settings(max_examples=25)
    @given(batches(case), st.integers(1, 16))
    @example(([Sequence(2, 2)] * 12, 0), 63)
    def holds(batch: tuple[list[Sequence], int], group: int) -> None:
        ragged = Ragged._make(map(jnp.asarray, make_problem(case, *batch).ragged))
        tiles, _ = mosaic.prefill_tiles(ragged, case.num_tokens, group, case.shape)
        starts, visible = np.asarray(ragged.cu_q_lens), np.asarray(ragged.visible)
        rows: list[int] = []
        for tile in map(mosaic.Tiles._make, np.stack(tiles, axis=1)):
            if not tile.end:
                continue
            assert tile.row % mosaic.TILING == 0
            begin, end = starts[tile.sequence : tile.sequence + 2] * group
            rows += (mine := range(max(tile.row, begin), min(tile.row + mosaic.TILE_ROWS, end)))
            assert (tile.high, tile.end) == (visible[mine[0] // group], visible[mine[-1] // group])
            if window is not None:
                assert (tile.first, tile.low) == tuple(max(0, n - window) for n in (tile.high, tile.end))
        assert rows == [row for a, b in pairwise(starts) if b - a > 1 for row in range(a * group, b * group)]

    holds()


def test_items_cover_every_key_of_every_tile_once() -> None:
    rng = np.random.default_rng(0)
    tables, starts = jnp.zeros((9, 700), jnp.int32), jnp.arange(10, dtype=jnp.int32)
    lengths = rng.choice([0, 1, 127, 128, 129, 3000, 11000], 9).astype(np.int32)
    window = 700
    ragged = Ragged(starts[:9], starts, jnp.asarray(lengths), tables, jnp.asarray(lengths))
    work = mosaic.plan(ragged, 9, Shape(16, window)).decode
    items = [mosaic.Item(*row) for row in np.asarray(work.items)[: int(work.total[0])]]
    assert [i.end - i.first for i in items] == sorted((i.end - i.first for i in items), reverse=True)
    assert sorted(i.slot for i in items) == list(range(len(items)))
    for sequence, length in enumerate(lengths):
        mine = sorted((i for i in items if i.sequence == sequence), key=lambda i: i.slot)
        seen = [key for i in mine for key in range(i.first, i.end)]
        assert seen == list(range(max(0, length - window), length))
        assert [i.slot for i in mine] == list(range(work.slots[sequence], work.slots[sequence] + work.counts[sequence]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu", "capability": None}, "Hopper"),
        ({"capability": (8, 0)}, "Hopper"),
        ({"capability": (10, 0)}, "Hopper"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "bfloat16"),
        ({"kv_dtype": "float8_e4m3fn"}, "bfloat16"),
        ({"head_dim": 80}, "head_dim"),
        ({"group": 65}, "64 query heads"),
        ({"block_size": 8}, "block_size"),
        ({"block_size": 48}, "block_size"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_run(change: dict[str, Any], reason: str) -> None:
    refused = mosaic.IMPLEMENTATION.refuses(HOPPER._replace(**change))
    assert refused is not None and reason in refused


@pytest.mark.parametrize(
    "change", [{}, {"dtype": "float16", "kv_dtype": "float16"}, {"head_dim": 64, "block_size": 256}]
)
def test_runs_the_rest(change: dict[str, Any]) -> None:
    assert mosaic.IMPLEMENTATION.refuses(HOPPER._replace(**change)) is None


# -- GPUs that are not there -------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
PTXAS = re.compile(
    r"entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, (\d+) bytes spill", re.DOTALL
)


def compiled_layers(target: str, case: Case, layers: int) -> tuple[jax.stages.Compiled, jax.sharding.Mesh]:
    """A program that writes and attends in so many layers, its caches donated."""
    mesh = build_mesh(MeshConfig(), aot.devices(Cluster.parse(target)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    implementation, num_tokens = mosaic.IMPLEMENTATION, case.num_tokens

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def step(caches: list[list[jax.Array]], q: jax.Array, k: jax.Array, ragged: Ragged) -> object:
        inputs = Inputs(jnp.stack([k, k, k], axis=2), ragged.slot_mapping)
        plan, written = implementation.plan(ragged, num_tokens, case.shape), []
        for keys, values in caches:
            _, keys, values = implementation.kv_write.write(keys, values, inputs, HeadNorm(), case.scoring)
            out, _ = implementation.attend(q, keys, values, plan, case.shape, case.scoring)
            written.append([keys, values])
            q = q + out.astype(q.dtype)
        return written, q

    shapes = implementation.cache_shapes(4096, case.block_size, case.kv_heads, case.head_dim)
    caches = [[of(case.dtype, *shape) for shape in shapes] for _ in range(layers)]
    sizes = [(num_tokens,), (case.num_seqs + 1,), (case.num_seqs,), (case.num_seqs, case.table_width), (num_tokens,)]
    ragged = Ragged._make(of(jnp.int32, *size) for size in sizes)
    rows = (num_tokens, case.kv_heads)
    q, k = of(case.dtype, *rows, case.group, case.head_dim), of(case.dtype, *rows, case.head_dim)
    with jax.set_mesh(mesh), aot.not_cached():
        program = jax.jit(step, donate_argnums=0).lower(caches, q, k, ragged)
        return program.compile(compiler_options=aot.COMPILER_OPTIONS), mesh


@needs_compiler
@pytest.mark.parametrize(
    ("target", "case", "layers"),
    [
        ("h200:1", Case(256, 8, 512, 16, 2, 4, 128, dtype=jnp.bfloat16), 2),
        ("h100:1", Case(256, 8, 512, 64, 2, 7, 256, window=1000, softcap=30.0, dtype=jnp.float16), 1),
    ],
    ids=["h200", "h100"],
)
def test_compiles_without_spills_and_leaves_the_caches_in_place(
    target: str, case: Case, layers: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled, mesh = compiled_layers(target, case, layers)
    spills = {name: (int(stores), int(loads)) for name, stores, loads in PTXAS.findall(capfd.readouterr().out)}
    assert spills == {"paged_attention_decode": (0, 0), "paged_attention_prefill": (0, 0)}
    found = audit(compiled, mesh, kept=("caches",))
    assert found.copies == () and found.collectives == ()
    assert [p.aliased for p in found.parameters if p.name.startswith("caches")] == [True] * 2 * layers
    text = compiled.as_text() or ""
    assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) == 2 * layers
    assert len(re.findall(r"\bsort\(", text)) == 2, "work is planned once for all layers"


def test_scoring_must_keep_the_order_of_scores() -> None:
    shape = Shape(16, one_token_each=True)
    problem = make_problem(DECODE, [Sequence(1, 1)], 0)
    caches = [jnp.zeros(s, jnp.bfloat16) for s in FEW_BLOCKS.cache_shapes(2, 16, 2, 64)]
    plan = FEW_BLOCKS.plan(Ragged._make(map(jnp.asarray, problem.ragged)), 4, shape)
    with pytest.raises(ValueError, match="scale"):
        FEW_BLOCKS.attend(jnp.asarray(problem.q), caches[0], caches[1], plan, shape, Scoring(-1.0))
