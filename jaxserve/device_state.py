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

KV_AXES = ("replica", None, "kv_heads", None, None)
SLOT_AXES = ("replica", None, "vocab")


class DeviceState(NamedTuple):
    """keys and values: per layer [dp, num_blocks, K, ...], laid out as the attention implementation wants them;
    last_tokens int32 [dp, slots]: what was sampled last in each slot."""

    keys: list[Array]
    values: list[Array]
    last_tokens: Array
    sampler: SamplerState


def abstract_state(
    config: DecoderConfig,
    attention: PagedAttention,
    kv_dtype: jnp.dtype,
    num_blocks: Sequence[int],
    block_size: int,
    num_slots: int,
    mesh: Mesh,
    rules: ShardingRules,
) -> DeviceState:
    """Shapes, dtypes and shardings of the state, without allocating it. ``num_blocks``: of each layer."""
    dp = mesh.shape["dp"]
    shapes = [attention.cache_shapes(n, block_size, config.num_kv_heads, config.head_dim) for n in num_blocks]
    kv = NamedSharding(mesh, rules.spec(KV_AXES))
    slot = NamedSharding(mesh, rules.spec(SLOT_AXES))
    rows = (dp, num_slots, config.vocab_size + config.vocab_padding)

    def array(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    keys, values = ([array((dp, *shape[i]), kv_dtype, kv) for shape in shapes] for i in range(2))
    last_tokens = array((dp, num_slots), jnp.int32, NamedSharding(mesh, rules.spec(("replica", None))))
    sampler = SamplerState(array(rows, jnp.float32, slot), array(rows, jnp.int32, slot))
    return DeviceState(keys, values, last_tokens, sampler)


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
