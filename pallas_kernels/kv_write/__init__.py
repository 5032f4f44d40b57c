"""From the QKV product to attention's inputs: per-head norm, rotary embedding, and K and V into the paged caches.

The caches are [block, kv_head, token, head_dim], as those of ``paged_attention.reference``. Padding tokens have slots
in block 0, which nobody reads: what lies there afterwards is not defined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array

from pallas_kernels.paged_attention import Scoring, Setting


class Inputs(NamedTuple):
    """Of T tokens, K kv heads of G query heads each, head dim H.

    qkv [T, K, G+2, H]: the product with its bias added; of every kv head the query heads, then K, then V.
    slot_mapping int32 [T]: block * block_size + offset that a token's K and V are written to.
    rope: cos and sin of every token's angles, float32 [T, R/2]; entry i of a head turns with entry i + R/2, and the
    last H - R do not turn. None = nothing does.
    norm_weights: [H] of the queries' norm and [H] of the keys'. None = no norm.
    """

    qkv: Array
    slot_mapping: Array
    rope: tuple[Array, Array] | None = None
    norm_weights: tuple[Array, Array] | None = None

    @property
    def group(self) -> int:
        return self.qkv.shape[2] - 2


class HeadNorm(NamedTuple):
    """x / rms(x) * (weight + offset) over a head, in float32: the static part of it. Gemma stores weight - 1."""

    eps: float = 1e-6
    offset: float = 0.0


@dataclass(frozen=True)
class KvWrite:
    """One implementation."""

    name: str
    write: Callable[[Array, Array, Inputs, HeadNorm, Scoring], tuple[Array, Array, Array]]
    """(k_cache, v_cache, inputs, norm, scoring) -> (q [T, K, G, H] in qkv's dtype, the caches with K and V written).
    The norm's result is rounded to qkv's dtype before it turns, as that of a norm on its own would be."""
    refuses: Callable[[Setting], str | None] = lambda setting: None
    """Why it cannot run there, if so."""
