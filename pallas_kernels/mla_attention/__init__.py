"""Multi-head latent attention over a super-sequence (DeepSeek-V2 and V3), absorbed: the shared types.

A token's keys and values of all heads come from one latent vector c [C] and one rotated key part r [R], and these are
what is cached: every query head reads the same C + R numbers of a token. Queries come absorbed, that is, multiplied by
the head's W_UK, so that for a head

    score = (q_latent . c + q_rope . r) * scale        output [C] = sum over the tokens it sees of softmax(score) c

and the caller multiplies the output by the head's W_UV. Tokens, blocks and lengths are ``Ragged``'s, as in
``pallas_kernels.paged_attention``, and the same is true of padding.

The cache is one array [block, token, C + R], c before r. Both are written together and read together by everyone, so
that two arrays would only be twice the buffers to donate, to swap out and to scatter to; a token is one run of memory
(1,152 bytes of 16-bit numbers), of which a kernel takes its two parts with offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import Array

from pallas_kernels.paged_attention import Ragged, Scoring, Shape


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    capability: tuple[int, int] | None
    """Of a GPU: (9, 0) is Hopper."""
    dtype: str
    """Of the queries."""
    kv_dtype: str
    num_heads: int
    """Query heads on one device."""
    latent_dim: int
    rope_dim: int
    block_size: int


class Queries(NamedTuple):
    """Absorbed, of T tokens and N heads: latent [T, N, C] and rope [T, N, R], of one dtype."""

    latent: Array
    rope: Array


@dataclass(frozen=True)
class MlaAttention:
    """One implementation. In its ``Scoring``, c and r are what lies in the cache times ``k_scale``; V is c, and
    ``v_scale`` has to be the same."""

    name: str
    write: Callable[[Array, Array, Array, Array, Scoring], Array]
    """(cache, c [T, C], r [T, R], slot_mapping [T], scoring) -> the cache with the tokens written; numbers that a cache
    of 8 bits cannot hold become the nearest that it can. Padding tokens have slots in block 0."""
    plan: Callable[[Ragged, int, int, Shape], Any]
    """(ragged, T, N, shape) -> a pytree of arrays: the work of a step, made once for all layers."""
    attend: Callable[[Queries, Array, Any, Shape, Scoring], tuple[Array, Array]]
    """(queries, cache, plan, shape, scoring) -> float32 output [T, N, C] and log-sum-exp of the scores [T, N]: a token
    that sees nothing here has output 0 and a log-sum-exp of at most ``paged_attention.NOTHING``."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""


def cache_shape(num_blocks: int, block_size: int, latent_dim: int, rope_dim: int) -> tuple[int, int, int]:
    """[block, token, C + R], of every implementation."""
    return num_blocks, block_size, latent_dim + rope_dim


def check_scales(scoring: Scoring) -> None:
    if scoring.k_scale != scoring.v_scale:
        raise ValueError(f"keys and values are one array: k_scale={scoring.k_scale} and v_scale={scoring.v_scale}")
