"""One kernel for all of it, in Pallas' Triton style: Ampere to Blackwell.

A program takes a tile of tokens of one KV head: it reads their query heads, K, V and angles once, and writes q and the
two caches once. The caches are updated in place.

What the code owes to this backend (jax 0.11.2): every array's size is a power of two, so the two rotating parts of a
head and the rest of it are loaded apart, each filled up and masked; ``max`` and ``min`` drop NaN and there is no
``round``, so ``_stored`` spells out what ``paged_attention.stored`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import tuning
from pallas_kernels.kv_write import HeadNorm, Inputs, KvWrite
from pallas_kernels.paged_attention import Scoring, Setting
from pallas_kernels.triton_tiles import check_offsets

TILE_ENTRIES = 4096
"""Of the query heads that a program holds: 32 float32 registers a thread. With K, V and the angles ptxas then uses 40
to 96 of the 255 that there are, for head dims of 64 to 256."""
PROGRAMS = 256
"""That a step should have, by a factor of two, where a smaller tile can give them: an H200 has 132 SMs."""
NUM_WARPS = 4
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
SUPPORTED_KV_DTYPES = (*SUPPORTED_DTYPES, "float8_e4m3fn", "int8")


@dataclass(frozen=True)
class Tile:
    """How the work is cut up: tokens of a program (a power of two), and its warps."""

    tokens: int
    num_warps: int = NUM_WARPS


def tile_of(num_tokens: int, kv_heads: int, group: int, head_dim: int) -> Tile:
    """As many tokens as the registers hold, and fewer where that leaves SMs without work."""
    tokens = max(1, TILE_ENTRIES // (pl.next_power_of_2(group) * pl.next_power_of_2(head_dim)))
    for_all = pl.next_power_of_2(max(1, num_tokens * kv_heads // PROGRAMS))
    return Tile(min(tokens, for_all))


def _refuses_tile(shape: Mapping[str, str], tile: Tile) -> str | None:
    return tuning.powers_of_two(tile, "tokens", "num_warps")


TUNED = tuning.read("kv_write/triton", Tile, ("tokens", "kv_heads", "group", "head_dim"), _refuses_tile)
"""``tokens``: the next power of two."""


def write(
    k_cache: Array,
    v_cache: Array,
    inputs: Inputs,
    norm: HeadNorm,
    scoring: Scoring,
    *,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    check_offsets(k_cache)
    num_tokens, kv_heads, _, head_dim = inputs.qkv.shape
    if tile is None:
        tokens = pl.next_power_of_2(num_tokens)
        tuned = TUNED.get(tokens=tokens, kv_heads=kv_heads, group=inputs.group, head_dim=head_dim)
        tile = tuned or tile_of(num_tokens, kv_heads, inputs.group, head_dim)
    q_shape = (num_tokens, kv_heads, inputs.group, head_dim)
    outputs = [(q_shape, inputs.qkv.dtype), (k_cache.shape, k_cache.dtype), (v_cache.shape, v_cache.dtype)]
    first_cache = len(jax.tree.leaves(inputs))
    call = pl.pallas_call(
        partial(_kernel, tile=tile, norm=norm, scoring=scoring),
        grid=(pl.cdiv(num_tokens, tile.tokens), kv_heads),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        input_output_aliases={first_cache: 1, first_cache + 1: 2},
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=1),
        interpret=interpret,
        name="kv_write",
    )
    return tuple(call(inputs, k_cache, v_cache))


class _Columns(NamedTuple):
    """A part of every head: where its entries are [1, 1, P], P a power of two, and which of these exist."""

    at: Array
    exist: Array

    @classmethod
    def of(cls, start: int, size: int) -> _Columns:
        column = jnp.arange(pl.next_power_of_2(size))[None, None]
        return cls(start + column, column < size)


def _kernel(
    inputs: Inputs,
    old_k_cache: Any,
    old_v_cache: Any,
    q_out: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    tile: Tile,
    norm: HeadNorm,
    scoring: Scoring,
) -> None:
    """``inputs`` holds references. A tile's arrays are [tokens, heads, columns]."""
    num_tokens, _, _, head_dim = inputs.qkv.shape
    group, kv_head = inputs.group, pl.program_id(1)
    token = (pl.program_id(0) * tile.tokens + jnp.arange(tile.tokens))[:, None, None]
    live = token < num_tokens
    slot = _load(inputs.slot_mapping, (token,), live)
    block, offset = slot // k_cache.shape[2], slot % k_cache.shape[2]

    parts = _parts(inputs, head_dim)
    rope = None
    if inputs.rope is not None:
        rope = [_load(table, (token, parts[0].at), live & parts[0].exist) for table in inputs.rope]

    def transformed(head: Array, exists: Array, which: int) -> list[tuple[_Columns, Array, Array]]:
        """The query heads or K, normalised and turned: of each part its columns, what exists of it, and its values."""
        masks = [live & exists & part.exist for part in parts]
        values = [
            _load(inputs.qkv, (token, kv_head, head, part.at), mask) for part, mask in zip(parts, masks, strict=True)
        ]
        if inputs.norm_weights is not None:
            weights = [_load(inputs.norm_weights[which], (part.at,), part.exist) for part in parts]
            values = _normalized(values, weights, head_dim, norm)
        return list(zip(parts, masks, values if rope is None else _rotated(values, *rope), strict=True))

    query_head = jnp.arange(pl.next_power_of_2(group))[None, :, None]
    for part, mask, values in transformed(query_head, query_head < group, 0):
        _store(q_out, (token, kv_head, query_head, part.at), values, mask)
    key_head = jnp.full((1, 1, 1), group, jnp.int32)
    for part, mask, values in transformed(key_head, key_head == group, 1):
        _store(k_cache, (block, kv_head, offset, part.at), _stored(values, k_cache.dtype, scoring.k_scale), mask)
    whole = _Columns.of(0, head_dim)
    mask = live & whole.exist
    values = _load(inputs.qkv, (token, kv_head, key_head + 1, whole.at), mask)
    _store(v_cache, (block, kv_head, offset, whole.at), _stored(values, v_cache.dtype, scoring.v_scale), mask)


def _parts(inputs: Inputs, head_dim: int) -> list[_Columns]:
    """The two rotating parts of a head and the rest of it, as far as there are any."""
    half = 0 if inputs.rope is None else inputs.rope[0].shape[-1]
    ranges = [(0, half), (half, half), (2 * half, head_dim - 2 * half)]
    return [_Columns.of(start, size) for start, size in ranges if size]


def _load(ref: Any, index: tuple[Any, ...], mask: Array) -> Array:
    """Zero where the mask is not. ``index`` is broadcast to the mask's shape."""
    return plt.load(ref.at[_broadcast(index, mask)], mask=mask, other=jnp.zeros((), ref.dtype))


def _store(ref: Any, index: tuple[Any, ...], values: Array, mask: Array) -> None:
    plt.store(ref.at[_broadcast(index, mask)], values, mask=mask)


def _broadcast(index: tuple[Any, ...], mask: Array) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_to(i, mask.shape) for i in index)


def _normalized(parts: Sequence[Array], weights: Sequence[Array], head_dim: int, norm: HeadNorm) -> list[Array]:
    """Of heads cut into parts; what fills the parts up is zero and adds nothing to the sum."""
    wide = [part.astype(jnp.float32) for part in parts]
    total = sum(jnp.sum(part * part, axis=-1, keepdims=True) for part in wide)
    scale = jax.lax.rsqrt(total / head_dim + norm.eps)
    factors = (weight.astype(jnp.float32) + norm.offset for weight in weights)
    return [(y * scale * factor).astype(parts[0].dtype) for y, factor in zip(wide, factors, strict=True)]


def _rotated(parts: Sequence[Array], cos: Array, sin: Array) -> list[Array]:
    """The first two parts turn."""
    first, second = (part.astype(jnp.float32) for part in parts[:2])
    turned = (first * cos - second * sin, second * cos + first * sin)
    return [*(part.astype(parts[0].dtype) for part in turned), *parts[2:]]


def _stored(x: Array, dtype: jnp.dtype, scale: float) -> Array:
    """As ``paged_attention.stored``."""
    if dtype.itemsize > 1:
        return x.astype(dtype)
    scaled = x.astype(jnp.float32) / scale
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = 127.0 if integer else float(jnp.finfo(dtype).max)
    # Comparisons, which leave NaN as it is.
    scaled = jnp.where(scaled > largest, largest, jnp.where(scaled < -largest, -largest, scaled))
    return _rounded(scaled).astype(dtype) if integer else scaled.astype(dtype)


def _rounded(x: Array) -> Array:
    """To the nearest integer, ties to even. (Adding and taking away 1.5 * 2**23 is what XLA:CPU simplifies away.)"""
    below = jnp.floor(x)
    odd = below.astype(jnp.int32) % 2 != 0
    up = (x - below > 0.5) | ((x - below == 0.5) & odd)
    return below + up.astype(jnp.float32)


def _refuses(setting: Setting) -> str | None:
    if setting.platform != "gpu" or setting.capability is None or setting.capability < (8, 0):
        return "it is for NVIDIA GPUs of capability 8.0 and up"
    if setting.kv_dtype == "float8_e4m3fn" and setting.capability < (8, 9):
        return "GPUs below capability 8.9 do not convert to float8_e4m3fn"
    return _refuses_dtypes(setting)


def _refuses_dtypes(setting: Setting) -> str | None:
    if setting.dtype not in SUPPORTED_DTYPES:
        return f"it computes in {', '.join(SUPPORTED_DTYPES)}, not {setting.dtype}"
    if setting.kv_dtype not in SUPPORTED_KV_DTYPES:
        return f"it writes caches of {', '.join(SUPPORTED_KV_DTYPES)}, not {setting.kv_dtype}"
    return None


def _interpreted_refuses(setting: Setting) -> str | None:
    return _refuses_dtypes(setting) if setting.platform == "cpu" else "it is for tests on a CPU"


IMPLEMENTATION = KvWrite("triton", write, _refuses)
INTERPRETED = KvWrite("triton_interpreted", partial(write, interpret=True), _interpreted_refuses)
"""The same kernel, step by step, on a CPU: far too slow for anything but tests."""
