"""Every implementation of the dequantising matmul against float64; packing; how the work is cut up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import CAPABILITY, INTERPRET, PLATFORM

from pallas_kernels.dequant_matmul import (
    GROUPS,
    Int4Weights,
    Int8Weights,
    Setting,
    Weights,
    pack,
    reference,
    triton,
    unpack,
)
from pallas_kernels.dequant_matmul.triton import Tiles

pytestmark = pytest.mark.slow

TRITON = triton.INTERPRETED if INTERPRET else triton.IMPLEMENTATION
IMPLEMENTATIONS = {implementation.name: implementation for implementation in (reference.IMPLEMENTATION, TRITON)}


@dataclass(frozen=True)
class Case:
    """Static sizes, so that what is compiled for a case serves all of its examples."""

    num_rows: int
    depth: int
    columns: int
    group: int | None = None
    """None: weights of 8 bits."""
    zeros: bool = False
    dtype: Any = jnp.float32
    tiles: Tiles | None = None
    """None: what the kernel takes by itself."""

    @property
    def setting(self) -> Setting:
        bits = 8 if self.group is None else 4
        return Setting(PLATFORM, CAPABILITY, str(jnp.dtype(self.dtype)), bits, self.group, self.depth, self.columns)

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.dtype == jnp.float32 else 1e-2


def small(depth: int, parts: int) -> Tiles:
    return Tiles(16, 16, depth, parts, num_warps=4, num_stages=2, band=2)


CASES = {
    "8 bits": Case(16, 64, 32),
    "nothing is whole": Case(5, 40, 23, tiles=small(16, 1)),
    "several row tiles": Case(67, 40, 23, tiles=small(16, 1)),
    "three parts": Case(5, 120, 23, tiles=small(16, 3)),
    "more parts than steps": Case(5, 40, 16, tiles=small(16, 4)),
    "parts of its own": Case(3, 1040, 23),
    "8 bits, bfloat16": Case(19, 40, 23, dtype=jnp.bfloat16),
    "8 bits, float16": Case(3, 1040, 23, dtype=jnp.float16),
    "groups of 32": Case(5, 96, 23, 32),
    "groups of 32 with zero points": Case(37, 128, 23, 32, True, tiles=small(64, 1)),
    "groups of 64": Case(5, 192, 23, 64),
    "groups of 64 with zero points": Case(5, 256, 23, 64, True, tiles=small(128, 2)),
    "groups of 128": Case(37, 384, 23, 128),
    "groups of 128 with zero points": Case(1, 1024, 23, 128, True),
    "4 bits, bfloat16": Case(19, 128, 23, 32, True, jnp.bfloat16),
    "4 bits, float16": Case(5, 128, 23, 64, dtype=jnp.float16),
}


def make_weights(case: Case, rng: np.random.Generator) -> tuple[Weights, np.ndarray]:
    """And what they stand for, in float64."""
    if case.group is None:
        values = rng.integers(-127, 128, (case.depth, case.columns), np.int8)
        scales = rng.uniform(0.5, 2.0, case.columns).astype(np.float32)
        return Int8Weights(values, scales), values.astype(np.float64) * scales[None]  # pyright: ignore
    groups = case.depth // case.group, case.columns
    nibbles = rng.integers(0, 16, (case.depth, case.columns))
    scales = rng.uniform(0.5, 2.0, groups).astype(case.dtype)
    zeros = rng.integers(0, 16, groups).astype(np.int8) if case.zeros else None
    wide_zeros, wide_scales = (
        np.repeat(x.astype(np.float64), case.group, axis=0)
        for x in (np.full(groups, 8) if zeros is None else zeros, scales)
    )
    weights = Int4Weights(pack(jnp.asarray(nibbles), case.group), scales, zeros)  # pyright: ignore
    return weights, (nibbles - wide_zeros) * wide_scales


@cache
def program(name: str, tiles: Tiles | None) -> Any:
    implementation = IMPLEMENTATIONS[name]
    if tiles is not None and implementation is TRITON:
        implementation = triton.implementation(name, implementation.refuses, tiles, interpret=INTERPRET)
    return jax.jit(implementation.product)


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_conforms(name: str, label: str) -> None:
    case = CASES[label]
    assert IMPLEMENTATIONS[name].refuses(case.setting) is None

    @settings(max_examples=5)
    @given(st.integers(0, 2**32 - 1))
    def conforms(seed: int) -> None:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((case.num_rows, case.depth)).astype(case.dtype)
        weights, wide = make_weights(case, rng)
        out = program(name, case.tiles)(x, weights)
        assert out.dtype == case.dtype and out.shape == (case.num_rows, case.columns)
        expected = x.astype(np.float64) @ wide
        assert np.linalg.norm(np.asarray(out).astype(np.float64) - expected) <= case.tolerance * np.linalg.norm(
            expected
        )

    conforms()


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_packing_is_undone(group: int) -> None:
    nibbles = np.random.default_rng(0).integers(0, 16, (2 * group, 5))
    packed = pack(jnp.asarray(nibbles), group)
    assert packed.shape == (group, 5) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, group), nibbles)


def test_low_nibbles_are_the_first_half_of_a_group() -> None:
    rows = jnp.arange(64)[:, None] % 16
    values = jnp.where(jnp.arange(64)[:, None] == 32 + 16 + 2, 7, jnp.where(jnp.arange(64)[:, None] == 32 + 2, 9, rows))
    packed = pack(values, 32)
    assert int(packed[16 + 2, 0]) == 7 << 4 | 9


@pytest.mark.parametrize(("depth", "group"), [(96, 64), (64, 16)])
def test_groups_that_are_not_whole_are_refused(depth: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {group} of {depth} rows"):
        pack(jnp.zeros((depth, 4), jnp.uint8), group)


# -- tiles -------------------------------------------------------------------------------------------------------------

A100_SHARED_BYTES = 163 << 10


@pytest.mark.parametrize("group", [None, *GROUPS])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 64, 4096])
@pytest.mark.parametrize(("depth", "columns"), [(4096, 4096), (4096, 28672), (14336, 4096), (896, 4864), (128, 40)])
def test_tiles_fit(group: int | None, num_rows: int, depth: int, columns: int) -> None:
    tiles = triton.tiles_for(num_rows, depth, columns, group)
    sizes = tiles.rows, tiles.columns, tiles.depth, tiles.num_warps
    assert all(size & (size - 1) == 0 for size in sizes) and min(sizes[:3]) >= 16
    weight_bytes = tiles.depth * tiles.columns // (1 if group is None else 2)
    assert (tiles.rows * tiles.depth * 2 + weight_bytes) * tiles.num_stages <= A100_SHARED_BYTES
    assert group is None or (tiles.depth % group == 0 and depth % tiles.depth == 0)
    programs = -(-columns // tiles.columns) * tiles.parts
    if num_rows > triton.FEW_ROWS:
        assert tiles.parts == 1
    else:
        assert tiles.parts == 1 or programs <= triton.BUSY
        assert 2 * programs > triton.BUSY or depth < (tiles.parts + 1) * triton.SHORTEST_PART


def test_steps_of_broken_groups_are_refused() -> None:
    weights, _ = make_weights(Case(1, 192, 16, 64), np.random.default_rng(0))
    for depth in (32, 128):
        with pytest.raises(ValueError, match=f"steps of {depth} of 192 rows"):
            triton.product(jnp.ones((1, 192)), weights, small(depth, 1), interpret=True)


# -- what dispatch is told ---------------------------------------------------------------------------------------------

A100 = Setting("gpu", (8, 0), "bfloat16", 4, 128, 4096, 14336)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (A100, None),
        (A100._replace(bits=8, group=None), None),
        (A100._replace(platform="cpu", capability=None), "NVIDIA"),
        (A100._replace(capability=(7, 5)), "8.0"),
        (A100._replace(bits=2), "4 or 8"),
        (A100._replace(group=16), "32, 64, 128"),
        (A100._replace(depth=4000), "and all the same"),
        (A100._replace(dtype="float64"), "x is of"),
        (A100._replace(bits=8, columns=700_000), "overflow"),
    ],
    ids=str,
)
def test_what_the_kernel_refuses(setting: Setting, reason: str | None) -> None:
    said = triton.IMPLEMENTATION.refuses(setting)
    assert said is None if reason is None else said is not None and reason in said
    assert triton.INTERPRETED.refuses(A100) == "the interpreter is for CPUs"
