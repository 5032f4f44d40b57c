"""Every implementation of multi-head latent attention against dense attention in float64, with all that nobody may read
at NaN; its sizes; and what is compiled for GPUs that are not there. The plan has tests in test_triton_attention.py."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import NO_SPILLS
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from on_device import CAPABILITY, INTERPRET, PLATFORM
from test_paged_attention import Case as HeadCase
from test_paged_attention import Problem, Sequence, batches, dense, make_problem, part_of, slots_of

from pallas_kernels.mla_attention import MlaAttention, Queries, Setting, cache_shape, reference, triton
from pallas_kernels.paged_attention import NOTHING, Ragged, Scoring, Shape
from sharding import aot, build_mesh
from sharding.audit import Audit, audit
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

pytestmark = pytest.mark.slow

TRITON = triton.INTERPRETED if INTERPRET else triton.IMPLEMENTATION
GPU_TILES = triton.implementation("tiles of GPUs", TRITON.refuses, interpret=INTERPRET)
IMPLEMENTATIONS = {impl.name: impl for impl in (reference.IMPLEMENTATION, TRITON)}


@dataclass(frozen=True)
class Case:
    """Static sizes. ``heads``: the same as attention with one KV head, whose head dim is C + R."""

    heads: HeadCase
    latent_dim: int

    @classmethod
    def of(
        cls, num_tokens: int, num_seqs: int, table_width: int, block_size: int, num_heads: int, dims: Any, **more: Any
    ) -> Case:
        """``dims``: C and R."""
        return cls(HeadCase(num_tokens, num_seqs, table_width, block_size, 1, num_heads, sum(dims), **more), dims[0])

    @property
    def scoring(self) -> Scoring:
        scoring = self.heads.scoring
        return scoring._replace(v_scale=scoring.k_scale)

    @property
    def setting(self) -> Setting:
        heads = self.heads
        dtypes = str(jnp.dtype(heads.dtype)), str(heads.cache_dtype)
        rope_dim = heads.head_dim - self.latent_dim
        return Setting(PLATFORM, CAPABILITY, *dtypes, heads.group, self.latent_dim, rope_dim, heads.block_size)

    @property
    def nan_cache(self) -> np.ndarray:
        heads = self.heads
        shape = cache_shape(heads.num_blocks, heads.block_size, self.latent_dim, heads.head_dim - self.latent_dim)
        return np.full(shape, np.nan, np.float32).astype(heads.cache_dtype)


CASES = {
    "mixed": Case.of(24, 5, 6, 4, 3, (16, 16)),
    "window and softcap": Case.of(24, 4, 3, 16, 7, (24, 8), window=17, softcap=2.0),
    "more heads than a tile, fp8 cache": Case.of(12, 3, 6, 4, 20, (24, 16), kv_dtype=jnp.float8_e4m3fn),
    "decode": Case.of(6, 6, 24, 4, 16, (16, 16), one_token_each=True),
    "decode bfloat16": Case.of(6, 6, 3, 16, 20, (24, 8), one_token_each=True, dtype=jnp.bfloat16),
}


def latent_problem(case: Case, sequences: list[Sequence], seed: int) -> Problem:
    """V is the first C numbers of K, and zeros: so is the output."""
    problem = make_problem(case.heads, sequences, seed)
    values = [np.where(np.arange(x.shape[-1]) < case.latent_dim, x, 0) for x in problem.keys]
    return problem._replace(values=values)


@cache
def programs(implementation: MlaAttention, case: Case) -> tuple[Any, Any]:
    """write and attend, compiled once per case."""
    shape, scoring, c = case.heads.shape, case.scoring, case.latent_dim

    def attend(q: jax.Array, kv_cache: jax.Array, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
        plan = implementation.plan(ragged, q.shape[0], q.shape[1], shape)
        return implementation.attend(Queries(q[..., :c], q[..., c:]), kv_cache, plan, shape, scoring)

    def write(kv_cache: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
        return implementation.write(kv_cache, rows[:, :c], rows[:, c:], slots, scoring)

    return jax.jit(write), jax.jit(attend)


def solve(implementation: MlaAttention, case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Write every live token to a cache of NaN, the padding to block 0, and attend: output and log-sum-exp."""
    write, attend = programs(implementation, case)
    heads = case.heads
    num_rows = heads.num_seqs * heads.table_width * heads.block_size
    live = np.concatenate([*problem.keys, np.full((0, 1, heads.head_dim), np.nan, heads.dtype)])[:, 0]
    slots = slots_of(heads, problem)
    rows = np.pad(live, ((0, num_rows - len(live)), (0, 0)), constant_values=np.nan)
    kv_cache = write(case.nan_cache, rows, np.pad(slots, (0, num_rows - len(slots))))
    out, lse = attend(problem.q[:, 0].astype(heads.dtype), kv_cache, problem.ragged)
    return np.asarray(out), np.asarray(lse)


def expected_of(case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    q = problem.q.astype(case.heads.dtype).astype(np.float32)
    out, lse = dense(case.heads, problem._replace(q=q))
    return out[:, 0, :, : case.latent_dim], lse[:, 0]


def assert_solves(implementation: MlaAttention, case: Case, problem: Problem) -> None:
    (out, lse), (expected, expected_lse) = solve(implementation, case, problem), expected_of(case, problem)
    tolerance = case.heads.tolerance
    assert out.dtype == lse.dtype == np.float32
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - expected) <= tolerance * np.linalg.norm(expected)
    live = problem.ragged.cu_q_lens[-1]
    np.testing.assert_allclose(lse[:live], expected_lse[:live], atol=10 * tolerance)
    assert not out[live:].any() and (lse[live:] <= NOTHING).all()


RUNS = [
    pytest.param(name, case, id=f"{name}-{label}")
    for name, implementation in IMPLEMENTATIONS.items()
    for label, case in CASES.items()
    if implementation.refuses(case.setting) is None
]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_conforms(name: str, case: Case) -> None:
    @settings(max_examples=6)
    @given(batches(case.heads))
    def conforms(batch: tuple[list[Sequence], int]) -> None:
        assert_solves(IMPLEMENTATIONS[name], case, latent_problem(case, *batch))

    conforms()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_context_cut_in_two_merges_exactly(name: str) -> None:
    """Each of two ranks has every other key of each sequence; some see nothing at all."""
    case = CASES["mixed"]

    @settings(max_examples=4)
    @given(batches(case.heads))
    def merges(batch: tuple[list[Sequence], int]) -> None:
        problem = latent_problem(case, *batch)
        parts = [solve(IMPLEMENTATIONS[name], case, part_of(problem, rank)) for rank in range(2)]
        outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
        weights = np.exp(lses - lses.max(0))
        merged = (outs * weights[..., None]).sum(0) / weights.sum(0)[..., None]
        expected, _ = expected_of(case, problem)
        assert np.linalg.norm(merged - expected) <= case.heads.tolerance * np.linalg.norm(expected)

    merges()


@pytest.mark.parametrize("kv_dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn], ids=lambda d: d.__name__)
def test_the_write_changes_its_slots_and_nothing_else(kv_dtype: Any) -> None:
    """And writes what the reference does, beyond the range of 8 bits too."""
    case = Case.of(7, 1, 1, 4, 1, (24, 8), kv_dtype=kv_dtype)
    old = np.random.default_rng(0).standard_normal(case.nan_cache.shape).astype(kv_dtype)
    num_slots = old.shape[0] * old.shape[1]

    @settings(max_examples=6)
    @given(st.lists(st.integers(0, num_slots - 1), min_size=7, max_size=7, unique=True), st.integers(0, 99))
    def changes_these(slots: list[int], seed: int) -> None:
        rows = 30 * np.random.default_rng(seed).standard_normal((7, 32)).astype(np.float32)
        rows[0, :3] = np.nan, 1e9, -1e9
        after, expected = (
            np.asarray(programs(impl, case)[0](old, rows, np.array(slots, np.int32)))
            for impl in (TRITON, reference.IMPLEMENTATION)
        )
        assert after.dtype == kv_dtype
        np.testing.assert_array_equal(after.astype(np.float32), expected.astype(np.float32))
        others = np.setdiff1d(np.arange(num_slots), slots)
        np.testing.assert_array_equal(after.reshape(num_slots, -1)[others], old.reshape(num_slots, -1)[others])

    changes_these()


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "sequences"),
    [
        (Case.of(12, 3, 5, 16, 20, (24, 8)), [Sequence(7, 80), Sequence(2, 65), Sequence(1, 33)]),
        (
            Case.of(2, 2, 40, 16, 16, (32, 16), dtype=jnp.bfloat16, one_token_each=True),
            [Sequence(1, 640), Sequence(1, 65)],
        ),
    ],
    ids=["mixed", "decode"],
)
def test_the_tiles_that_gpus_get(case: Case, sequences: list[Sequence]) -> None:
    assert_solves(GPU_TILES, case, latent_problem(case, sequences, 0))


@pytest.mark.parametrize("num_heads", [1, 8, 16, 20, 64, 128])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("float32", "float32")])
def test_tiles_are_powers_of_two_that_tensor_cores_take(num_heads: int, dtypes: tuple[str, str]) -> None:
    tiling = triton.tiling_for(num_heads)
    for cut in (tiling.decode, tiling.few, tiling.many):
        tile = triton.tile_for(num_heads, cut.tokens, *(jnp.dtype(d) for d in dtypes))
        rows = tile.heads * cut.tokens
        assert 16 <= rows <= 32 and rows < 32 + 2 * num_heads * cut.tokens
        assert all(n & (n - 1) == 0 for n in (rows, tile.keys, tile.num_warps))
        tiles = -(-num_heads // tile.heads)
        assert 128 <= cut.parts * tiles <= 512


# -- what it is for ----------------------------------------------------------------------------------------------------

HOPPER = Setting("gpu", (9, 0), "bfloat16", "bfloat16", 128, 512, 64, 64)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (HOPPER, None),
        (HOPPER._replace(capability=(8, 0), dtype="float16", kv_dtype="float16", num_heads=16), None),
        (HOPPER._replace(kv_dtype="float8_e4m3fn"), None),
        (HOPPER._replace(capability=(7, 5)), "8.0 and above"),
        (HOPPER._replace(capability=(8, 0), kv_dtype="float8_e4m3fn"), "8.9"),
        (HOPPER._replace(platform="cpu", capability=None), "8.0 and above"),
        (HOPPER._replace(dtype="float64"), "queries are of float32"),
        (HOPPER._replace(kv_dtype="int8"), "caches are of float32"),
        (HOPPER._replace(latent_dim=1024), "at most 512"),
    ],
)
def test_it_says_what_it_cannot_run(setting: Setting, reason: str | None) -> None:
    found = triton.IMPLEMENTATION.refuses(setting)
    assert found is None if reason is None else found is not None and reason in found
    assert reference.IMPLEMENTATION.refuses(setting) is None
    assert triton.INTERPRETED.refuses(setting) is None if setting.platform == "cpu" else True


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_keys_and_values_have_one_scale(name: str) -> None:
    case = CASES["more heads than a tile, fp8 cache"]
    rows, slots = jnp.zeros((1, case.heads.head_dim)), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match=r"k_scale=0.5 and v_scale=1.0"):
        parts = rows[:, : case.latent_dim], rows[:, case.latent_dim :]
        IMPLEMENTATIONS[name].write(jnp.asarray(case.nan_cache), *parts, slots, Scoring(1.0, k_scale=0.5))


def test_a_cache_that_offsets_cannot_reach_is_an_error() -> None:
    kv_cache = jax.ShapeDtypeStruct((60000, 64, 576), jnp.float8_e4m3fn)
    latent, rope = (jax.ShapeDtypeStruct((4, n), jnp.bfloat16) for n in (512, 64))
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)

    def write(kv_cache: jax.Array, latent: jax.Array, rope: jax.Array, slots: jax.Array) -> jax.Array:
        return TRITON.write(kv_cache, latent, rope, slots, Scoring(1.0))

    with pytest.raises(ValueError, match="a cache of 2,211,840,000 bytes of float8_e4m3fn"):
        jax.eval_shape(write, kv_cache, latent, rope, slots)


# -- GPUs that are not there -------------------------------------------------------------------------------------------
# That each kernel compiles is test_chosen_compiles.py's matter.

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
NUM_HEADS, LATENT_DIM, ROPE_DIM = 16, 512, 64
NUM_SEQS, TABLE_WIDTH = 8, 64
STEPS = {"decode": (Shape(64, one_token_each=True), NUM_SEQS), "mixed": (Shape(64), 256)}
"""And how many tokens they have."""


def compiled(attention: MlaAttention, num_layers: int) -> tuple[Any, Audit]:
    """A decode and a mixed step in one program for an H200, each with caches of its own."""
    mesh = build_mesh(MeshConfig(), aot.devices(Cluster.parse("h200:1")))
    scoring = Scoring(192**-0.5)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec()))

    def batch(num_tokens: int) -> tuple[Any, ...]:
        tokens, seqs = array((num_tokens,), jnp.int32), array((NUM_SEQS,), jnp.int32)
        tables = array((NUM_SEQS, TABLE_WIDTH), jnp.int32)
        ragged = Ragged(tokens, array((NUM_SEQS + 1,), jnp.int32), seqs, tables, tokens)  # pyright: ignore
        queries = [array((num_tokens, NUM_HEADS, n), jnp.bfloat16) for n in (LATENT_DIM, ROPE_DIM)]
        return Queries(*queries), *(array((num_tokens, n), jnp.bfloat16) for n in (LATENT_DIM, ROPE_DIM)), ragged  # pyright: ignore

    def steps(caches: list[list[Any]], batches: list[tuple[Any, ...]]) -> Any:
        outs = []
        for (shape, num_tokens), layers, (queries, latent, rope, ragged) in zip(
            STEPS.values(), caches, batches, strict=True
        ):
            plan = attention.plan(ragged, num_tokens, NUM_HEADS, shape)
            for i in range(num_layers):
                layers[i] = attention.write(layers[i], latent, rope, ragged.slot_mapping, scoring)
                out, lse = attention.attend(queries, layers[i], plan, shape, scoring)
                queries = queries._replace(latent=out.astype(latent.dtype))
                outs.append((out, lse))
        return caches, outs

    kv_cache = array(cache_shape(512, 64, LATENT_DIM, ROPE_DIM), jnp.bfloat16)
    caches = [[kv_cache] * num_layers for _ in STEPS]
    with jax.set_mesh(mesh), aot.not_cached():
        lowered = jax.jit(steps, donate_argnums=0).lower(caches, [batch(n) for _, n in STEPS.values()])
        program = lowered.compile(compiler_options=aot.COMPILER_OPTIONS | NO_SPILLS)
    return program, audit(program, mesh, ("caches",))


@needs_compiler
def test_two_layers_write_in_place() -> None:
    program, found = compiled(triton.IMPLEMENTATION, num_layers=2)
    assert found.copies == () and found.collectives == ()
    names = [f"caches[{step}][{layer}]" for step in range(2) for layer in range(2)]
    assert [p.name for p in found.parameters if p.aliased] == names
    kernels = Counter(re.findall(r'/(\w+)/pallas_call"', program.as_text()))
    assert set(kernels) == {"mla_write", "attend", "merge"}
    assert not re.search(r"\[512,64,576\]\S* copy\(", program.as_text())
