"""What reaches a threshold, by every implementation, against counting in numpy; the cutoffs that are found with it,
against sorting in float64, on one device and on several; and what GPUs get."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import NO_SPILLS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from jaxserve.sampler import LOGITS, SamplingRows, _truncate, find_cutoff
from jaxserve.step import Kernels, Step
from pallas_kernels import dispatch
from pallas_kernels.sampling import Setting, Tails, ordered_bits, reference, triton
from sharding import aot, build_mesh
from sharding.audit import Audit, audit
from sharding.hardware import Cluster
from sharding.hlo import Module
from sharding.mesh import MeshConfig

OWN_PARTS = Tails(
    "triton's own parts", partial(triton.count, interpret=True), partial(triton.mass, interpret=True), triton.BITS
)
"""Of the sizes that GPUs get."""
IMPLEMENTATIONS = {
    tails.name: tails for tails in (reference.IMPLEMENTATION, reference.WIDE, triton.INTERPRETED, OWN_PARTS)
}


def keys_of(x: np.ndarray) -> np.ndarray:
    """uint32, from the order that numpy gives the floats, both zeros as one: worked out in integers of 64 bits."""
    bits = x.astype(np.float32).view(np.int32).astype(np.int64)
    signed = np.where(bits < 0, -(bits + 2**31), bits)  # the distance from zero, in floats, with its sign
    return np.where(signed < 0, signed + 2**31 - 1, signed + 2**31).astype(np.uint32)


KEY_OF_NOTHING = int(keys_of(np.array(-np.inf)))


# -- one pass ----------------------------------------------------------------------------------------------------------

SHAPES = [(3, 50, 15), (2, 64, 7), (4, 33, 1), (1, 1, 3)]
"""S, V, C: vocabularies that steps divide, and do not; parts that have nothing to do."""


@cache
def one_pass(name: str) -> Any:
    def both(logits: jax.Array, best: jax.Array, thresholds: jax.Array) -> tuple[jax.Array, jax.Array]:
        tails = IMPLEMENTATIONS[name]
        return tails.count(logits)(thresholds), tails.mass(logits, best)(thresholds)

    return jax.jit(both)


def make_logits(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """With ties, both zeros and -inf."""
    few = rng.choice(np.array([-np.inf, -2.5, -0.0, 0.0, 1.0, 1.5], np.float32), shape)
    return np.where(rng.random(shape) < 0.5, few, rng.normal(0, 4, shape)).astype(np.float32)


def assert_conforms(name: str, logits: np.ndarray, thresholds: np.ndarray) -> None:
    best = logits.max(axis=1)
    counted, summed = one_pass(name)(logits, best, thresholds)
    assert (counted.dtype, summed.dtype) == (jnp.int32, jnp.float32)
    reaches = keys_of(logits)[:, :, None] >= thresholds[:, None]
    np.testing.assert_array_equal(counted, reaches.sum(axis=1))
    wide = np.where(logits > -np.inf, logits - np.maximum(best, -1e9)[:, None].astype(np.float64), -np.inf)
    expected = (np.exp(wide)[:, :, None] * reaches).sum(axis=1)
    np.testing.assert_allclose(summed, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["reference", "triton_interpreted"])
def test_a_pass_conforms(name: str, shape: tuple[int, int, int]) -> None:
    num_rows, vocab, num_thresholds = shape

    @settings(max_examples=10)
    @given(st.integers(0, 2**32 - 1))
    def conforms(seed: int) -> None:
        """Thresholds are keys that there are, or one above or below those, or any; in no order."""
        rng = np.random.default_rng(seed)
        logits = make_logits(rng, (num_rows, vocab))
        near = keys_of(rng.choice(logits.ravel(), (num_rows, num_thresholds))).astype(np.int64)
        near += rng.integers(-1, 2, near.shape)
        anywhere = rng.integers(1, 2**32, near.shape)
        thresholds = np.clip(np.where(rng.random(near.shape) < 0.8, near, anywhere), 1, 2**32 - 1)
        assert_conforms(name, logits, thresholds.astype(np.uint32))

    conforms()


def test_parts_of_real_sizes_conform() -> None:
    rng = np.random.default_rng(0)
    logits = make_logits(rng, (2, 5003))
    assert triton.parts_of(*logits.shape).number > 1 and triton.parts_of(*logits.shape).steps(5003) > 1
    thresholds = keys_of(rng.choice(logits.ravel(), (2, 3)))
    assert_conforms(OWN_PARTS.name, logits, thresholds)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_of_nothing_have_no_mass(name: str) -> None:
    logits = np.full((1, 20), -np.inf, np.float32)
    assert_conforms(name, logits, np.array([[1, KEY_OF_NOTHING, KEY_OF_NOTHING + 1]], np.uint32))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_smaller_thresholds_have_no_smaller_sums(name: str) -> None:
    """In float32, to the last bit: likelihoods that add next to nothing to a large one."""
    logits = np.concatenate([[0.0], np.linspace(-17, -15, 79)])[None].astype(np.float32)
    thresholds = np.sort(keys_of(np.linspace(-17.5, 0.5, 15).astype(np.float32)))[None]
    _, summed = one_pass(name)(logits, logits.max(axis=1), thresholds)
    assert (np.diff(np.asarray(summed)[0]) <= 0).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=8, max_size=8))
def test_ordered_bits(values: list[float]) -> None:
    x = np.array([*values, -0.0, 0.0, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(ordered_bits(jnp.asarray(x)), keys_of(x))


@pytest.mark.parametrize("num_rows", [1, 7, 64, 256, 4096])
@pytest.mark.parametrize("vocab", [1, 1024, 16032, 50257, 151936, 262144])
def test_parts_cover_the_vocabulary(num_rows: int, vocab: int) -> None:
    parts = triton.parts_of(num_rows, vocab)
    step = parts.number * parts.entries
    assert vocab <= parts.steps(vocab) * step < vocab + step
    assert parts.steps(vocab) * parts.entries <= triton.LARGEST
    assert parts.number == 1 or vocab / parts.number >= triton.SMALLEST / 2
    assert num_rows * parts.number >= min(triton.PROGRAMS, num_rows * vocab // triton.SMALLEST)


# -- the whole search --------------------------------------------------------------------------------------------------

ROWS, VOCABULARY = 4, 45


def lowest_kept(logits: np.ndarray, top_k: int, top_p: float) -> int:
    """By sorting: the key of the last entry of top_k and then of top_p."""
    order = np.sort(logits.astype(np.float64))[::-1]
    kept = order[order >= order[top_k - 1]]  # ties with the last one stay
    if top_p < 1 and kept[0] > -np.inf:
        mass = np.cumsum(np.exp(kept - kept[0]))
        kept = kept[: np.argmax(mass >= top_p * mass[-1]) + 1]
    return int(keys_of(kept[-1:].astype(np.float32))[0])


@cache
def search(name: str) -> Any:
    return jax.jit(partial(find_cutoff, tails=IMPLEMENTATIONS[name]))


top_ks = st.sampled_from([1, 2, VOCABULARY - 1, VOCABULARY]) | st.integers(1, VOCABULARY)
top_ps = st.sampled_from([1e-9, 0.5, 0.999999, 1.0]) | st.floats(0.01, 1.0)


@pytest.mark.parametrize("name", ["reference", "wide reference", "triton_interpreted"])
def test_cutoffs_are_those_of_sorting(name: str) -> None:
    """Rounding may decide either way on an entry within 1e-5 of top_p's share."""

    @settings(max_examples=12)
    @example([(1, 1e-9)] * ROWS, 0)
    @example([(VOCABULARY, 1.0)] * ROWS, 1)
    @given(st.lists(st.tuples(top_ks, top_ps), min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1))
    def agrees(rows: list[tuple[int, float]], seed: int) -> None:
        logits = make_logits(np.random.default_rng(seed), (ROWS, VOCABULARY))
        top_k = np.array([k for k, _ in rows], np.int32)
        top_p = np.array([p for _, p in rows], np.float32)
        shape = (2, ROWS // 2)
        arrays = (logits.max(axis=1), top_k, top_p)
        found = search(name)(logits.reshape(*shape, -1), *(x.reshape(shape) for x in arrays))
        assert (found.dtype, found.shape) == (jnp.uint32, shape)
        # The largest threshold that lets enough in is the key of an entry.
        for row, k, p, cutoff in zip(logits, top_k, top_p.astype(np.float64), np.asarray(found).ravel(), strict=True):
            more, less = (p, p) if p == 1 else (min(p * (1 + 1e-5), 1 - 1e-12), p * (1 - 1e-5))
            assert lowest_kept(row, int(k), more) <= cutoff <= lowest_kept(row, int(k), less)

    agrees()


@pytest.mark.parametrize("name", ["reference", "wide reference", "triton_interpreted"])
def test_rows_of_nothing_keep_nothing(name: str) -> None:
    """Whatever is found: -inf stays what it is."""
    logits = np.full((1, 2, VOCABULARY), -np.inf, np.float32)
    found = search(name)(logits, logits.max(axis=-1), np.array([[1, VOCABULARY]]), np.array([[1, 0.5]], np.float32))
    assert np.asarray(found)[0, 0] == KEY_OF_NOTHING
    assert np.asarray(found)[0, 1] >= KEY_OF_NOTHING


@pytest.mark.parametrize("name", ["wide reference", "triton_interpreted"])
def test_what_is_left_is_what_the_reference_leaves(name: str) -> None:
    """min_p goes before; rows with NaN keep nothing, and +inf not even itself."""
    logits = make_logits(np.random.default_rng(3), (6, VOCABULARY))
    logits[0, 3], logits[1, 7], logits[2] = np.nan, np.inf, -np.inf
    neutral: dict[str, Any] = dict.fromkeys(SamplingRows._fields, np.zeros((1, 6), np.int32))
    rows = SamplingRows(**neutral)._replace(
        top_k=np.array([[5, 5, 5, 9, 0, 30]], np.int32),
        top_p=np.array([[0.5, 0.5, 0.5, 1, 0.9, 0.95]], np.float32),
        min_p=np.array([[0, 0, 0.1, 0, 0.05, 1e-6]], np.float32),
    )
    arrays = jax.tree.map(jnp.asarray, (logits[None], rows))
    expected = np.asarray(jax.jit(_truncate)(*arrays))[0]
    left = jax.jit(partial(_truncate, find_cutoff=partial(find_cutoff, tails=IMPLEMENTATIONS[name])))(*arrays)
    np.testing.assert_array_equal(np.asarray(left)[0], expected)
    kept = expected > -np.inf
    assert not kept[[0, 2]].any() and not kept[1, 7]
    assert kept[3].sum() >= 9 and (expected[kept] == logits[kept]).all()


# -- over several devices ----------------------------------------------------------------------------------------------


def sharded_search(config: MeshConfig, tails: Tails, devices: Any = None) -> tuple[Any, Any]:
    """The search of an engine's step on a mesh, and a function from a shape's logical axes to its sharding."""
    mesh, rules = build_mesh(config, devices), config.sharding_rules
    unused: Any = None
    step = Step(unused, unused, unused, Kernels(unused, unused, tails), mesh, rules, 1, (None,), (0,))

    def sharding(axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, rules.spec(axes))

    return jax.jit(step._find_cutoff, out_shardings=sharding(("replica", None))), sharding


def lowered(search: Any, sharding: Callable[[Any], NamedSharding], shape: tuple[int, int, int]) -> Any:
    logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(LOGITS))
    rows = [
        jax.ShapeDtypeStruct(shape[:2], dtype, sharding=sharding(("replica", None)))
        for dtype in (jnp.float32, jnp.int32, jnp.float32)
    ]
    return search.lower(logits, *rows)


def assert_only_few_numbers_travel(found: Audit, config: MeshConfig, num_rows: int, bits: int) -> None:
    axes = tuple(axis for axis in ("pp", "tp") if getattr(config, axis) > 1)
    travelling = [c for c in found.collectives if c.axes]
    assert {(c.op, c.axes) for c in travelling} == {("all-reduce", axes)}
    assert sorted(c.num_bytes for c in travelling) == [num_rows * 4, *[num_rows * 4 * (2**bits - 1)] * 2]


@pytest.mark.parametrize("name", ["reference", "wide reference", "triton_interpreted"])
@pytest.mark.parametrize("mesh", ["tp=4", "dp=2,pp=2,tp=2"])
def test_shards_find_the_same_cutoffs(mesh: str, name: str) -> None:
    config, shape = MeshConfig.parse(mesh), (2, 6, 48)
    run, sharding = sharded_search(config, IMPLEMENTATIONS[name])
    rng = np.random.default_rng(0)
    logits = make_logits(rng, (12, 48)).reshape(shape)
    top_k = np.array([[1, 5, 48, 48, 20, 47], [48, 2, 3, 30, 48, 48]], np.int32)
    top_p = np.array([[1, 1, 1, 0.9, 0.5, 0.01], [0.999, 0.7, 1, 0.3, 0.6, 0.1]], np.float32)
    rows = (logits.max(axis=-1), top_k, top_p)
    row = sharding(("replica", None))
    placed = (jax.device_put(logits, sharding(LOGITS)), *(jax.device_put(x, row) for x in rows))
    np.testing.assert_array_equal(run(*placed), search(name)(logits, *rows))


@pytest.mark.parametrize("mesh", ["tp=4", "dp=2,pp=2,tp=2"])
def test_no_logits_travel(mesh: str) -> None:
    config = MeshConfig.parse(mesh)
    run, sharding = sharded_search(config, reference.WIDE)
    compiled = lowered(run, sharding, (config.dp, 6, 48)).compile()
    assert_only_few_numbers_travel(audit(compiled, build_mesh(config)), config, 6, reference.WIDE.bits)


# -- what runs where ---------------------------------------------------------------------------------------------------

H200, CPU = Setting("gpu", (9, 0)), Setting("cpu", None)


@pytest.mark.parametrize(
    ("tails", "setting", "reason"),
    [
        (triton.IMPLEMENTATION, H200, None),
        (triton.IMPLEMENTATION, Setting("gpu", (8, 0)), None),
        (triton.IMPLEMENTATION, Setting("gpu", (7, 5)), "capability 8.0"),
        (triton.IMPLEMENTATION, CPU, "GPUs"),
        (triton.INTERPRETED, H200, "CPU"),
        (triton.INTERPRETED, CPU, None),
        (reference.IMPLEMENTATION, H200, None),
        (reference.WIDE, CPU, None),
    ],
)
def test_what_is_refused(tails: Tails, setting: Setting, reason: str | None) -> None:
    said = tails.refuses(setting)
    assert said is None if reason is None else reason in str(said)


def test_which_is_chosen() -> None:
    assert dispatch.tails_for(CPU) is reference.IMPLEMENTATION
    assert dispatch.tails_for(H200) is triton.IMPLEMENTATION
    assert dispatch.tails_for(Setting("gpu", (7, 5))) is reference.WIDE
    assert dispatch.tails_for(CPU, "triton_interpreted") is triton.INTERPRETED
    with pytest.raises(ValueError, match="triton: it is for NVIDIA GPUs"):
        dispatch.tails_for(CPU, "triton")


# -- GPUs that are not there -------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def compiled_for(config: MeshConfig, tails: Tails, vocab: int) -> tuple[Any, Audit]:
    """The search for 256 rows on H200s, spilling no register."""
    devices = aot.devices(Cluster.parse(f"h200:{prod(config.shape)}"))
    run, sharding = sharded_search(config, tails, devices)
    with aot.not_cached():
        compiled = lowered(run, sharding, (1, 256, vocab)).compile(aot.COMPILER_OPTIONS | NO_SPILLS)
    return compiled, audit(compiled, build_mesh(config, devices))


@needs_compiler
@pytest.mark.parametrize(("mesh", "vocab"), [("", 50257), ("tp=8", 128256), ("pp=2,tp=2", 151936)], ids=str)
def test_the_search_is_three_kernels_and_copies_no_logits(mesh: str, vocab: int) -> None:
    """That these compile for other GPUs and sizes too is test_chosen_compiles.py's matter."""
    config = MeshConfig.parse(mesh)
    compiled, found = compiled_for(config, triton.IMPLEMENTATION, vocab)
    module = Module.parse(compiled.as_text())
    calls = [i.op_name for c in module.computations.values() for i in c.values() if i.op == "custom-call"]
    assert sorted(name.split("/")[-2] for name in calls) == ["count_tails", "sum_tails", "sum_tails"]
    assert found.memory is not None and found.memory.temporaries < found.memory.arguments / 8
    if prod(config.shape) > 1:
        assert_only_few_numbers_travel(found, config, 256, triton.BITS)


@needs_compiler
def test_xla_makes_one_kernel_of_a_pass() -> None:
    """Of the seven reductions, in the loop of top_k as in that of top_p."""
    compiled, _ = compiled_for(MeshConfig(), reference.WIDE, 151936)
    module = Module.parse(compiled.as_text())
    bodies = [
        module.computations[name]
        for c in module.computations.values()
        for i in c.values()
        for how, name in i.called()
        if how == "body"
    ]
    assert len(bodies) == 2
    for body in bodies:
        fusions = [i for i in body.values() if i.op == "fusion"]
        assert sum(any("[256,151936]" in body[name].shape for name in i.operands) for i in fusions) == 1
