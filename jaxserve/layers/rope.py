"""Rotary position embedding and its context extensions.

Sources: RoFormer (arXiv 2104.09864); YaRN and NTK-aware scaling (arXiv 2309.00071); LongRoPE (arXiv 2402.13753);
the ``llama3`` scaling of Llama 3.1's reference code. Constants and corner cases follow Hugging Face's
implementations, which checkpoints are written for.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.models.config import RopeConfig


def powers(rope: RopeConfig) -> np.ndarray:
    """theta^(2i/dim), float32 [dim/2]: of an exponent in float32, in float64, then rounded, as in torch."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return (rope.theta ** exponents.astype(np.float64)).astype(np.float32)


def static_frequencies(rope: RopeConfig) -> np.ndarray:
    """Scaled frequencies of the kinds that do not depend on the sequence's length, float32 [dim/2].

    An angle is a position times one of these, so that what its last bit is off by grows with the position: every step
    is rounded to float32 where Hugging Face rounds it.
    """
    if rope.kind == "yarn":
        return _yarn_frequencies(rope)
    freq = 1 / powers(rope)
    if rope.kind == "linear":
        return freq / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, freq)
    assert rope.kind == "default", rope.kind
    return freq


def _llama3_frequencies(rope: RopeConfig, freq: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelengths = 1 / freq * np.float32(2 * math.pi)
    turns = 1 / wavelengths * np.float32(rope.original_max_position)
    smooth = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * freq / np.float32(rope.factor) + smooth * freq
    long = wavelengths > rope.original_max_position / rope.low_freq_factor
    short = wavelengths < rope.original_max_position / rope.high_freq_factor
    return np.where(long, freq / np.float32(rope.factor), np.where(short, freq, between))


def _yarn_frequencies(rope: RopeConfig) -> np.ndarray:
    """Interpolate the dimensions that turn less than ``beta_slow`` times, keep those above ``beta_fast``."""

    def dimension_turning(times: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    theta_powers = powers(rope)
    return 1 / (np.float32(rope.factor) * theta_powers) * (1 - keep) + 1 / theta_powers * keep


def frequencies(rope: RopeConfig, lengths: Array) -> Array:
    """Frequencies of every token.

    lengths: int32 [R, T], the length of the token's sequence when the token was computed (a prompt's
    tokens: the prompt's length; a generated token: its position + 1). Returns float32 [1, 1, dim/2] or
    [R, T, dim/2].
    """
    if rope.kind not in ("dynamic", "longrope"):
        return jnp.asarray(static_frequencies(rope))[None, None]
    long = (lengths > rope.original_max_position)[..., None]
    if rope.kind == "dynamic":
        return jnp.where(long, _stretched_frequencies(rope, lengths), 1 / powers(rope))
    choices = [1 / (np.asarray(f, np.float32) * powers(rope)) for f in (rope.long_factor, rope.short_factor)]
    return jnp.where(long, *choices)


def _stretched_frequencies(rope: RopeConfig, lengths: Array) -> Array:
    """Of a theta that grows with the sequence's length, float32 [R, T, dim/2]."""
    length = jnp.maximum(lengths, rope.original_max_position).astype(jnp.float32)
    stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return 1 / theta[..., None] ** exponents[None, None]


def rope_tables(rope: RopeConfig, positions: Array, lengths: Array) -> tuple[Array, Array]:
    """cos and sin of every token's angles, float32 [R, T, dim/2], scaled by the attention factor."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies(rope, lengths)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
