"""Every implementation of the KV write against the definition in float64, with padding at NaN; and what GPUs get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import NO_SPILLS
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from on_device import CAPABILITY, INTERPRET, PLATFORM

from pallas_kernels.kv_write import HeadNorm, Inputs, KvWrite, native, reference, triton
from pallas_kernels.paged_attention import Scoring, Setting, stored
from pallas_kernels.paged_attention import native as native_attention
from sharding import aot, build_mesh
from sharding.audit import Audit, audit
from sharding.hardware import Cluster
from sharding.hlo import Module
from sharding.mesh import MeshConfig

QWEN, GEMMA = HeadNorm(1e-6), HeadNorm(1e-5, offset=1.0)


@dataclass(frozen=True)
class Case:
    """Static sizes, so that what is compiled for a case serves all of its batches."""

    num_tokens: int
    kv_heads: int
    group: int
    head_dim: int
    rotary: int = 0
    """Entries of a head that turn."""
    norm: HeadNorm | None = None
    dtype: Any = jnp.float32
    kv_dtype: Any = None
    """Of the caches; None = ``dtype``."""
    block_size: int = 4
    num_blocks: int = 12

    @property
    def cache_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.kv_dtype or self.dtype)

    @property
    def setting(self) -> Setting:
        dtypes = str(jnp.dtype(self.dtype)), str(self.cache_dtype)
        return Setting(PLATFORM, CAPABILITY, *dtypes, self.head_dim, self.group, self.block_size)

    @property
    def scoring(self) -> Scoring:
        return Scoring(1.0, None, *((0.0625, 0.03) if self.cache_dtype.itemsize == 1 else (1.0, 1.0)))

    @property
    def cache_shape(self) -> tuple[int, ...]:
        return self.num_blocks, self.kv_heads, self.block_size, self.head_dim

    @property
    def tolerance(self) -> float:
        """Of values of about 1; bfloat16 keeps 8 bits, and K is rounded three times."""
        return {2: 2e-2, 4: 2e-6}[jnp.dtype(self.dtype).itemsize]

    def inputs(self, array: Callable[[tuple[int, ...], Any], Any]) -> Inputs:
        """Of arrays that ``array`` makes of a shape and a dtype."""
        t, h = self.num_tokens, self.head_dim
        rope = (array((t, self.rotary // 2), jnp.float32), array((t, self.rotary // 2), jnp.float32))
        weights = (array((h,), self.dtype), array((h,), self.dtype))
        return Inputs(
            array((t, self.kv_heads, self.group + 2, h), self.dtype),
            array((t,), jnp.int32),
            rope if self.rotary else None,
            weights if self.norm else None,
        )


CASES = {
    "rope": Case(7, 2, 1, 8, rotary=8),
    "rope of a part": Case(7, 2, 3, 24, rotary=12),
    "rope of ten": Case(5, 1, 2, 16, rotary=10),
    "neither": Case(5, 2, 2, 8),
    "norm alone": Case(5, 2, 3, 12, norm=QWEN),
    "norm and rope": Case(7, 2, 3, 24, rotary=24, norm=QWEN),
    "offset norm, rope of a part": Case(6, 1, 7, 20, rotary=8, norm=GEMMA),
    "one token": Case(1, 2, 2, 8, rotary=8, norm=QWEN),
    "bfloat16": Case(7, 2, 2, 16, rotary=16, norm=GEMMA, dtype=jnp.bfloat16),
    "float16": Case(7, 1, 2, 16, rotary=16, dtype=jnp.float16),
    "bfloat16 in a float32 cache": Case(5, 1, 2, 8, rotary=8, dtype=jnp.bfloat16, kv_dtype=jnp.float32),
    "fp8 cache": Case(7, 2, 2, 16, rotary=16, norm=QWEN, kv_dtype=jnp.float8_e4m3fn),
    "int8 cache": Case(7, 2, 2, 16, rotary=16, norm=QWEN, dtype=jnp.bfloat16, kv_dtype=jnp.int8),
}

TRITON = triton.INTERPRETED if INTERPRET else triton.IMPLEMENTATION
TILED = KvWrite("tiles of four", partial(triton.write, tile=triton.Tile(4), interpret=INTERPRET))
"""The steps here are too small for the kernel to choose several tokens a program."""


def native_write(k_cache: Any, v_cache: Any, inputs: Inputs, *options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Its K has tokens last."""
    q, k_cache, v_cache = native.IMPLEMENTATION.write(jnp.swapaxes(k_cache, 2, 3), v_cache, inputs, *options)
    return q, jnp.swapaxes(k_cache, 2, 3), v_cache


NATIVE = KvWrite("native", native_write, native_attention.refuses)
IMPLEMENTATIONS = {impl.name: impl for impl in (reference.IMPLEMENTATION, NATIVE, TRITON, TILED)}


class Problem(NamedTuple):
    """Rows past ``live`` are padding: NaN, in the null block. ``caches`` are what was there before."""

    inputs: Inputs
    caches: tuple[np.ndarray, np.ndarray]
    live: int


def make_problem(case: Case, live: int, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    inputs = case.inputs(lambda shape, dtype: rng.standard_normal(shape).astype(dtype))
    slots = np.zeros(case.num_tokens, np.int32)
    slots[:live] = rng.permutation(np.arange(case.block_size, case.num_blocks * case.block_size))[:live]
    for x in (inputs.qkv, *(inputs.rope or ())):
        np.asarray(x)[live:] = np.nan
    old = np.full(case.cache_shape, 99 if case.cache_dtype == jnp.int8 else np.nan).astype(case.cache_dtype)
    return Problem(inputs._replace(slot_mapping=slots), (old, old.copy()), live)


def defined(case: Case, problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, K and V of the live tokens, one entry of a head at a time in float64."""
    inputs, half = problem.inputs, case.rotary // 2
    heads = np.asarray(inputs.qkv)[: problem.live].astype(np.float64)
    turned = heads.copy()
    for head in range(case.group + 1):
        x = heads[:, :, head]
        if case.norm is not None:
            weight = np.asarray(inputs.norm_weights[head == case.group]).astype(np.float64)  # pyright: ignore
            rms = np.sqrt((x**2).mean(-1, keepdims=True) + case.norm.eps)
            x = x / rms * (weight + case.norm.offset)
        turned[:, :, head] = x
        for i in range(half):
            cos, sin = (np.asarray(table)[: problem.live, i, None].astype(np.float64) for table in inputs.rope or ())
            turned[:, :, head, i] = x[..., i] * cos - x[..., i + half] * sin
            turned[:, :, head, i + half] = x[..., i + half] * cos + x[..., i] * sin
    return turned[:, :, : case.group], turned[:, :, case.group], turned[:, :, case.group + 1]


@cache
def program(name: str, case: Case) -> Any:
    """Compiled once per case."""

    def write(k_cache: Any, v_cache: Any, inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        return IMPLEMENTATIONS[name].write(k_cache, v_cache, inputs, case.norm or QWEN, case.scoring)

    return jax.jit(write)


def rows_of(case: Case, cache: Any) -> np.ndarray:
    """[slot, kv_head, head_dim], float32."""
    return np.moveaxis(np.asarray(cache).astype(np.float32), 2, 1).reshape(-1, case.kv_heads, case.head_dim)


def assert_holds(case: Case, rows: np.ndarray, values: np.ndarray, scale: float) -> None:
    """Rows of a cache are these values, as closely as its dtype allows."""
    exact = values / scale
    if case.cache_dtype == jnp.int8:
        off = np.abs(rows - np.clip(exact, -127, 127))
        assert (off <= 0.5 + 2 * case.tolerance * np.abs(exact).max(initial=1.0)).all()
    elif case.cache_dtype == jnp.float8_e4m3fn:  # 3 bits of the mantissa; subnormals are multiples of 2^-9
        np.testing.assert_allclose(rows, np.clip(exact, -448, 448), rtol=2**-4 + 1e-5, atol=2**-10 + 1e-5)
    else:
        np.testing.assert_allclose(rows, exact, rtol=case.tolerance, atol=4 * case.tolerance)


RUNS = [
    pytest.param(name, case, id=f"{name}-{label}")
    for name in IMPLEMENTATIONS
    for label, case in CASES.items()
    if name != "native" or NATIVE.refuses(case.setting) is None
    if name != "triton_interpreted" or label in ("rope of a part", "one token", "bfloat16")
]
"""The interpreter is slow, and tiles of four tokens are the harder case."""


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_conforms(name: str, case: Case) -> None:
    @settings(max_examples=8)
    @given(st.integers(0, case.num_tokens), st.integers(0, 2**32 - 1))
    def conforms(live: int, seed: int) -> None:
        problem = make_problem(case, live, seed)
        q, *caches = program(name, case)(*problem.caches, problem.inputs)
        expected_q, *expected = defined(case, problem)
        assert q.dtype == case.dtype and q.shape == (case.num_tokens, *expected_q.shape[1:])
        found_q = np.asarray(q)[:live].astype(np.float64)
        np.testing.assert_allclose(found_q, expected_q, rtol=case.tolerance, atol=4 * case.tolerance)
        slots = np.asarray(problem.inputs.slot_mapping)[:live]
        others = np.setdiff1d(np.arange(case.block_size, case.num_blocks * case.block_size), slots)
        scales = case.scoring.k_scale, case.scoring.v_scale
        for now, was, values, scale in zip(caches, problem.caches, expected, scales, strict=True):
            assert now.dtype == case.cache_dtype
            assert_holds(case, rows_of(case, now)[slots], values, scale)
            np.testing.assert_array_equal(rows_of(case, now)[others], rows_of(case, was)[others])

    conforms()


# -- what 8-bit caches hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "native"])  # which takes 16 and 32 bits
def test_v_is_stored_as_attention_defines_it(name: str, kv_dtype: Any) -> None:
    """Ties between integers, both ends and beyond; NaN where there is one."""
    case = Case(64, 1, 1, 8, kv_dtype=kv_dtype, num_blocks=17)
    ties = np.arange(512, dtype=np.float32).reshape(64, 8) - 256 + 0.5
    ties[0] = [np.inf, -np.inf, 1e30, -1e30, 127.49999, 0.49999997, -0.0, 447.0]
    if kv_dtype != jnp.int8:
        ties[1, 0] = np.nan
    problem = make_problem(case, 64, 0)
    qkv = np.asarray(problem.inputs.qkv)
    qkv[:, 0, 2] = ties * case.scoring.v_scale
    _, _, v_cache = program(name, case)(*problem.caches, problem.inputs)
    expected = stored(jnp.asarray(qkv[:, 0, 2]), case.cache_dtype, case.scoring.v_scale)
    found = rows_of(case, v_cache)[np.asarray(problem.inputs.slot_mapping), 0]
    np.testing.assert_array_equal(found, np.asarray(expected).astype(np.float32))


# -- what runs where ---------------------------------------------------------------------------------------------------

H200 = Setting("gpu", (9, 0), "bfloat16", "bfloat16", 128, 4, 16)


@pytest.mark.parametrize(
    ("implementation", "setting", "reason"),
    [
        (triton.IMPLEMENTATION, H200, None),
        (triton.IMPLEMENTATION, H200._replace(capability=(8, 0), kv_dtype="int8"), None),
        (triton.IMPLEMENTATION, H200._replace(capability=(7, 5)), "capability 8.0"),
        (triton.IMPLEMENTATION, H200._replace(platform="cpu", capability=None), "GPUs"),
        (triton.IMPLEMENTATION, H200._replace(capability=(8, 0), kv_dtype="float8_e4m3fn"), "8.9"),
        (triton.IMPLEMENTATION, H200._replace(kv_dtype="float8_e5m2"), "not float8_e5m2"),
        (triton.IMPLEMENTATION, H200._replace(dtype="float64"), "not float64"),
        (triton.INTERPRETED, H200, "CPU"),
        (triton.INTERPRETED, H200._replace(platform="cpu", capability=None), None),
        (reference.IMPLEMENTATION, H200, None),
    ],
)
def test_what_is_refused(implementation: KvWrite, setting: Setting, reason: str | None) -> None:
    said = implementation.refuses(setting)
    assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("num_tokens", "kv_heads", "group", "head_dim"),
    [(1, 8, 4, 128), (64, 8, 4, 128), (2048, 1, 71, 64), (8192, 8, 7, 80), (2048, 4, 128, 256)],
)
def test_tiles(num_tokens: int, kv_heads: int, group: int, head_dim: int) -> None:
    tokens = triton.tile_of(num_tokens, kv_heads, group, head_dim).tokens
    assert tokens & (tokens - 1) == 0
    assert tokens == 1 or tokens * group * head_dim <= triton.TILE_ENTRIES
    assert tokens == 1 or num_tokens * kv_heads / tokens >= triton.PROGRAMS / 2


def test_a_cache_that_offsets_cannot_reach_is_an_error() -> None:
    case = Case(8, 8, 4, 128, rotary=128, dtype=jnp.bfloat16, kv_dtype=jnp.int8, block_size=16, num_blocks=2**17 + 1)
    kv_cache = jax.ShapeDtypeStruct(case.cache_shape, jnp.int8)
    with pytest.raises(ValueError, match="a cache of 2,147,500,032 bytes of int8"):
        jax.eval_shape(
            lambda k, v, inputs: triton.write(k, v, inputs, QWEN, case.scoring),
            *(kv_cache, kv_cache),
            case.inputs(jax.ShapeDtypeStruct),
        )


# -- GPUs that are not there -------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
ON_GPU = partial(Case, dtype=jnp.bfloat16, block_size=16, num_blocks=512)
COMPILED = {
    "decode": ON_GPU(64, 8, 4, 128, rotary=128),
    "norm": ON_GPU(2048, 8, 4, 128, rotary=128, norm=QWEN),
    "norm, no rope": ON_GPU(64, 8, 4, 128, norm=QWEN),
    "80, rope of a part": ON_GPU(2048, 4, 8, 80, rotary=20),
    "256, offset norm": ON_GPU(2048, 4, 2, 256, rotary=256, norm=GEMMA),
    "many query heads": ON_GPU(2048, 1, 71, 64, rotary=64),
}
"""Of each kind one. That those of all dtypes and head dims compile is test_chosen_compiles.py's matter."""


def compiled_for(gpu: str, case: Case, layers: int = 1, tp: int = 1) -> tuple[Audit, Module]:
    """The program that writes ``layers`` layers one after the other, spilling no register; over ``tp`` GPUs each has
    its kv heads."""
    mesh = build_mesh(MeshConfig(tp=tp), aot.devices(Cluster.parse(f"{gpu}:{tp}")))
    heads = PartitionSpec(None, "tp")
    specs: Any = jax.tree.map(lambda _: PartitionSpec(), case.inputs(jax.ShapeDtypeStruct))._replace(qkv=heads)

    def one_layer(k_cache: jax.Array, v_cache: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        return triton.write(k_cache, v_cache, inputs, case.norm or QWEN, case.scoring)

    sharded = jax.shard_map(
        one_layer, mesh=mesh, in_specs=(heads, heads, specs), out_specs=(heads, heads, heads), check_vma=False
    )

    def write(keys: list[jax.Array], values: list[jax.Array], inputs: Inputs) -> Any:
        # In the order of what is donated: jit matches buffers to outputs of their shape in order, and copies otherwise.
        return tuple(zip(*(sharded(*kv_cache, inputs) for kv_cache in zip(keys, values, strict=True)), strict=True))

    def abstract(shape: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    kv_cache = [abstract(jax.ShapeDtypeStruct(case.cache_shape, case.cache_dtype), heads)] * layers
    inputs = jax.tree.map(abstract, case.inputs(jax.ShapeDtypeStruct), specs)
    with jax.set_mesh(mesh), aot.not_cached():
        lowered = jax.jit(write, donate_argnums=(0, 1)).lower(kv_cache, kv_cache, inputs)
        compiled = lowered.compile(aot.COMPILER_OPTIONS | NO_SPILLS)
    return audit(compiled, mesh, ("keys", "values")), Module.parse(compiled.as_text() or "")


def assert_one_kernel_a_layer(found: Audit, module: Module, layers: int) -> None:
    """Which writes the caches in place, and nothing else."""
    assert [p.aliased for p in found.parameters if p.name.startswith(("keys", "values"))] == [True] * 2 * layers
    assert found.copies == () and found.collectives == ()
    structure = ("parameter", "tuple", "get-tuple-element", "bitcast")
    ops = [i.op for i in module.computations[module.entry].values() if i.op not in structure]
    assert ops == ["custom-call"] * layers


@needs_compiler
@pytest.mark.parametrize("label", COMPILED)
@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_compiles_to_one_kernel_without_spills(gpu: str, label: str) -> None:
    assert_one_kernel_a_layer(*compiled_for(gpu, COMPILED[label]), layers=1)


@needs_compiler
def test_several_layers_over_several_gpus_stay_in_place() -> None:
    case = replace(COMPILED["norm"], num_tokens=64)
    assert_one_kernel_a_layer(*compiled_for("h200", case, layers=2, tp=2), layers=2)
