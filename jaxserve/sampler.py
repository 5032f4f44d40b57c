"""From logits to the next token, on the device, inside the step.

Everything reduces over the vocabulary (maxima, sums, counts), so that sharded logits are never gathered: the
thresholds of top-k and top-p are found by bisection instead of a sort. Random numbers are a function of (seed,
position, token id) alone.

Order: bias rows (logit_bias, allowed_token_ids, bad_words, min_tokens) -> penalties -> temperature -> min_p ->
top_k -> top_p.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.logit_edits import IN_PROMPT


class SamplerState(NamedTuple):
    """Per sequence slot: bias float32 [dp, slots, V], added to logits; counts int32 [dp, slots, V], how often each
    token was generated, plus ``IN_PROMPT`` if the prompt has it."""

    bias: Array
    counts: Array


class SamplingRows(NamedTuple):
    """Parameters of the rows of a step, each [dp, S]; ``positions`` is that of the token to be sampled."""

    slots: Array
    seed_high: Array
    seed_low: Array
    positions: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    presence_penalty: Array
    frequency_penalty: Array
    repetition_penalty: Array


class Wanted(NamedTuple):
    """Scalars: whether any row of the batch needs the stage (see ``batch.Features``)."""

    sampling: Array
    truncation: Array
    penalties: Array
    logit_bias: Array


Constrain = Callable[[Array, tuple[str | None, ...]], Array]
"""Pins an array to the devices that its logical axes name."""
LOGITS = ("replica", None, "vocab")


def sample(
    logits: Array,
    rows: SamplingRows,
    wanted: Wanted,
    state: SamplerState,
    constrain: Constrain = lambda x, axes: x,
) -> Array:
    """Next token ids, int32 [dp, S], from float32 logits [dp, S, V].

    What a ``cond`` gives is pinned: on GPUs XLA would otherwise give every device all of it, and gather the logits.
    """
    with jax.named_scope("sample"):
        logits = constrain(jax.lax.cond(wanted.logit_bias, _add_bias, _unchanged, logits, rows, state), LOGITS)
        logits = constrain(jax.lax.cond(wanted.penalties, _penalize, _unchanged, logits, rows, state), LOGITS)
        draw = partial(_sample_rows, constrain=constrain)
        return constrain(jax.lax.cond(wanted.sampling, draw, _greedy, logits, rows, wanted), ("replica", None))


def _unchanged(logits: Array, rows: SamplingRows, state: SamplerState) -> Array:
    return logits


def _slot_rows(table: Array, slots: Array) -> Array:
    """table [dp, slots, V], slots [dp, S] -> [dp, S, V], replica by replica."""
    return jax.vmap(lambda t, s: t.at[s].get(mode="clip"))(table, slots)


def _add_bias(logits: Array, rows: SamplingRows, state: SamplerState) -> Array:
    return logits + _slot_rows(state.bias, rows.slots)


def _penalize(logits: Array, rows: SamplingRows, state: SamplerState) -> Array:
    """Repetition (of prompt and output), then frequency and presence (of output), as in OpenAI's API and vLLM."""
    seen = _slot_rows(state.counts, rows.slots)
    count = (seen & (IN_PROMPT - 1)).astype(jnp.float32)
    repetition = rows.repetition_penalty[..., None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen > 0, repeated, logits)
    logits -= rows.frequency_penalty[..., None] * count
    return logits - rows.presence_penalty[..., None] * (count > 0).astype(jnp.float32)


def argmax(logits: Array) -> Array:
    """Lowest index of the largest entry of the last axis, int32: two plain reductions, which vectorise and shard
    better than one over (value, index) pairs. The barrier keeps XLA:CPU from fusing them, which costs ten times as
    much (15 ms against 1.5 for 32 rows of 152k)."""
    best = jax.lax.optimization_barrier(jnp.max(logits, axis=-1, keepdims=True))
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == best, index, logits.shape[-1] - 1), axis=-1)


def _greedy(logits: Array, rows: SamplingRows, wanted: Wanted) -> Array:
    return argmax(logits)


def _sample_rows(logits: Array, rows: SamplingRows, wanted: Wanted, constrain: Constrain) -> Array:
    """Gumbel-max over the tokens that min_p, top_k and top_p leave; greedy rows stay greedy."""
    greedy = rows.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[..., None]
    kept = constrain(jax.lax.cond(wanted.truncation, _truncate, lambda x, _: x, scaled, rows), LOGITS)
    drawn = argmax(kept + _gumbel(rows, logits.shape[-1]))
    return jnp.where(greedy, argmax(logits), drawn)


def _gumbel(rows: SamplingRows, vocab: int) -> Array:
    """Noise [dp, S, V] that depends on seed, position and token id only (not on S, dp, or padding of V)."""

    def one_row(high: Array, low: Array, position: Array) -> Array:
        seed = jnp.stack([high, low]).astype(jnp.uint32)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jax.vmap(jax.vmap(one_row))(rows.seed_high, rows.seed_low, rows.positions)


def _truncate(scaled: Array, rows: SamplingRows) -> Array:
    """Logits [dp, S, V] with the tokens that min_p, top_k or top_p leave out at -inf. Ties at a threshold stay."""
    best = jnp.max(scaled, axis=-1, keepdims=True)
    likelihood = jnp.exp(scaled - best)  # relative to the best token
    scaled = jnp.where(likelihood >= rows.min_p[..., None], scaled, -jnp.inf)
    key = ordered_bits(scaled)
    vocab = scaled.shape[-1]
    k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    kth = _largest(lambda at_least: jnp.sum(at_least, axis=-1) >= k, key)
    scaled = jnp.where(key >= kth[..., None], scaled, -jnp.inf)
    likelihood = jnp.where(scaled > -jnp.inf, likelihood, 0.0)
    mass = rows.top_p * jnp.sum(likelihood, axis=-1)
    nucleus = _largest(
        lambda at_least: jnp.sum(jnp.where(at_least, likelihood, 0.0), axis=-1) >= mass, ordered_bits(scaled)
    )
    nucleus = jnp.where(rows.top_p < 1, nucleus, 0)
    return jnp.where(ordered_bits(scaled) >= nucleus[..., None], scaled, -jnp.inf)


def ordered_bits(x: Array) -> Array:
    """uint32 keys that compare as the floats do; both zeros are equal."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(bits == jnp.uint32(1 << 31), jnp.uint32(0), bits)  # -0.0
    negative = (bits >> 31) == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest(holds, key: Array) -> Array:
    """Largest threshold, uint32 [dp, S], for which ``holds(key >= threshold)``; bit by bit from the top."""

    def try_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(key >= candidate[..., None]), candidate, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(key.shape[:-1], jnp.uint32))


def count_tokens(counts: Array, slots: Array, tokens: Array, num_rows: Array) -> Array:
    """One device's part of ``SamplerState.counts`` with a step's tokens counted.

    counts [slots, V or a shard of it]; slots and tokens [S], tokens counted from the shard's first id, those
    outside of it ignored; num_rows: how many rows to count. A loop, so that with none the counts are not touched.
    """
    vocab = counts.shape[-1]

    def count_row(i: Array, counts: Array) -> Array:
        inside = (tokens[i] >= 0) & (tokens[i] < vocab)
        return counts.at[slots[i], jnp.clip(tokens[i], 0, vocab - 1)].add(inside.astype(jnp.int32))

    return jax.lax.fori_loop(0, num_rows, count_row, counts)
