"""Every implementation of paged attention against dense attention in float64, with all that nobody may read at NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import CAPABILITY, PLATFORM

from pallas_kernels import dequant_matmul, dispatch, grouped_matmul
from pallas_kernels.dispatch import PAGED_ATTENTION, paged_attention
from pallas_kernels.kv_write import HeadNorm, Inputs
from pallas_kernels.paged_attention import NOTHING, Ragged, Scoring, Setting, Shape

NUM_SPARE_BLOCKS = 5


@dataclass(frozen=True)
class Case:
    """Static sizes, so that what is compiled for a case serves all of its batches."""

    num_tokens: int
    num_seqs: int
    table_width: int
    block_size: int
    kv_heads: int
    group: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    one_token_each: bool = False
    dtype: Any = jnp.float32
    kv_dtype: Any = None
    """Of the caches; None = ``dtype``."""

    @property
    def cache_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.kv_dtype or self.dtype)

    @property
    def setting(self) -> Setting:
        return Setting(
            PLATFORM,
            CAPABILITY,
            str(jnp.dtype(self.dtype)),
            str(self.cache_dtype),
            self.head_dim,
            self.group,
            self.block_size,
        )

    @property
    def shape(self) -> Shape:
        return Shape(self.block_size, self.window, self.one_token_each)

    @property
    def scoring(self) -> Scoring:
        scales = (0.0625, 0.125) if self.cache_dtype.itemsize == 1 else (1.0, 1.0)
        return Scoring(self.head_dim**-0.5, self.softcap, *scales)

    @property
    def num_blocks(self) -> int:
        return 1 + self.num_seqs * self.table_width + NUM_SPARE_BLOCKS

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == jnp.float32 else 1e-2


CASES = {
    "plain": Case(24, 5, 6, 4, 2, 1, 8),
    "groups of 3": Case(24, 5, 3, 16, 1, 3, 24),
    "groups of 7": Case(24, 4, 6, 4, 2, 7, 80),
    "window": Case(24, 5, 8, 4, 2, 3, 8, window=5),
    "window longer than a block": Case(24, 4, 3, 16, 1, 1, 24, window=17),
    "window of one token": Case(16, 3, 4, 4, 1, 2, 8, window=1),
    "softcap": Case(24, 4, 3, 16, 2, 1, 24, softcap=3.0),
    "softcap and window": Case(24, 4, 6, 4, 1, 3, 80, window=7, softcap=2.0),
    "several tiles": Case(150, 3, 12, 16, 1, 2, 8, window=100),
    "long sequences": Case(8, 2, 40, 4, 2, 1, 8),
    "bfloat16": Case(24, 5, 6, 4, 2, 3, 24, dtype=jnp.bfloat16),
    "fp8 cache": Case(24, 5, 6, 4, 2, 3, 24, dtype=jnp.bfloat16, kv_dtype=jnp.float8_e4m3fn),
    "int8 cache": Case(24, 5, 6, 4, 2, 3, 24, dtype=jnp.bfloat16, kv_dtype=jnp.int8),
    "decode": Case(6, 6, 6, 4, 2, 1, 8, one_token_each=True),
    "decode one": Case(1, 1, 40, 4, 2, 3, 24, one_token_each=True),
    "decode many": Case(12, 12, 24, 4, 1, 7, 8, one_token_each=True),
    "decode window": Case(6, 6, 4, 16, 1, 3, 80, window=6, one_token_each=True),
    "decode softcap": Case(6, 6, 6, 4, 2, 3, 24, softcap=2.0, one_token_each=True),
    "decode fp8 cache": Case(6, 6, 3, 16, 2, 3, 24, one_token_each=True, kv_dtype=jnp.float8_e4m3fn),
    "decode bfloat16": Case(6, 6, 3, 16, 2, 3, 24, one_token_each=True, dtype=jnp.bfloat16),
}


class Sequence(NamedTuple):
    """New tokens, and tokens in the cache with them."""

    q_len: int
    kv_len: int


@st.composite
def batches(draw: st.DrawFn, case: Case) -> tuple[list[Sequence], int]:
    """Lengths around the edges of blocks, and a seed for values and tables."""
    longest, size = case.block_size * case.table_width, case.block_size
    edges = [n for k in range(size, longest + 1, size) for n in (k - 1, k, k + 1) if 1 <= n <= longest]
    sequences: list[Sequence] = []
    room = case.num_tokens
    q_lens = st.sampled_from([0, 1, 1, 2, size, size + 1, case.num_tokens]) | st.integers(0, case.num_tokens)
    for _ in range(draw(st.integers(0, case.num_seqs))):
        q_len = 1 if case.one_token_each else min(room, longest, draw(q_lens))
        kv_len = draw(st.sampled_from(edges) | st.integers(1, longest))
        sequences.append(Sequence(q_len, max(q_len, kv_len)))
        room -= q_len
    return sequences, draw(st.integers(0, 2**32 - 1))


class Problem(NamedTuple):
    """Queries [T,K,G,H]; keys and values of every sequence [kv_len,K,H]; where they belong."""

    q: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    ragged: Ragged


def make_problem(case: Case, sequences: list[Sequence], seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    scoring, sizes = case.scoring, [(s.kv_len, case.kv_heads, case.head_dim) for s in sequences]
    keys = [_storable(rng.standard_normal(size), case, scoring.k_scale) for size in sizes]
    values = [_storable(rng.standard_normal(size), case, scoring.v_scale) for size in sizes]
    q = np.full((case.num_tokens, case.kv_heads, case.group, case.head_dim), np.nan, case.dtype)
    cu_q_lens = np.zeros(case.num_seqs + 1, np.int32)
    cu_q_lens[1 : len(sequences) + 1] = np.cumsum([s.q_len for s in sequences], dtype=np.int32)
    cu_q_lens[len(sequences) + 1 :] = cu_q_lens[len(sequences)]
    q[: cu_q_lens[-1]] = 2 * rng.standard_normal((cu_q_lens[-1], *q.shape[1:]))
    kv_lens = np.zeros(case.num_seqs, np.int32)
    kv_lens[: len(sequences)] = [s.kv_len for s in sequences]
    owned = rng.permutation(np.arange(1, case.num_blocks, dtype=np.int32))
    tables = owned[: case.num_seqs * case.table_width].reshape(case.num_seqs, case.table_width)
    for table, kv_len in zip(tables, kv_lens, strict=True):
        used = -(-kv_len // case.block_size)
        table[used:] = rng.integers(0, case.num_blocks, case.table_width - used)  # "anything behind the last live one"
    slots = np.zeros(case.num_tokens, np.int32)
    visible = np.zeros(case.num_tokens, np.int32)
    for s, start in zip(sequences, cu_q_lens, strict=False):
        visible[start : start + s.q_len] = np.arange(s.kv_len - s.q_len, s.kv_len) + 1
    return Problem(q, keys, values, Ragged(slots, cu_q_lens, kv_lens, tables, visible))  # pyright: ignore


def _storable(x: np.ndarray, case: Case, scale: float) -> np.ndarray:
    """Rounded to what the caches can hold."""
    if case.cache_dtype.itemsize > 1:
        return x.astype(case.dtype)
    rounded = np.round(x / scale) if case.cache_dtype == jnp.int8 else x / scale
    return (rounded.astype(case.cache_dtype).astype(np.float32) * scale).astype(case.dtype)


def dense(case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Attention by its definition, one token at a time, and the log-sum-exp of its scores."""
    out, lse = np.zeros(problem.q.shape), np.full(problem.q.shape[:-1], -np.inf)
    starts = problem.ragged.cu_q_lens
    for s, (k, v) in enumerate(zip(problem.keys, problem.values, strict=True)):
        for row in range(starts[s], starts[s + 1]):
            position = len(k) - (starts[s + 1] - row)
            first = 0 if case.window is None else max(0, position - case.window + 1)
            seen = slice(first, position + 1)
            q = problem.q[row].astype(np.float64)
            scores = np.einsum("kgh,skh->kgs", q, k[seen].astype(np.float64)) * case.head_dim**-0.5
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            lse[row] = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
            weights = np.exp(scores - lse[row][..., None])
            out[row] = np.einsum("kgs,skh->kgh", weights, v[seen].astype(np.float64))
    return out, lse


@cache
def programs(name: str, case: Case) -> tuple[Any, Any]:
    """write and attend, compiled once per case."""
    implementation = PAGED_ATTENTION[name]

    def attend(q: jax.Array, keys: jax.Array, values: jax.Array, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
        plan = implementation.plan(ragged, case.num_tokens, case.shape)
        return implementation.attend(q, keys, values, plan, case.shape, case.scoring)

    def write(keys: Any, values: Any, k: Any, v: Any, slots: Any) -> tuple[jax.Array, jax.Array]:
        inputs = Inputs(jnp.stack([jnp.zeros_like(k), k, v], axis=2), slots)
        return implementation.kv_write.write(keys, values, inputs, HeadNorm(), case.scoring)[1:]

    return jax.jit(write), jax.jit(attend)


def nan_caches(name: str, case: Case) -> list[np.ndarray]:
    """Of integers, that have no NaN, the largest."""
    shapes = PAGED_ATTENTION[name].cache_shapes(case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    if case.cache_dtype == jnp.int8:
        return [np.full(shape, 127, np.int8) for shape in shapes]
    return [np.full(shape, np.nan, np.float32).astype(case.cache_dtype) for shape in shapes]


def slots_of(case: Case, problem: Problem) -> np.ndarray:
    """block * block_size + offset of every live token, sequence after sequence."""
    tables = np.asarray(problem.ragged.block_tables)
    slots = []
    for table, keys in zip(tables, problem.keys, strict=False):
        positions = np.arange(len(keys))
        slots.append(table[positions // case.block_size] * case.block_size + positions % case.block_size)
    return np.concatenate([*slots, np.zeros(0, np.int64)]).astype(np.int32)


def solve(name: str, case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Write every live token to NaN caches, the padding to block 0, and attend: output and log-sum-exp."""
    write, attend = programs(name, case)
    rows = case.num_seqs * case.table_width * case.block_size
    empty = np.full((0, case.kv_heads, case.head_dim), np.nan, case.dtype)
    padded = []
    for parts in (problem.keys, problem.values):
        live = np.concatenate([*parts, empty])
        padded.append(np.pad(live, ((0, rows - len(live)), (0, 0), (0, 0)), constant_values=np.nan))
    slots = slots_of(case, problem)
    keys, values = write(*nan_caches(name, case), *padded, np.pad(slots, (0, rows - len(slots))))
    out, lse = attend(problem.q, keys, values, problem.ragged)
    return np.asarray(out), np.asarray(lse)


INTERPRETED = (
    "groups of 7",
    "window",
    "softcap and window",
    "bfloat16",
    "fp8 cache",
    "int8 cache",
    "decode many",
    "decode window",
)
"""Cases that are always run by an interpreter, which compiles slowly; the others are of ``make test-all``."""
RUNS = [
    pytest.param(
        name,
        case,
        id=f"{name}-{label}",
        marks=pytest.mark.slow if name.endswith("interpreted") and label not in INTERPRETED else (),
    )
    for name, implementation in PAGED_ATTENTION.items()
    for label, case in CASES.items()
    if implementation.refuses(case.setting) is None
]

HERE = Setting(PLATFORM, CAPABILITY, "float32", "float32", 64, 4, 16)
HERE_NAMES = [name for name, implementation in PAGED_ATTENTION.items() if implementation.refuses(HERE) is None]
"""Names of what runs here."""


def assert_conforms(name: str, case: Case, problem: Problem) -> None:
    (out, lse), (expected, expected_lse) = solve(name, case, problem), dense(case, problem)
    assert out.dtype == lse.dtype == np.float32
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - expected) <= case.tolerance * np.linalg.norm(expected)
    live = problem.ragged.cu_q_lens[-1]
    np.testing.assert_allclose(lse[:live], expected_lse[:live], atol=10 * case.tolerance)
    assert not out[live:].any() and (lse[live:] <= NOTHING).all()


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_conforms(name: str, case: Case) -> None:
    @settings(max_examples=25)
    @given(batches(case))
    def conforms(batch: tuple[list[Sequence], int]) -> None:
        assert_conforms(name, case, make_problem(case, *batch))

    conforms()


@pytest.mark.parametrize("name", HERE_NAMES)
def test_queries_of_lower_precision(name: str) -> None:
    case = CASES["bfloat16"]
    problem = make_problem(case, [Sequence(2, 9), Sequence(1, 4)], 0)
    out, _ = solve(name, case, problem._replace(q=problem.q.astype(jnp.bfloat16)))
    expected, _ = dense(case, problem)
    assert np.linalg.norm(out - expected) < 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "case", [CASES["plain"], CASES["several tiles"], CASES["decode many"]], ids=["plain", "tiles", "decode"]
)
@pytest.mark.parametrize("name", HERE_NAMES)
def test_a_context_cut_in_two_merges_exactly(name: str, case: Case) -> None:
    """Each of two ranks has every other key of each sequence; some see nothing at all."""
    case = replace(case, window=None)

    @settings(max_examples=15)
    @given(batches(case))
    def merges(batch: tuple[list[Sequence], int]) -> None:
        problem = make_problem(case, *batch)
        parts = [solve(name, case, part_of(problem, rank)) for rank in range(2)]
        outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
        weights = np.exp(lses - lses.max(0))
        merged = (outs * weights[..., None]).sum(0) / weights.sum(0)[..., None]
        expected, _ = dense(case, problem)
        assert np.linalg.norm(merged - expected) <= case.tolerance * np.linalg.norm(expected)

    merges()


def part_of(problem: Problem, rank: int) -> Problem:
    """What one of two ranks has of the problem: keys rank, rank + 2, ... of every sequence."""
    ragged = problem.ragged._replace(
        kv_lens=(problem.ragged.kv_lens + 1 - rank) // 2, visible=(problem.ragged.visible + 1 - rank) // 2
    )
    keys, values = ([x[rank::2] for x in side] for side in (problem.keys, problem.values))
    return problem._replace(keys=keys, values=values, ragged=ragged)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", HERE_NAMES)
def test_write_changes_the_slots_it_is_given_and_nothing_else(name: str, dtype: Any) -> None:
    case = Case(7, 1, 1, 4, 3, 1, 8, dtype=dtype)
    write = programs(name, case)[0]
    num_slots = case.num_blocks * case.block_size
    used = st.integers(case.block_size, num_slots - 1)  # block 0 is nobody's: what lies there is not defined

    @settings(max_examples=25)
    @given(st.lists(used, min_size=7, max_size=7, unique=True), st.integers(0, 99))
    def changes_these(slots: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        old = rng.standard_normal((2, num_slots, case.kv_heads, case.head_dim)).astype(np.float32)
        new = rng.standard_normal((2, 7, case.kv_heads, case.head_dim)).astype(np.float32) + 10
        everywhere = np.arange(num_slots, dtype=np.int32)
        before = write(*nan_caches(name, case), *old, everywhere)
        after = write(*before, *new, np.array(slots, np.int32))
        merged = old.copy()
        merged[:, slots] = new
        directly = write(*nan_caches(name, case), *merged, everywhere)
        for was, now, meant in zip(before, after, directly, strict=True):
            assert now.dtype == dtype
            np.testing.assert_array_equal(now[1:], meant[1:])
            assert np.sum(np.asarray(was != now)[1:]) == 7 * case.kv_heads * case.head_dim

    changes_these()


def test_dispatch_says_what_runs() -> None:
    for name, implementation in PAGED_ATTENTION.items():
        assert implementation.name == name
        if implementation.refuses(HERE) is None:
            assert paged_attention(HERE, name) is implementation
    assert paged_attention(CPU).name == "native"
    assert paged_attention(CPU._replace(kv_dtype="int8")).name == "cpu"
    assert paged_attention(CPU._replace(platform="gpu", capability=(8, 0))).name == "triton"


CPU = Setting("cpu", None, "float32", "float32", 64, 4, 16)


@pytest.mark.parametrize(
    ("setting", "backend", "words"),
    [
        (CPU, "flash", ["'flash'", *PAGED_ATTENTION]),
        (CPU._replace(platform="tpu"), None, ["tpu", "none is for"]),
        (CPU, "triton", ["triton: it is for NVIDIA GPUs", "cpu", "reference"]),
    ],
    ids=str,
)
def test_dispatch_refuses_what_cannot_run(setting: Setting, backend: str | None, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        paged_attention(setting, backend)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("choose", "setting", "narrow"),
    [
        (
            dispatch.grouped_matmul_for,
            grouped_matmul.Setting("gpu", (8, 0), "bfloat16", "bfloat16", 8, 64, 64),
            {"weight_dtype": "float8_e4m3fn"},
        ),
        (
            dispatch.dequant_matmul_for,
            dequant_matmul.Setting("gpu", (8, 0), "bfloat16", 4, 32, 64, 64),
            {"group": 48},
        ),
    ],
    ids=["grouped", "dequantising"],
)
def test_dispatch_of_the_products(choose: Any, setting: Any, narrow: dict[str, Any]) -> None:
    """By device and shape; what no implementation takes is an error with the reason, not the reference."""
    assert choose(setting).name == "triton"
    assert choose(setting, "reference").name == choose(setting._replace(platform="cpu", capability=None)).name
    with pytest.raises(ValueError, match="triton: "):
        choose(setting._replace(**narrow))
