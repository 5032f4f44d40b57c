"""Products with weights: every implementation against float64, and what the one in C++ promises besides."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, native
from pallas_kernels.dispatch import MATMUL
from pallas_kernels.matmul import ACTIVATIONS, Setting

HERE = Setting("cpu", "bfloat16", 1)
NAMES = [name for name, implementation in MATMUL.items() if implementation.refuses(HERE) is None]
needs_native = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 13, 32]
DEPTHS = [1, 2, 15, 16, 33, 129, 300]
"""Whole pairs of rows, and not."""
COLUMNS = [1, 31, 64, 65, 127, 128, 200]
"""Whole panels, and not."""


@cache
def product(name: str, axes: int = 1, dtype: Any = None) -> Any:
    matmul = MATMUL[name]
    return jax.jit(lambda x, w: matmul.multiply(x, matmul.lay_out(w, axes), axes, dtype))


def operands(rows: int, depth: int, columns: int, seed: int, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((rows, depth)), dtype), jnp.asarray(
        rng.standard_normal((depth, columns)), dtype
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_conforms(name: str, dtype: Any) -> None:
    """Within half a unit of the last place of the result, and the rounding of the sums."""

    @settings(max_examples=20)
    @given(st.sampled_from(ROWS), st.sampled_from(DEPTHS), st.sampled_from(COLUMNS), st.integers(0, 99))
    def conforms(rows: int, depth: int, columns: int, seed: int) -> None:
        x, w = operands(rows, depth, columns, seed, dtype)
        y = product(name)(x, w)
        assert y.dtype == dtype and y.shape == (rows, columns)
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
        last_place = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
        assert (np.abs(np.asarray(y, np.float64) - exact) <= last_place * np.abs(exact) + 1e-6 * size).all()

    conforms()


@cache
def gated(name: str, activation: str) -> Any:
    matmul = MATMUL[name]
    return jax.jit(lambda x, w: matmul.gated(x, matmul.lay_out(w, 1), activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_gated(name: str, activation: str) -> None:
    """Gates from where the activation is 0 to where it is the identity; of rounded products, or of exact ones."""

    @settings(max_examples=10)
    @given(st.sampled_from(ROWS), st.sampled_from(DEPTHS), st.sampled_from(COLUMNS), st.integers(0, 99))
    def conforms(rows: int, depth: int, columns: int, seed: int) -> None:
        x, w = operands(rows, depth, 2 * columns, seed)
        x = x * (10 * jax.random.normal(jax.random.key(seed), (rows, 1), x.dtype))
        y = gated(name, activation)(x, w.reshape(depth, 2, columns))
        assert y.dtype == x.dtype and y.shape == (rows, columns)
        gate, up = np.split(np.asarray(x, np.float64) @ np.asarray(w, np.float64), 2, axis=1)
        expected = ACTIVE[activation](gate) * up
        slack = 2.0**-6 * (np.abs(gate) + 1) * (np.abs(up) + 0.1)  # three roundings; no activation is steeper than 1.2
        assert (np.abs(np.asarray(y, np.float64) - expected) <= slack).all()

    conforms()


ACTIVE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x * (1 + np.tanh(x / 2)) / 2,
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_several_axes(name: str) -> None:
    x, w = operands(6, 40, 2 * 3 * 8, 0)
    y = product(name)(x.reshape(2, 3, 40), w.reshape(40, 2, 3, 8))
    np.testing.assert_array_equal(y.reshape(6, -1), product(name)(x, w))
    y = product(name, axes=3)(x.reshape(6, 2, 4, 5), w.reshape(2, 4, 5, 48))
    np.testing.assert_array_equal(y, product(name)(x, w))


@pytest.mark.parametrize("shape", [(40, 64), (41, 130), (3, 7)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_columns(name: str, dtype: Any, shape: tuple[int, int]) -> None:
    """As tied embeddings read them: the same numbers, wherever a layout puts them."""
    _, w = operands(1, *shape, 3, dtype)
    numbers = jnp.asarray(np.random.default_rng(0).integers(0, shape[1], (2, 5)))
    laid_out = MATMUL[name].lay_out(w, 1)
    np.testing.assert_array_equal(MATMUL[name].columns(laid_out, numbers), np.asarray(w).T[np.asarray(numbers)])


@needs_native
def test_a_layout_adds_no_more_than_fills_panels() -> None:
    _, w = operands(1, 40, 128, 0)
    assert MATMUL["native"].lay_out(w, 1).nbytes == w.nbytes
    assert MATMUL["native"].lay_out(w[:39, :65], 1).nbytes == w.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_a_result_that_is_not_rounded(name: str) -> None:
    """Of bfloat16, as logits need it."""
    x, w = operands(7, 300, 130, 4)
    y = product(name, dtype=jnp.float32)(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64), rtol=0, atol=1e-4)


@needs_native
@pytest.mark.parametrize("depth", [300, 301])
@pytest.mark.parametrize("columns", [100, 3000])
def test_a_row_is_the_same_alone_and_in_a_crowd(columns: int, depth: int) -> None:
    """Bit by bit, so that what a request gets does not depend on its neighbours; NaN in others stays there, also
    behind a row whose last number has none to make a pair with."""
    x, w = operands(40, depth, columns, 1)
    x = x.at[7].set(jnp.nan)
    alone = [product("native")(x[i : i + 1], w)[0] for i in (0, 6, 8, 39)]
    for rows in (9, 33, 40):
        together = product("native")(x[:rows], w)
        for i, row in zip((0, 6, 8, 39), alone, strict=True):
            if i < rows:
                np.testing.assert_array_equal(together[i], row)
        assert np.isnan(np.asarray(together[7], np.float32)).all()


@needs_native
def test_shared_by_threads() -> None:
    x, w = operands(700, 64, 130, 2)  # enough for threads to share
    whole = product("native")(x, w)
    np.testing.assert_array_equal(whole[600:620], product("native")(x[600:620], w))


def test_dispatch() -> None:
    assert dispatch.matmul_for(HERE).name == ("reference" if native.refusal() else "native")
    assert dispatch.matmul_for(HERE._replace(dtype="float16")).name == "reference"
    assert dispatch.matmul_for(HERE._replace(num_devices=2)).name == "reference"
    assert dispatch.matmul_for(HERE._replace(platform="gpu")).name == "reference"
    with pytest.raises(ValueError, match="native: XLA cannot spread it over 4 devices"):
        dispatch.matmul_for(HERE._replace(num_devices=4), "native")
    assert [MATMUL["reference"].fewest_rows(s) for s in (HERE, HERE._replace(platform="gpu"))] == [8, 1]
