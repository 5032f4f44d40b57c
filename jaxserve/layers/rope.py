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


def base_frequencies(rope: RopeConfig) -> np.ndarray:
    """theta^(-2i/dim), float64 [dim/2]."""
    return rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)


def static_frequencies(rope: RopeConfig) -> np.ndarray:
    """Scaled frequencies of the kinds that do not depend on the sequence's length, float64 [dim/2]."""
    freq = base_frequencies(rope)
    if rope.kind == "default":
        return freq
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, freq)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, freq)
    raise AssertionError(rope.kind)


def _llama3_frequencies(rope: RopeConfig, freq: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    turns = rope.original_max_position * freq / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * freq / rope.factor + smooth * freq


def _yarn_frequencies(rope: RopeConfig, freq: np.ndarray) -> np.ndarray:
    """Interpolate the dimensions that turn less than ``beta_slow`` times, keep those above ``beta_fast``."""

    def dimension_turning(times: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0.0, 1.0)
    return freq / rope.factor * (1 - keep) + freq * keep


def frequencies(rope: RopeConfig, lengths: Array) -> Array:
    """Frequencies of every token.

    lengths: int32 [R, T], the length of the token's sequence when the token was computed (a prompt's
    tokens: the prompt's length; a generated token: its position + 1). Returns float32 [1, 1, dim/2] or
    [R, T, dim/2].
    """
    if rope.kind == "dynamic":
        length = jnp.maximum(lengths, rope.original_max_position).astype(jnp.float32)
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
        exponents = -np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
        return theta[..., None] ** exponents[None, None]
    if rope.kind == "longrope":
        freq = base_frequencies(rope)
        long = (lengths > rope.original_max_position)[..., None]
        choices = [np.float32(freq / np.asarray(f))[None, None] for f in (rope.long_factor, rope.short_factor)]
        return jnp.where(long, *choices)
    return jnp.asarray(static_frequencies(rope), jnp.float32)[None, None]


def rope_tables(rope: RopeConfig, positions: Array, lengths: Array) -> tuple[Array, Array]:
    """cos and sin of every token's angles, float32 [R, T, dim/2], scaled by the attention factor."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies(rope, lengths)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
