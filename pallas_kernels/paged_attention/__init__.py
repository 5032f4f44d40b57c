"""Ragged paged attention over a super-sequence: the shared types.

T tokens of up to S sequences lie back to back: sequence s owns rows ``cu_q_lens[s] : cu_q_lens[s + 1]``. Its K and V
lie in blocks of ``block_size`` tokens, found through row s of ``block_tables``. Rows past ``cu_q_lens[S]`` are
padding: what attention returns for them is zero, and their K and V go to block 0, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from pallas_kernels.kv_write import KvWrite


class Ragged(NamedTuple):
    """Where the tokens of a step belong. All int32.

    slot_mapping [T]: block * block_size + offset that token t's K and V are written to;
    cu_q_lens [S+1]: first row of each sequence; kv_lens [S]: tokens of it in the cache, this step's included
    (0 for an empty row); block_tables [S, B]: its blocks in order, anything behind the last live one; visible [T]: how
    many of its sequence's tokens in the cache token t may see, itself included where it is there: it sees the first
    ones. (Where ranks share a context, a rank's cache has some of a sequence's tokens only, in their order.)
    """

    slot_mapping: Array
    cu_q_lens: Array
    kv_lens: Array
    block_tables: Array
    visible: Array


NOTHING = -1e29
"""A log-sum-exp below this is that of no keys at all."""

CacheShapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of the K and of the V cache; axes 0 and 1 are block and kv head."""


class Shape(NamedTuple):
    """Static facts of one layer's attention that decide how its work is cut up."""

    block_size: int
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None = all. Not where ranks share a context."""
    one_token_each: bool = False
    """Every sequence has one token, so that token t is the token of sequence t (and T = S)."""


class Scoring(NamedTuple):
    """What turns q.k into scores: multiplied by ``scale``, then softcap * tanh(. / softcap) if there is one. K and V
    are what lies in the caches times ``k_scale`` and ``v_scale``: of caches of 8 bits."""

    scale: float
    softcap: float | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0


class Setting(NamedTuple):
    """What an implementation has to cope with."""

    platform: str
    """cpu or gpu."""
    capability: tuple[int, int] | None
    """Of a GPU: (9, 0) is Hopper."""
    dtype: str
    """Of q."""
    kv_dtype: str
    head_dim: int
    group: int
    """Query heads per KV head."""
    block_size: int


@dataclass(frozen=True)
class PagedAttention:
    """One implementation. It owns the layout of its cache and the plan of its work."""

    name: str
    cache_shapes: Callable[[int, int, int, int], CacheShapes]
    """(num_blocks, block_size, kv_heads, head_dim) -> shapes of the two caches."""
    kv_write: KvWrite
    """What fills caches of this layout, and turns queries on the way."""
    plan: Callable[[Ragged, int, Shape], Any]
    """(ragged, T, shape) -> a pytree of arrays: the work of a step, made once for all layers of the same shape."""
    attend: Callable[[Array, Array, Array, Any, Shape, Scoring], tuple[Array, Array]]
    """(q [T,K,G,H], k_cache, v_cache, plan, shape, scoring) -> float32 output [T,K,G,H] and log-sum-exp of the scores
    [T,K,G]: a token that sees nothing here has output 0 and a log-sum-exp of at most ``NOTHING``."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""
    addresses: Callable[[int, int], bool] = lambda num_elements, num_bytes: True
    """Whether it reaches all of a cache of this size; of up to 2**31 elements it does."""


def stored(x: Array, dtype: jnp.dtype, scale: float) -> Array:
    """K or V as a cache of ``dtype`` holds it: 8 bits saturate instead of wrapping around or turning into NaN."""
    if dtype.itemsize > 1:
        return x.astype(dtype)
    scaled = x.astype(jnp.float32) / scale
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.clip(jnp.round(scaled), -127, 127).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(scaled, -largest, largest).astype(dtype)
