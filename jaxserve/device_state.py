"""What lives on the devices between steps: KV blocks, and per slot the last token and sampler rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jaxserve.models.config import DecoderConfig
from jaxserve.sampler import SamplerState
from pallas_kernels.paged_attention import PagedAttention
from sharding import ShardingRules

KV_AXES = (("stage", "replica", "kv_blocks"), "kv_heads", None, None)
"""Of a cache: each device's blocks are a part of axis 0, so that a device has what kernels take as it is."""
SLOT_AXES = ("replica", None, "vocab")


class DeviceState(NamedTuple):
    """keys and values: per layer (of a stage) [pp * dp * cp * num_blocks, K, ...], laid out as the attention
    implementation wants them: every stage, replica and rank of a context has ``num_blocks`` of its own; last_tokens
    int32 [dp, slots]: what was sampled last in each slot.

    With pipeline stages: activations [pp, dp, T, D]: what each stage was passed by the one before.
    """

    keys: list[Array]
    values: list[Array]
    last_tokens: Array
    sampler: SamplerState
    activations: Array | None = None


class StateSizes(NamedTuple):
    """num_blocks: of each layer; activations: T and dtype, None without stages."""

    num_blocks: Sequence[int]
    block_size: int
    num_slots: int
    activations: tuple[int, jnp.dtype] | None = None


def abstract_state(
    config: DecoderConfig,
    attention: PagedAttention,
    kv_dtype: jnp.dtype,
    sizes: StateSizes,
    mesh: Mesh,
    rules: ShardingRules,
) -> DeviceState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    dp, stages = mesh.shape["dp"], (config.num_stages,) if config.num_stages > 1 else ()
    vocab = config.vocab_size + config.vocab_padding

    def array(shape: tuple[int, ...], axes: tuple[str | tuple[str, ...] | None, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rules.spec(axes)))

    def caches(which: int) -> list[Any]:
        heads = config.num_kv_heads, config.head_dim
        parts = prod(stages) * dp * mesh.shape["cp"]
        shapes = [attention.cache_shapes(parts * n, sizes.block_size, *heads)[which] for n in sizes.num_blocks]
        return [array(shape, KV_AXES, kv_dtype) for shape in shapes]

    rows = (dp, sizes.num_slots, vocab)
    sampler = SamplerState(array(rows, SLOT_AXES, jnp.float32), array(rows, SLOT_AXES, jnp.int32))
    activations = None
    if sizes.activations is not None:
        tokens, dtype = sizes.activations
        shape = (*stages, dp, tokens, config.hidden_size)
        activations = array(shape, ("stage", "replica", None, None), dtype)
    last_tokens = array((dp, sizes.num_slots), ("replica", None), jnp.int32)
    return DeviceState(caches(0), caches(1), last_tokens, sampler, activations)


def allocate(abstract: DeviceState) -> DeviceState:
    """Zeros (not uninitialised memory: masked values are multiplied by zero, and NaN times zero is NaN)."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)
    return make()


def kv_bytes_per_block(config: DecoderConfig, num_layers: int, block_size: int, itemsize: int, tp: int) -> int:
    """Bytes of one KV block of ``num_layers`` layers on one device."""
    return 2 * num_layers * block_size * config.num_kv_heads * config.head_dim * itemsize // tp


def bytes_per_device(arrays: Any) -> int:
    """Bytes that one device holds of a tree of sharded arrays, or of their shapes."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
