"""From logits to the next token, on the device, inside the step.

Everything reduces over the vocabulary (maxima, sums, counts), so that sharded logits are never gathered: the
thresholds of top-k and top-p are found digit by digit instead of by a sort. Random numbers are a function of (seed,
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
from pallas_kernels.sampling import Tails, ordered_bits
from pallas_kernels.sampling import reference as reference_tails


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
FindCutoff = Callable[[Array, Array, Array, Array], Array]
"""As ``find_cutoff``, of the whole vocabulary."""


def find_cutoff(
    scaled: Array,
    best: Array,
    top_k: Array,
    top_p: Array,
    tails: Tails = reference_tails.IMPLEMENTATION,
    add_up: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """The smallest ``ordered_bits`` that top_k and then top_p leave, uint32 [dp, S].

    scaled float32 [dp, S, V], or a device's part of it, without NaN; best float32 [dp, S], their largest entries;
    top_k int32 [dp, S], at least 1, no more than there are; top_p float32 [dp, S]. ``add_up``: of [dp * S, C] numbers,
    over the devices that have the other parts. Sums of likelihoods are rounded, by each device and then in adding up:
    where a sum is within that of top_p's share, it depends on the mesh and the implementation whether a token is in.
    """
    rows, scaled = top_k.shape, scaled.reshape(-1, scaled.shape[-1])
    best, top_k, top_p = (x.reshape(-1) for x in (best, top_k, top_p))
    count, mass = tails.count(scaled), tails.mass(scaled, best)
    kth = _largest(lambda at_least: add_up(count(at_least)) >= top_k[:, None], len(top_k), tails.bits)
    wanted = top_p[:, None] * add_up(mass(kth[:, None]))
    nucleus = _largest(
        lambda at_least: add_up(mass(jnp.maximum(at_least, kth[:, None]))) >= wanted, len(top_p), tails.bits
    )
    return jnp.where(top_p < 1, jnp.maximum(nucleus, kth), kth).reshape(rows)


def _largest(holds: Callable[[Array], Array], num_rows: int, bits: int) -> Array:
    """Each row's largest threshold that ``holds``, uint32 [S], found ``bits`` at a time from the top. ``holds``:
    thresholds [S, C], none of them 0 -> bool [S, C]; what is smaller than one that does, does too."""
    digits = jnp.arange(1, 1 << bits, dtype=jnp.uint32)[None]

    def find_digit(i: Array, threshold: Array) -> Array:
        shift = jnp.maximum(32 - bits * (i + 1), 0)  # the last digit may overlap the one before
        candidates = threshold | (digits << shift.astype(jnp.uint32))
        return jnp.max(jnp.where(holds(candidates), candidates, threshold), axis=1, keepdims=True)

    return jax.lax.fori_loop(0, -(-32 // bits), find_digit, jnp.zeros((num_rows, 1), jnp.uint32))[:, 0]


def sample(
    logits: Array,
    rows: SamplingRows,
    wanted: Wanted,
    state: SamplerState,
    constrain: Constrain = lambda x, axes: x,
    find_cutoff: FindCutoff = find_cutoff,
) -> Array:
    """Next token ids, int32 [dp, S], from float32 logits [dp, S, V].

    What a ``cond`` gives is pinned: on GPUs XLA would otherwise give every device all of it, and gather the logits.
    """
    with jax.named_scope("sample"):
        logits = constrain(jax.lax.cond(wanted.logit_bias, _add_bias, _unchanged, logits, rows, state), LOGITS)
        logits = constrain(jax.lax.cond(wanted.penalties, _penalize, _unchanged, logits, rows, state), LOGITS)
        draw = partial(_sample_rows, constrain=constrain, find_cutoff=find_cutoff)
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


def _sample_rows(
    logits: Array, rows: SamplingRows, wanted: Wanted, constrain: Constrain, find_cutoff: FindCutoff
) -> Array:
    """Gumbel-max over the tokens that min_p, top_k and top_p leave; greedy rows stay greedy."""
    greedy = rows.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[..., None]
    truncate = partial(_truncate, find_cutoff=find_cutoff)
    kept = constrain(jax.lax.cond(wanted.truncation, truncate, lambda x, _: x, scaled, rows), LOGITS)
    drawn = argmax(kept + _gumbel(rows, logits.shape[-1]))
    return jnp.where(greedy, argmax(logits), drawn)


def _gumbel(rows: SamplingRows, vocab: int) -> Array:
    """Noise [dp, S, V] that depends on seed, position and token id only (not on S, dp, or padding of V)."""

    def one_row(high: Array, low: Array, position: Array) -> Array:
        seed = jnp.stack([high, low]).astype(jnp.uint32)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jax.vmap(jax.vmap(one_row))(rows.seed_high, rows.seed_low, rows.positions)


def _truncate(scaled: Array, rows: SamplingRows, find_cutoff: FindCutoff = find_cutoff) -> Array:
    """Logits [dp, S, V] with the tokens that min_p, top_k or top_p leave out at -inf. Ties at a threshold stay."""
    best = jnp.max(scaled, axis=-1, keepdims=True)
    likelihood = jnp.exp(scaled - best)  # relative to the best token
    scaled = jnp.where(likelihood >= rows.min_p[..., None], scaled, -jnp.inf)
    vocab = scaled.shape[-1]
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    cutoff = find_cutoff(scaled, best[..., 0], top_k, rows.top_p)
    return jnp.where(ordered_bits(scaled) >= cutoff[..., None], scaled, -jnp.inf)


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
