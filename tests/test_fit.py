"""A model fitted to any number of ranks has every weight where it computes the same, and zeros where it has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Counting, InMemory

from jaxserve import LLM
from jaxserve.layers.attention import dense_causal_attention
from jaxserve.layers.norm import Norm
from jaxserve.models.config import DecoderConfig, LayerConfig, NormConfig
from jaxserve.weights.fit import Axes, fit_array, fit_source
from jaxserve.weights.loader import abstract_params, logical_axes, random_params
from pallas_kernels.matmul import ACTIVATIONS
from sharding import MeshConfig, ShardingRules, build_mesh, shard_shape
from sharding.padding import fit_heads

# -- how heads are cut up ----------------------------------------------------------------------------------------------


def decoder(kv_heads: int, group: int, ffn: int = 48, vocab: int = 101, **options: Any) -> DecoderConfig:
    return DecoderConfig(vocab, 16, ffn, kv_heads * group, kv_heads, 4, (LayerConfig(),), 64, **options)


@pytest.mark.parametrize(
    ("kv_heads", "group", "tp", "expected"),
    [
        (8, 4, 8, (1, 8, 4)),
        (2, 4, 4, (2, 4, 2)),
        (2, 3, 4, (2, 4, 2)),
        (6, 1, 4, (1, 8, 1)),
        (2, 7, 4, (2, 4, 4)),
        (2, 4, 3, (1, 3, 4)),
        (2, 4, 5, (2, 5, 2)),
        (3, 3, 8, (2, 8, 2)),
        (4, 3, 6, (1, 6, 3)),
        (4, 4, 3, (2, 9, 2)),
        (1, 8, 8, (8, 8, 1)),
        (2, 7, 1, (1, 2, 7)),
    ],
)
def test_examples(kv_heads: int, group: int, tp: int, expected: tuple[int, int, int]) -> None:
    """Expected: copies, KV heads, query heads of each."""
    assert fit_heads(kv_heads, group, tp) == expected
    fitted = decoder(kv_heads, group).fit_to(tp)
    assert (fitted.kv_copies, fitted.num_kv_heads, fitted.group_size) == expected


def test_columns_and_vocabulary_are_filled_up() -> None:
    fitted = decoder(6, 1, ffn=46, vocab=101).fit_to(4)
    assert (fitted.intermediate_size, fitted.vocab_size, fitted.vocab_padding) == (48, 101, 3)
    assert (fitted.num_heads, fitted.head_padding, fitted.kv_head_padding) == (8, 2, 2)


def test_what_divides_stays_as_it_is() -> None:
    config = decoder(8, 4, ffn=48, vocab=104)
    assert config.fit_to(1) == config.fit_to(4) == config.fit_to(8) == config


def test_a_rank_has_at_least_one_query_head() -> None:
    with pytest.raises(ValueError) as error:
        decoder(2, 3).fit_to(7)
    assert str(error.value) == (
        "tensor_parallel_size=7 does not fit this model: 6 query heads, 2 KV heads; the largest size that fits is 6"
    )


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 16)).filter(lambda s: s[0] * s[1] >= s[2])
"""KV heads, query heads of each, ranks."""


@given(SHAPES)
def test_never_more_than_needed(shape: tuple[int, int, int]) -> None:
    kv_heads, group, tp = shape
    copies, heads, queries = fit_heads(kv_heads, group, tp)
    assert heads % tp == 0 and heads >= copies * kv_heads and copies * queries >= group
    assert (copies - 1) * queries < group  # no copy without a query head
    possible = (
        (more * (2 * each + 2), more, times)
        for times in range(1, group + 1)
        for each in range(1, group + 1)
        for more in range(tp, kv_heads * group + tp, tp)
        if times * each >= group and more >= times * kv_heads
    )
    assert (heads * (2 * queries + 2), heads, copies) == min(possible)


# -- where the weights are ---------------------------------------------------------------------------------------------


ODD = [(2, 3, 4), (2, 4, 5), (4, 4, 3), (6, 1, 4), (3, 3, 8), (2, 4, 3)]
"""Of these, some are only copied, some only filled up, and of some a copied head lies on two ranks."""


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)


FULL = {"qk_norm": "full", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "unembed_bias": True}


@cache
def parameters(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of every parameter."""
    _, params = abstract_params(config, jnp.dtype("float32"))
    return {name: (p.get_value().shape, logical_axes(p)) for name, p in params.items()}


def unfitted(name: str, array: np.ndarray, stored: DecoderConfig, fitted: DecoderConfig) -> np.ndarray:
    """What of a fitted parameter came from the stored one, in its shape; zero is what is left without it."""
    heads, copies, group = stored.num_kv_heads, fitted.kv_copies, stored.group_size

    def queries(x: np.ndarray) -> np.ndarray:  # [K', G', ...] -> [K, G, ...]
        return take(take(x, heads * copies).reshape(heads, copies * x.shape[1], *x.shape[2:]), group, 1)

    def keys(x: np.ndarray) -> np.ndarray:  # [K', ...] -> [K, ...], each copy the same
        each = take(x, heads * copies).reshape(heads, copies, *x.shape[1:])
        np.testing.assert_array_equal(each, each[:, :1].repeat(copies, 1))
        return each[:, 0]

    def take(x: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
        inside, outside = np.split(x, [size], axis)
        assert not outside.any()
        return inside

    if "qkv" in name:
        x = array if "bias" in name else np.moveaxis(array, 0, -1)  # [K', G'+2, H, ...]
        q, kv = x[:, : fitted.group_size], x[:, fitted.group_size :]
        x = np.concatenate([queries(q), keys(kv)], 1)
        return x if "bias" in name else np.moveaxis(x, -1, 0)
    if name.endswith(("attn.o", "q_norm.weight")):
        return queries(array)
    if name.endswith("k_norm.weight"):
        return keys(array)
    for axis, (size, wanted) in enumerate(zip(array.shape, parameters(stored)[name][0], strict=True)):
        array = take(array, wanted, axis) if size > wanted else array
    return array


@given(SHAPES, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_every_weight_is_there_once_and_zeros_around_it(
    shape: tuple[int, int, int], ffn: int, vocab: int, gated: bool
) -> None:
    kv_heads, group, tp = shape
    stored = decoder(kv_heads, group, ffn, vocab, gated_mlp=gated, **FULL)
    fitted = stored.fit_to(tp)
    for name, (size, axes) in parameters(stored).items():
        values = numbered(size)
        source = fit_source(InMemory(values), axes, stored, fitted)
        array = source.read_all()
        assert array.shape == source.shape == parameters(fitted)[name][0]
        np.testing.assert_array_equal(unfitted(name, array, stored, fitted), values)


@pytest.mark.parametrize(("kv_heads", "group", "tp"), ODD)
def test_arrays_are_fitted_like_sources(kv_heads: int, group: int, tp: int) -> None:
    stored = decoder(kv_heads, group, ffn=46, **FULL)
    fitted = stored.fit_to(tp)
    for size, axes in parameters(stored).values():
        values = numbered(size)
        expected = fit_source(InMemory(values), axes, stored, fitted).read_all()
        np.testing.assert_array_equal(fit_array(jnp.asarray(values), axes, stored, fitted), expected)


@pytest.mark.parametrize(("kv_heads", "group", "tp"), ODD)
def test_a_rank_reads_its_own_and_nothing_else(kv_heads: int, group: int, tp: int) -> None:
    """Each weight that a rank holds is read once; one copied to several of its heads too, and zeros not at all."""
    stored = decoder(kv_heads, group, ffn=46)
    fitted, mesh = stored.fit_to(tp), build_mesh(MeshConfig(tp=tp))
    for name, (size, axes) in parameters(stored).items():
        counting = Counting(InMemory(numbered(size)))
        source = fit_source(counting, axes, stored, fitted)
        part = shard_shape(name, source.shape, axes, mesh, ShardingRules())
        for rank in range(tp):
            box = tuple(
                slice(rank * p, (rank + 1) * p) if p < n else slice(0, n)
                for p, n in zip(part, source.shape, strict=True)
            )
            before = counting.num_read
            values = source.read(box)
            assert counting.num_read - before == len(set(values.ravel()) - {0.0}), name


# -- what is computed --------------------------------------------------------------------------------------------------


def test_activations_leave_zero_alone() -> None:
    """On which filling up feed-forward columns rests."""
    assert all(float(activation(jnp.zeros(()))) == 0 for activation in ACTIVATIONS.values())


def test_a_norm_counts_real_entries_only() -> None:
    config = NormConfig()
    x = jax.random.normal(jax.random.key(0), (3, 10))
    plain = Norm((10,), config, jnp.dtype("float32"))
    filled = Norm((16,), config, jnp.dtype("float32"), count=10)
    y = filled(jnp.pad(x, ((0, 0), (0, 6))))
    np.testing.assert_allclose(y[:, :10], plain(x), rtol=1e-6)
    assert not y[:, 10:].any()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(FULL, marks=pytest.mark.slow),
        {"gated_mlp": False, "qk_norm": "head", "tied_embeddings": True},
    ],
)
def test_dummy_weights_are_of_one_model_on_every_mesh(options: dict[str, Any]) -> None:
    stored = replace(decoder(2, 3, ffn=46, **options), layers=(LayerConfig(rope=None),) * 2)
    tokens = jnp.asarray([[3, 100, 7, 50, 50, 1]])

    def logits(tp: int) -> np.ndarray:
        fitted, mesh = stored.fit_to(tp), build_mesh(MeshConfig(tp=tp))
        graph, params = random_params(stored, fitted, jnp.dtype("float32"), mesh, ShardingRules(), seed=3)
        params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)  # so that attention matters
        positions = jnp.arange(tokens.shape[1])[None]

        @jax.jit
        def forward(params: Any) -> jax.Array:
            model = nnx.merge(graph, params)
            return model.unembed(model(tokens, positions, dense_causal_attention(fitted)))

        return np.asarray(forward(params))

    one = logits(1)
    for tp in (2, 3, 4, 5, 6):
        many = logits(tp)
        assert np.isneginf(many[..., stored.vocab_size :]).all()
        np.testing.assert_allclose(many[..., : stored.vocab_size], one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_dummy_engine_says_the_same_on_an_odd_mesh(odd_model: Path, make_llm: Callable[..., LLM]) -> None:
    """Log-probabilities of a prompt; greedy tokens of random weights would be decided by rounding."""
    from jaxserve import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def said(**mesh: int) -> list[float]:
        llm = make_llm(odd_model, load_format="dummy", **mesh)
        (output,) = llm.generate([[5, 6, 7, 60, 61]], params, use_tqdm=False)
        return [e.logprob for entry in output.prompt_logprobs or () if entry for e in entry.values()]

    np.testing.assert_allclose(said(tensor_parallel_size=3), said(), atol=1e-4)
