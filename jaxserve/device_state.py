"""What lives on the devices between steps: KV blocks and per-slot sampler rows."""

from __future__ import annotations

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

KV_AXES = ("replica", None, "kv_heads", None, None)
SLOT_AXES = ("replica", None, "vocab")


class DeviceState(NamedTuple):
    """keys and values: per layer [dp, num_blocks, K, ...], laid out as the attention implementation wants them."""

    keys: list[Array]
    values: list[Array]
    sampler: SamplerState


def abstract_state(
    config: DecoderConfig,
    attention: PagedAttention,
    kv_dtype: jnp.dtype,
    num_blocks: int,
    block_size: int,
    num_slots: int,
    mesh: Mesh,
    rules: ShardingRules,
) -> DeviceState:
    """Shapes, dtypes and shardings of the state, without allocating it."""
    dp = mesh.shape["dp"]
    shapes = attention.cache_shapes(num_blocks, block_size, config.num_kv_heads, config.head_dim)
    kv = NamedSharding(mesh, rules.spec(KV_AXES))
    slot = NamedSharding(mesh, rules.spec(SLOT_AXES))
    rows = (dp, num_slots, config.vocab_size + config.vocab_padding)

    def array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    keys, values = ([array((dp, *shape), kv_dtype, kv) for _ in config.layers] for shape in shapes)
    return DeviceState(keys, values, SamplerState(array(rows, jnp.float32, slot), array(rows, jnp.int32, slot)))


def allocate(abstract: DeviceState) -> DeviceState:
    """Zeros (not uninitialised memory: masked values are multiplied by zero, and NaN times zero is NaN)."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), out_shardings=shardings)
    return make()


def kv_bytes_per_block(config: DecoderConfig, block_size: int, itemsize: int, tp: int) -> int:
    """Bytes of one KV block, all layers, on one device."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * itemsize // tp


def bytes_per_device(arrays: Any) -> int:
    """Bytes that one device holds of a tree of sharded arrays, or of their shapes."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
