"""The Triton style of paged attention: its plan by numpy, its real tiles in the interpreter, and what is compiled for
GPUs that are not there. That its kernels are right is shown with all the others, in test_paged_attention.py."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence as Listing
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import NO_SPILLS, failures, kernels_of, mesh_of
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec
from test_paged_attention import CASES, Case, Sequence, batches, dense, make_problem, programs, solve

from pallas_kernels.dispatch import PAGED_ATTENTION
from pallas_kernels.kv_write import HeadNorm, Inputs
from pallas_kernels.paged_attention import Ragged, Scoring, Setting, Shape, triton
from sharding import aot, build_mesh
from sharding.audit import audit
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

# -- the plan ----------------------------------------------------------------------------------------------------------

PLANNED = {
    "mixed": CASES["plain"],
    "window": CASES["window"],
    "several tiles": CASES["several tiles"],
    "decode": CASES["decode many"],
    "decode window": CASES["decode window"],
}


def planned(ragged: Ragged, num_tokens: int, shape: Shape, tiling: triton.Tiling) -> triton.Plan:
    plan = jax.jit(triton.plan, static_argnums=(1, 2, 3))(ragged, num_tokens, shape, tiling)
    return jax.tree.map(np.asarray, plan)


@pytest.mark.parametrize("case", PLANNED.values(), ids=PLANNED)
def test_every_key_that_a_token_sees_is_in_one_item(case: Case) -> None:
    @settings(max_examples=25)
    @given(batches(case))
    def is_in_one(batch: tuple[list[Sequence], int]) -> None:
        ragged = make_problem(case, *batch).ragged
        plan = planned(ragged, case.num_tokens, case.shape, triton.SMALL)
        keys = Counter[tuple[int, int, int]]()
        for work in plan.works:
            for s, row, row_end, low, high, _ in zip(*work.items, strict=True):
                keys.update((int(s), t, k) for t in range(row, row_end) for k in range(low, high))
        starts, window = np.asarray(ragged.cu_q_lens), case.window or case.block_size * case.table_width
        for s, start, end in zip(range(case.num_seqs), starts, starts[1:], strict=False):
            for t in range(start, end):
                seen = range(max(0, ragged.visible[t] - window), ragged.visible[t])
                assert all(keys[s, t, k] == 1 for k in seen)
        assert max(keys.values(), default=1) == 1
        assert {t for _, t, _ in keys} == set(range(starts[-1]))

    is_in_one()


@pytest.mark.parametrize("case", PLANNED.values(), ids=PLANNED)
def test_partial_results_have_places_of_their_own(case: Case) -> None:
    @settings(max_examples=25)
    @given(batches(case))
    def have_places(batch: tuple[list[Sequence], int]) -> None:
        ragged = make_problem(case, *batch).ragged
        plan = planned(ragged, case.num_tokens, case.shape, triton.SMALL)
        cuts = (triton.SMALL.decode,) if case.one_token_each else (triton.SMALL.few, triton.SMALL.many)
        for cut, work in zip(cuts, plan.works, strict=True):
            assert work.merges is not None
            live = work.items.row < work.items.row_end
            sharers = Counter(work.items.row[live].tolist())
            parts = [(slot, row) for slot, row in zip(work.items.slot[live], work.items.row[live], strict=True)]
            merged = [
                (slot + i, row)
                for row, row_end, slot, count in zip(*work.merges, strict=True)
                for i in range(count if row < row_end else 0)
            ]
            assert sorted(merged) == sorted((slot, row) for slot, row in parts if sharers[row] > 1)
            assert all(slot == -1 for slot, row in parts if sharers[row] == 1)
            assert [slot for slot, _ in merged] == list(range(len(merged)))
            assert len(merged) <= cut.parts + len(work.merges.row)

    have_places()


def decodes(kv_lens: Listing[int], block_size: int = 16, width: int | None = None) -> Ragged:
    """Of a plan only what it looks at: lengths."""
    size = len(kv_lens)
    lens = np.array(kv_lens, np.int32)
    zeros = np.zeros(size, np.int32)
    tables = np.zeros((size, width or -(-max(kv_lens) // block_size)), np.int32)
    return Ragged(zeros, np.arange(size + 1, dtype=np.int32), lens, tables, lens)  # pyright: ignore


def test_a_long_sequence_beside_short_ones_is_cut_up() -> None:
    """A whale of 131,072 keys beside 255 sequences of 64."""
    (work,) = planned(decodes([64] * 255 + [131072]), 256, Shape(16, one_token_each=True), triton.Tiling()).works
    lengths = (work.items.high - work.items.low)[work.items.row < work.items.row_end]
    total = 255 * 64 + 131072
    assert lengths.sum() == total
    assert lengths.max() <= total / 256 + 64
    assert len(lengths) < 255 + 256


def test_sequences_that_fill_the_gpu_are_left_whole() -> None:
    (work,) = planned(decodes([4000, 4096] * 128), 256, Shape(16, one_token_each=True), triton.Tiling()).works
    live = work.items.row < work.items.row_end
    assert live.sum() == 256 and (work.items.slot == -1).all()
    assert work.merges is not None and (work.merges.row == work.merges.row_end).all()


def test_nothing_is_merged_where_contexts_are_short() -> None:
    (work,) = planned(decodes([256] * 4), 4, Shape(16, one_token_each=True), triton.Tiling()).works
    assert work.merges is None and work.items.row.shape == (4,)


def test_a_short_chunk_with_a_long_past_is_cut_up() -> None:
    past, chunk = 32768, 128
    visible = np.arange(past, past + chunk, dtype=np.int32) + 1
    tables = np.zeros((1, (past + chunk) // 16), np.int32)
    ragged = Ragged(np.zeros(chunk, np.int32), np.array([0, chunk], np.int32), visible[-1:], tables, visible)  # pyright: ignore
    few, many = planned(ragged, chunk, Shape(16), triton.Tiling()).works
    assert (few.items.row == few.items.row_end).all()
    live = many.items.row < many.items.row_end
    assert 24 <= live.sum() <= 34
    assert (many.items.high - many.items.low)[live].max() <= 2 * (past + chunk) / 32 + 64


def test_live_items_come_first_and_of_a_sequence_the_last() -> None:
    """Programs start in the order of items, and those of dead ones only return."""
    (work,) = planned(decodes([4096, 64]), 2, Shape(16, one_token_each=True), triton.Tiling()).works
    live = work.items.row < work.items.row_end
    assert 2 < live.sum() < len(live) and not live[live.sum() :].any()
    assert list(work.items.sequence[live]) == [1, *[0] * (live.sum() - 1)]
    assert (np.diff(work.items.low[live][1:]) < 0).all()


def test_queries_that_float16_does_not_hold() -> None:
    """Beside a cache of float8 products are of float16."""
    case = CASES["fp8 cache"]
    problem = make_problem(case, [Sequence(3, 9), Sequence(1, 20)], 0)
    out, _ = solve("triton_interpreted", case, problem._replace(q=np.full_like(problem.q, 1e9)))
    assert np.isfinite(out).all() and out[:4].any()


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("dtype", triton.WIDE_DTYPES)
def test_tiles_are_powers_of_two_that_tensor_cores_take(dtype: str, tokens: int) -> None:
    sizes = product((8, 24, 64, 80, 96, 128, 192, 256), (1, 4, 7, 8, 64, 71), triton.WIDE_DTYPES + triton.NARROW_DTYPES)
    for head_dim, group, kv_dtype in sizes:
        tile = triton.tile_for(head_dim, group, dtype, tokens, kv_dtype)
        rows = tile.heads * tokens
        assert 16 <= rows <= 128 and 16 <= tile.keys <= 64 and 4 <= tile.num_warps <= 32
        assert all(n & (n - 1) == 0 for n in (rows, tile.keys, tile.num_warps))


def test_products_of_float32_have_small_tiles() -> None:
    """Also those of 16-bit queries and a cache that is wider, or of another 16 bits."""
    for dtype, kv_dtype in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "float16")):
        assert triton.tile_for(128, 64, dtype, 1, kv_dtype).heads == triton.LEAST
    assert triton.tile_for(128, 64, "bfloat16", 1, "bfloat16").heads == 64
    assert triton.tile_for(128, 64, "bfloat16", 1) == triton.tile_for(128, 64, "bfloat16", 1, "bfloat16")


class TiledCase(NamedTuple):
    case: Case
    sequences: list[Sequence]


TILED = {
    "mixed": TiledCase(
        Case(96, 4, 20, 16, 2, 3, 24, window=150),
        [Sequence(70, 300), Sequence(5, 130), Sequence(1, 320), Sequence(9, 9)],
    ),
    "decode": TiledCase(
        Case(3, 3, 20, 16, 1, 5, 80, softcap=4.0, one_token_each=True),
        [Sequence(1, 320), Sequence(1, 65), Sequence(1, 1)],
    ),
}


@pytest.mark.parametrize("tiled", TILED.values(), ids=TILED)
def test_the_tiles_that_gpus_get(tiled: TiledCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter; runs of keys are shorter than a GPU's, so that there is something to merge."""
    defaults = triton.Tiling()
    tiling = replace(
        defaults,
        decode=replace(defaults.decode, parts=4, min_keys=64),
        few=replace(defaults.few, parts=4, min_keys=64),
        many=replace(defaults.many, parts=4, min_keys=64),
    )
    shown = triton.implementation("shown", lambda setting: None, tiling, interpret=True)
    monkeypatch.setitem(PAGED_ATTENTION, "shown", shown)
    case = tiled.case
    problem = make_problem(case, tiled.sequences, 0)
    (out, lse), (expected, expected_lse) = solve("shown", case, problem), dense(case, problem)
    programs.cache_clear()
    assert np.linalg.norm(out - expected) <= case.tolerance * np.linalg.norm(expected)
    live = problem.ragged.cu_q_lens[-1]
    np.testing.assert_allclose(lse[:live], expected_lse[:live], atol=10 * case.tolerance)


# -- what it is for ----------------------------------------------------------------------------------------------------

HOPPER = Setting("gpu", (9, 0), "bfloat16", "bfloat16", 128, 4, 16)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (HOPPER, None),
        (HOPPER._replace(capability=(8, 0), kv_dtype="int8", head_dim=80), None),
        (HOPPER._replace(capability=(10, 0), kv_dtype="float8_e4m3fn"), None),
        (HOPPER._replace(capability=(7, 5)), "8.0 and above"),
        (HOPPER._replace(capability=(8, 0), kv_dtype="float8_e4m3fn"), "8.9"),
        (HOPPER._replace(platform="cpu", capability=None), "8.0 and above"),
        (HOPPER._replace(dtype="float64"), "queries are of float32"),
        (HOPPER._replace(kv_dtype="float8_e5m2"), "caches are of float32"),
    ],
)
def test_it_says_what_it_cannot_run(setting: Setting, reason: str | None) -> None:
    found = triton.IMPLEMENTATION.refuses(setting)
    assert found is None if reason is None else found is not None and reason in found
    assert triton.INTERPRETED.refuses(setting) is None if setting.platform == "cpu" else True


def test_caches_that_a_kernel_cannot_address_are_refused() -> None:
    """Between 2 and 4 GiB of 8-bit numbers: jax computes offsets in 32 bits with a sign."""

    def written(dtype: Any, num_blocks: int) -> Any:
        cache = jax.ShapeDtypeStruct((num_blocks, 8, 16, 128), dtype)
        qkv, slots = jax.ShapeDtypeStruct((4, 8, 3, 128), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)

        def write(cache: jax.Array, qkv: jax.Array, slots: jax.Array) -> Any:
            return triton.INTERPRETED.kv_write.write(cache, cache, Inputs(qkv, slots), HeadNorm(), Scoring(1.0))

        return jax.eval_shape(write, cache, qkv, slots)

    written(jnp.int8, 1 << 17)
    written(jnp.bfloat16, 1 << 17)
    written(jnp.int8, (1 << 18) + 1)
    with pytest.raises(ValueError, match=r"3,221,225,472 bytes of int8 .* cannot address"):
        written(jnp.int8, 3 << 16)


# -- GPUs that are not there -------------------------------------------------------------------------------------------
# That each kernel compiles is test_chosen_compiles.py's matter.

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
KV_HEADS, NUM_SEQS, TABLE_WIDTH = 2, 8, 64
HEAD_DIM, GROUP, NUM_BLOCKS, NUM_LAYERS = 128, 4, 256, 2


def steps(mesh: Any) -> tuple[Any, Any, Any, Any]:
    """A decode and a mixed step of two layers, and their arguments: caches, and the steps' batches. Each has caches of
    its own: nothing in it would keep the second step's writes from overtaking what the first one reads, except for
    copies."""
    attention, scoring = triton.IMPLEMENTATION, Scoring(HEAD_DIM**-0.5)
    kinds = (Shape(16, one_token_each=True), Shape(16, window=500))

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec()))

    def batch(num_tokens: int) -> tuple[Any, Ragged]:
        tokens, seqs = array((num_tokens,), jnp.int32), array((NUM_SEQS,), jnp.int32)
        tables = array((NUM_SEQS, TABLE_WIDTH), jnp.int32)
        ragged = Ragged(tokens, array((NUM_SEQS + 1,), jnp.int32), seqs, tables, tokens)  # pyright: ignore
        return array((num_tokens, KV_HEADS, GROUP + 2, HEAD_DIM), jnp.bfloat16), ragged

    def run(keys: list[list[Any]], values: list[list[Any]], batches: list[tuple[Any, Ragged]]) -> Any:
        outs = []
        for shape, ks, vs, (qkv, ragged) in zip(kinds, keys, values, batches, strict=True):
            plan = attention.plan(ragged, qkv.shape[0], shape)
            for i in range(NUM_LAYERS):
                inputs = Inputs(qkv, ragged.slot_mapping)
                q, ks[i], vs[i] = attention.kv_write.write(ks[i], vs[i], inputs, HeadNorm(), scoring)
                out, lse = attention.attend(q, ks[i], vs[i], plan, shape, scoring)
                qkv = jnp.concatenate([out.astype(q.dtype), qkv[:, :, -2:]], axis=2)
                outs.append(lse)
            outs.append(qkv)
        return keys, values, outs

    shapes = attention.cache_shapes(NUM_BLOCKS, 16, KV_HEADS, HEAD_DIM)
    keys, values = ([[array(shape, jnp.bfloat16)] * NUM_LAYERS for _ in kinds] for shape in shapes)
    return run, keys, values, [batch(NUM_SEQS), batch(256)]


@needs_compiler
def test_two_layers_write_in_place() -> None:
    mesh = build_mesh(MeshConfig(), aot.devices(Cluster.parse("h200:1")))
    run, *arguments = steps(mesh)
    with jax.set_mesh(mesh), aot.not_cached():
        lowered = jax.jit(run, donate_argnums=(0, 1)).lower(*arguments)
        program: Any = lowered.compile(compiler_options=aot.COMPILER_OPTIONS | NO_SPILLS)
    found = audit(program, mesh, ("keys", "values"))
    assert found.copies == ()
    sides, steps_and_layers = ("keys", "values"), [(step, layer) for step in range(2) for layer in range(NUM_LAYERS)]
    of_layers = [f"{side}[{step}][{layer}]" for side in sides for step, layer in steps_and_layers]
    assert [p.name for p in found.parameters if p.aliased] == of_layers
    kernels = Counter(re.findall(r'/(\w+)/pallas_call"', program.as_text()))
    assert set(kernels) == {"kv_write", "attend", "merge"}
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.in_avals))
    copied = re.findall(r"\[([\d,]+)\]\S* copy\(", program.as_text())
    assert all(math.prod(map(int, dims.split(","))) < largest // 4 for dims in copied)


@needs_compiler
def test_caches_that_need_offsets_of_64_bits() -> None:
    """Of 17 GiB: no registers spill for them either."""

    def attend(q: Any, k_cache: Any, v_cache: Any, ragged: Ragged) -> Any:
        shape = Shape(16, one_token_each=True)
        plan = triton.IMPLEMENTATION.plan(ragged, NUM_SEQS, shape)
        return triton.IMPLEMENTATION.attend(q, k_cache, v_cache, plan, shape, Scoring(1.0))

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    kv_cache = array((1 << 21, KV_HEADS, 16, HEAD_DIM), jnp.bfloat16)
    q, tables = array((NUM_SEQS, KV_HEADS, GROUP, HEAD_DIM), jnp.bfloat16), array((NUM_SEQS, TABLE_WIDTH))
    seqs = array((NUM_SEQS,))
    with jax.set_mesh(mesh_of("h200")):
        kernels = kernels_of(
            "64 bits:", attend, q, kv_cache, kv_cache, Ragged(seqs, array((NUM_SEQS + 1,)), seqs, tables, seqs)
        )
    assert [kernel.own_name for kernel in kernels] == ["attend", "merge"]
    assert failures("h200", kernels) == {}
