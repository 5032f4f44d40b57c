"""The sampler against sorting and counting in numpy; its random numbers against the distribution they must give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.logit_edits import IN_PROMPT, LogitEdits, token_counts
from jaxserve.sampler import (
    SamplerState,
    SamplingRows,
    Wanted,
    _gumbel,
    _penalize,
    _truncate,
    argmax,
    count_tokens,
    ordered_bits,
    sample,
)
from jaxserve.sampling_params import SamplingParams

VOCABULARY = 13

truncate, penalize, draw_sample = jax.jit(_truncate), jax.jit(_penalize), jax.jit(sample)


def make_rows(dp: int, num_seqs: int, **values: Any) -> SamplingRows:
    """Neutral parameters but for ``values``, each broadcast to [dp, S]."""
    neutral: dict[str, Any] = dict.fromkeys(SamplingRows._fields, 0)
    neutral |= {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    whole = ("slots", "seed_high", "seed_low", "positions", "top_k")
    return SamplingRows(
        **{
            name: jnp.asarray(np.broadcast_to(value, (dp, num_seqs)), jnp.int32 if name in whole else jnp.float32)
            for name, value in (neutral | values).items()
        }
    )


def make_wanted(**flags: bool) -> Wanted:
    return Wanted(**{name: jnp.asarray(flags.get(name, False)) for name in Wanted._fields})


def empty_state(dp: int, slots: int, vocab: int) -> SamplerState:
    return SamplerState(jnp.zeros((dp, slots, vocab), jnp.float32), jnp.zeros((dp, slots, vocab), jnp.int32))


# -- what is left of the vocabulary ------------------------------------------------------------------------------------


def kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """bool [V]: min_p, then top_k, then top_p, by sorting; whoever ties with the last one in is in."""
    likelihood = np.exp(logits.astype(np.float64) - logits.max())
    keep = (likelihood >= min_p) & (likelihood > 0) if min_p > 0 else np.ones(len(logits), bool)
    if 0 < top_k < keep.sum():
        keep &= logits >= np.sort(logits[keep])[-top_k]
    if top_p < 1:
        order = np.argsort(-np.where(keep, logits, -np.inf), kind="stable")
        mass = np.cumsum(np.where(keep, likelihood, 0.0)[order])
        last = order[np.argmax(mass >= top_p * mass[-1])]
        keep &= logits >= logits[last]
    return keep


scores = st.integers(-6, 6).map(lambda n: n / 2) | st.floats(-9, 9, width=32) | st.just(-np.inf)
vectors = st.lists(scores, min_size=VOCABULARY, max_size=VOCABULARY).filter(lambda x: max(x) > -np.inf)
top_ks = st.sampled_from([0, 1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 2**31 - 1]) | st.integers(1, VOCABULARY)
top_ps = st.sampled_from([1e-6, 0.5, 0.999, 1.0]) | st.floats(0.01, 1.0)
min_ps = st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)


@given(st.lists(st.tuples(vectors, top_ks, top_ps, min_ps), min_size=6, max_size=6))
def test_truncation_is_what_sorting_gives(rows: list[tuple[list[float], int, float, float]]) -> None:
    """Rounding may decide either way on a token within 1e-5 of a threshold."""
    logits = np.array([row[0] for row in rows], np.float32).reshape(2, 3, -1)
    top_k, top_p, min_p = (np.array([row[i] for row in rows]).reshape(2, 3) for i in (1, 2, 3))
    out = np.asarray(truncate(logits, make_rows(2, 3, top_k=top_k, top_p=top_p, min_p=min_p)))
    left = out > -np.inf
    np.testing.assert_array_equal(out[left], logits[left])
    for i in np.ndindex(2, 3):
        close = [
            kept(logits[i], int(top_k[i]), float(np.clip(top_p[i] * p, 0, 1)), float(min_p[i] * m))
            for p in (1 - 1e-5, 1 + 1e-5 * (top_p[i] < 1))
            for m in (1 - 1e-5, 1 + 1e-5)
            if min_p[i] * m <= 1
        ]
        finite = logits[i] > -np.inf
        assert (left[i] >= np.all(close, axis=0) & finite).all()
        assert (left[i] <= np.any(close, axis=0)).all()
        assert left[i][np.argmax(logits[i])]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 1}, [1, 3]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 4}, [0, 1, 2, 3, 5]),
        ({"top_k": 100}, [0, 1, 2, 3, 5]),
        ({"top_p": 1e-9}, [1, 3]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 0.8}, [1, 2, 3]),
        ({"min_p": 1.0}, [1, 3]),
        ({"min_p": 0.3}, [1, 2, 3]),
        ({"min_p": 0.3, "top_k": 4, "top_p": 0.99}, [1, 2, 3]),
        ({"top_k": 3, "top_p": 0.79}, [1, 3]),
        ({"top_k": 3, "top_p": 0.81}, [1, 2, 3]),
        ({}, [0, 1, 2, 3, 5]),
    ],
    ids=str,
)
def test_truncation_worked_out_by_hand(options: dict[str, float], left: list[int]) -> None:
    """Likelihoods 2, 16, 8, 16, 0, 2 of 44: ties stay together."""
    logits = np.log(np.array([2, 16, 8, 16, 1e-30, 2], np.float32)).reshape(1, 1, -1)
    logits[..., 4] = -np.inf
    out = truncate(logits, make_rows(1, 1, **options))
    assert np.flatnonzero(np.asarray(out)[0, 0] > -np.inf).tolist() == left


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=12, max_size=12))
def test_ordered_bits_order_as_the_floats(values: list[float]) -> None:
    x = np.array([*values, -0.0, 0.0], np.float32)
    bits = np.asarray(ordered_bits(jnp.asarray(x)))
    np.testing.assert_array_equal(bits[:, None] < bits[None], x[:, None] < x[None])


# -- penalties and edits -----------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@given(tokens, tokens, st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 3), st.integers(0, 2**32 - 1))
def test_penalties(
    prompt: list[int], output: list[int], presence: float, frequency: float, repetition: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (1, 1, VOCABULARY)).astype(np.float32)
    counts = token_counts(prompt, output, VOCABULARY)
    state = empty_state(1, 2, VOCABULARY)
    state = state._replace(counts=state.counts.at[0, 1].set(counts))
    rows = make_rows(
        1, 1, slots=1, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    expected = []
    for token, logit in enumerate(logits[0, 0]):
        if token in prompt or token in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        expected.append(logit - frequency * output.count(token) - presence * (token in output))
    np.testing.assert_allclose(np.asarray(penalize(logits, rows, state))[0, 0], expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-3, 20)), min_size=5, max_size=5), st.integers(0, 5))
def test_counting_tokens(sampled: list[tuple[int, int]], num_rows: int) -> None:
    """Tokens of another shard, below 0 or past the last one here, are somebody else's."""
    before = np.arange(3 * VOCABULARY, dtype=np.int32).reshape(3, VOCABULARY) + IN_PROMPT
    slots, ids = (np.array(x, np.int32) for x in zip(*sampled, strict=True))
    after = jax.jit(count_tokens)(before, slots, ids, num_rows)
    expected = before.copy()
    for slot, token in sampled[:num_rows]:
        if 0 <= token < VOCABULARY:
            expected[slot, token] += 1
    np.testing.assert_array_equal(after, expected)


def test_each_row_gets_the_bias_and_the_counts_of_its_slot() -> None:
    state = empty_state(2, 3, VOCABULARY)
    bias, counts = np.zeros((2, 3, VOCABULARY), np.float32), np.zeros((2, 3, VOCABULARY), np.int32)
    for replica in range(2):
        for slot in range(3):
            bias[replica, slot, 3 * replica + slot] = 50
            counts[replica, slot, 3 * replica + slot] = 1
    slots = np.array([[2, 0], [1, 2]])
    expected = [[2, 0], [4, 5]]
    logits = jnp.zeros((2, 2, VOCABULARY))
    rows = make_rows(2, 2, slots=slots, temperature=0, presence_penalty=-1.0)
    biased = draw_sample(logits, rows, make_wanted(logit_bias=True), state._replace(bias=jnp.asarray(bias)))
    assert np.asarray(biased).tolist() == expected
    rewarded = draw_sample(logits, rows, make_wanted(penalties=True), state._replace(counts=jnp.asarray(counts)))
    assert np.asarray(rewarded).tolist() == expected
    neither = draw_sample(logits, rows, make_wanted(), SamplerState(jnp.asarray(bias), jnp.asarray(counts)))
    assert not np.asarray(neither).any()


def test_rows_of_edits_are_written_only_when_they_change() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=[4], logit_bias={1: 2.5}, allowed_token_ids=[1, 2, 4, 5])
    edits = LogitEdits(params, 7, [4], [(5,), (1, 2), (1, 1, 4)])
    banned = -np.inf

    def row(output: list[int], rewrite: bool = False) -> list[float] | None:
        written = edits.row(output, len(output), rewrite=rewrite)
        return None if written is None else written.tolist()

    start = [banned, 2.5, 0, banned, banned, banned, banned]
    assert row([], rewrite=True) == start
    assert row([2]) is None
    assert row([2], rewrite=True) == start
    assert row([2, 2]) == [banned, 2.5, 0, banned, 0, banned, banned]
    assert row([2, 2, 1]) == [banned, 2.5, banned, banned, 0, banned, banned]
    assert row([2, 2, 1, 1]) == [banned, 2.5, banned, banned, banned, banned, banned]
    assert row([2, 2, 1, 1, 2]) == [banned, 2.5, 0, banned, 0, banned, banned]


def test_tokens_in_flight_count_towards_min_tokens() -> None:
    edits = LogitEdits(SamplingParams(min_tokens=3, stop_token_ids=[4]), 6, [4], [])
    for num_output, banned in ((0, True), (1, None), (2, None), (3, False), (4, None)):
        row = edits.row([], num_output, rewrite=num_output == 0)
        assert (None if row is None else bool(row[4] == -np.inf)) == banned


# -- choosing ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-2, 2) | st.just(-np.inf), min_size=VOCABULARY, max_size=VOCABULARY))
def test_argmax_takes_the_first_of_equals(values: list[float]) -> None:
    x = np.array(values, np.float32)
    assert int(jax.jit(argmax)(x)) == np.argmax(x)


def test_greedy_rows_stay_greedy_beside_sampled_ones() -> None:
    logits = np.random.default_rng(0).normal(0, 1, (1, 64, VOCABULARY)).astype(np.float32)
    temperature = np.arange(64).reshape(1, 64) % 2 * 5.0
    rows = make_rows(1, 64, temperature=temperature, seed_low=np.arange(64).reshape(1, 64))
    drawn = np.asarray(draw_sample(logits, rows, make_wanted(sampling=True), empty_state(1, 1, VOCABULARY)))
    best = np.argmax(logits, -1)
    assert (drawn == best)[temperature == 0].all()
    assert (drawn != best)[temperature > 0].mean() > 0.5


NUM_DRAWS = 20_000


def draws(probabilities: np.ndarray, **values: Any) -> np.ndarray:
    """NUM_DRAWS tokens sampled from log-probabilities."""
    logits = np.broadcast_to(np.log(probabilities).astype(np.float32), (1, NUM_DRAWS, len(probabilities)))
    wanted = make_wanted(sampling=True, truncation=bool({"top_k", "top_p", "min_p"} & set(values)))
    return np.asarray(
        draw_sample(logits, make_rows(1, NUM_DRAWS, **values), wanted, empty_state(1, 1, logits.shape[-1]))
    )[0]


def assert_distributed(drawn: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's statistic within five standard deviations of what chance gives; fixed seeds, so no flakiness."""
    possible = probabilities > 0
    observed = np.bincount(drawn, minlength=len(probabilities))
    assert not observed[~possible].any()
    expected = len(drawn) * probabilities[possible]
    statistic = np.sum((observed[possible] - expected) ** 2 / expected)
    freedom = possible.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


PROBABILITIES = np.array([0.3, 0.02, 0.08, 0.25, 0.05, 0.1, 0.2])
EACH = np.arange(NUM_DRAWS)[None]


@pytest.mark.parametrize("varied", ["seed_low", "seed_high", "positions"])
def test_frequencies_are_the_softmax(varied: str) -> None:
    assert_distributed(draws(PROBABILITIES, **{varied: EACH}), PROBABILITIES)


def test_frequencies_follow_temperature_and_truncation() -> None:
    hot = PROBABILITIES ** (1 / 1.7)
    assert_distributed(draws(PROBABILITIES, positions=EACH, temperature=1.7), hot / hot.sum())
    four = np.where(PROBABILITIES >= 0.1, PROBABILITIES, 0)
    assert_distributed(draws(PROBABILITIES, positions=EACH, top_k=4), four / four.sum())
    assert_distributed(draws(PROBABILITIES, positions=EACH, top_p=0.8), four / four.sum())
    assert_distributed(draws(PROBABILITIES, positions=EACH, min_p=0.3), four / four.sum())


@pytest.mark.parametrize("varied", ["seed_low", "positions"])
def test_neighbouring_draws_are_independent(varied: str) -> None:
    drawn = draws(PROBABILITIES, **{varied: EACH})
    pairs = drawn[:-1] * len(PROBABILITIES) + drawn[1:]
    assert_distributed(pairs, np.outer(PROBABILITIES, PROBABILITIES).ravel())


def test_noise_depends_on_seed_position_and_token_only() -> None:
    gumbel = jax.jit(_gumbel, static_argnums=1)
    rng = np.random.default_rng(0)
    seeds: dict[str, Any] = {name: rng.integers(-(2**31), 2**31, (2, 5)) for name in ("seed_high", "seed_low")} | {
        "positions": rng.integers(0, 2**31, (2, 5))
    }
    noise = np.asarray(gumbel(make_rows(2, 5, **seeds), 104))
    assert noise.shape == (2, 5, 104) and np.isfinite(noise).all()
    assert len(np.unique(noise)) > 0.99 * noise.size
    np.testing.assert_array_equal(noise[..., :103], gumbel(make_rows(2, 5, **seeds), 103))
    flat = {name: value.reshape(1, 10) for name, value in seeds.items()}
    np.testing.assert_array_equal(noise.reshape(1, 10, 104), gumbel(make_rows(1, 10, **flat), 104))
    for i in np.ndindex(2, 5):
        alone = gumbel(make_rows(1, 1, **{name: value[i] for name, value in seeds.items()}), 104)
        np.testing.assert_array_equal(noise[i], np.asarray(alone)[0, 0])
