"""KV blocks in host memory: moved out when a request is preempted, and back in when it resumes.

Blocks are moved in chunks of a fixed number, so that two programs are enough: one gathers a chunk from every layer's
cache, one scatters it back. Gathering, copying to the host, copying back and scattering are all started and not waited
for; the devices run them in order, between one step and the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxserve.config import SWAP_CHUNK
from jaxserve.device_state import KV_AXES, DeviceState
from sharding import ShardingRules

Caches = tuple[list[Array], list[Array]]
"""keys and values of every layer."""
HostChunk = list[dict[Any, Array]]
"""Per layer and cache, what each device of the replica held, in host memory."""


class SwappedBlocks:
    """Chunks by (replica, handle)."""

    def __init__(
        self,
        state: DeviceState,
        layer_groups: tuple[int, ...],
        rules: ShardingRules,
        compile: Callable[[str, str, Callable[[], Any]], Any],
    ) -> None:
        """Compiles the two programs with ``compile`` (name, key, lower)."""
        self._chunks: dict[tuple[int, int], list[HostChunk]] = {}
        sharding = state.keys[0].sharding
        assert isinstance(sharding, NamedSharding)
        self.mesh, self._sharding = sharding.mesh, sharding
        self._groups, self._spec = layer_groups, rules.spec(KV_AXES)
        self._num_replicas, self._num_groups = self.mesh.shape["dp"], max(layer_groups) + 1
        self._row = rules.spec(("replica",))
        shape = (self._num_replicas, self._num_groups, SWAP_CHUNK)
        index = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, self._row))
        caches: Caches = (state.keys, state.values)
        chunk = jax.tree.map(self._chunk_of, caches)
        shardings = jax.tree.map(lambda x: x.sharding, caches)
        self._gather = compile("swap_out", "swap_out", lambda: jax.jit(self._gather_blocks).lower(caches, index))
        scatter = jax.jit(self._scatter_blocks, donate_argnums=0, out_shardings=shardings)
        self._scatter = compile("swap_in", "swap_in", lambda: scatter.lower(caches, chunk, index))

    def _chunk_of(self, cache: Array) -> jax.ShapeDtypeStruct:
        shape = (self._num_replicas * self.mesh.shape["cp"] * SWAP_CHUNK, *cache.shape[1:])
        return jax.ShapeDtypeStruct(shape, cache.dtype, sharding=cache.sharding)

    # -- what the engine asks for ------------------------------------------------------------------------------------

    def out(self, state: DeviceState, replica: int, handle: int, blocks: list[list[int]]) -> None:
        """Copy blocks (per group of layers) to host memory, under a handle."""
        chunks = []
        for index in self._indices(replica, blocks):
            gathered = self._gather((state.keys, state.values), index)
            chunks.append([self._to_host(x, replica) for x in jax.tree.leaves(gathered)])
        self._chunks[replica, handle] = chunks

    def back(self, state: DeviceState, replica: int, handle: int, blocks: list[list[int]]) -> DeviceState:
        """Copy what the handle names into other blocks, and forget it."""
        caches: Caches = (state.keys, state.values)
        tree = jax.tree.structure(caches)
        for index, chunk in zip(self._indices(replica, blocks), self._chunks.pop((replica, handle)), strict=True):
            arrays = [self._to_devices(x, like) for x, like in zip(chunk, jax.tree.leaves(caches), strict=True)]
            caches = self._scatter(caches, jax.tree.unflatten(tree, arrays), index)
        return state._replace(keys=caches[0], values=caches[1])

    def forget(self, replica: int, handle: int) -> None:
        del self._chunks[replica, handle]

    def clear(self) -> None:
        self._chunks.clear()

    @property
    def num_bytes(self) -> int:
        """Host memory in use."""
        chunks = [chunk for chunks in self._chunks.values() for chunk in chunks]
        return sum(array.nbytes for chunk in chunks for part in chunk for array in part.values())

    # -- how blocks move ---------------------------------------------------------------------------------------------

    def _indices(self, replica: int, blocks: list[list[int]]) -> list[np.ndarray]:
        """int32 [dp, G, SWAP_CHUNK] per chunk; the null block where there is nothing to move."""
        count = max(-(-len(b) // SWAP_CHUNK) for b in blocks)
        index = np.zeros((count, self._num_replicas, self._num_groups, SWAP_CHUNK), np.int32)
        for group, ids in enumerate(blocks):
            padded = np.zeros(count * SWAP_CHUNK, np.int32)
            padded[: len(ids)] = ids
            index[:, replica, group] = padded.reshape(count, SWAP_CHUNK)
        return list(index)

    def _to_host(self, gathered: Array, replica: int) -> dict[Any, Array]:
        """The replica's shards, by device."""
        per_replica = gathered.shape[0] // self._num_replicas
        shards = [s for s in gathered.addressable_shards if (s.index[0].start or 0) // per_replica == replica]
        return {s.device: jax.device_put(s.data, _memory(s.device, "pinned_host")) for s in shards}

    def _to_devices(self, chunk: dict[Any, Array], cache: Array) -> Array:
        """A chunk as it was gathered; zeros on the devices of other replicas."""
        abstract = self._chunk_of(cache)
        shard = np.zeros(self._sharding.shard_shape(abstract.shape), abstract.dtype)
        devices = self._sharding.addressable_devices_indices_map(abstract.shape)
        parts = [jax.device_put(chunk.get(device, shard), _memory(device, "device")) for device in devices]
        return jax.make_array_from_single_device_arrays(abstract.shape, self._sharding, parts)

    def _gather_blocks(self, caches: Caches, index: Array) -> Caches:
        def one_device(cache: Array, blocks: Array) -> Array:
            return cache.at[blocks[0]].get(mode="clip")

        return self._per_layer(one_device, caches, index=index)

    def _scatter_blocks(self, caches: Caches, chunk: Caches, index: Array) -> Caches:
        def one_device(cache: Array, new: Array, blocks: Array) -> Array:
            return cache.at[blocks[0]].set(new, mode="drop")

        return self._per_layer(one_device, caches, chunk, index=index)

    def _per_layer(self, one_device: Callable[..., Array], *trees: Caches, index: Array) -> Caches:
        specs = (*(self._spec for _ in trees), self._row)
        f = jax.shard_map(one_device, mesh=self.mesh, in_specs=specs, out_specs=self._spec, check_vma=False)
        keys, values = (
            [f(*layer, index[:, self._groups[i]]) for i, layer in enumerate(zip(*caches, strict=True))]
            for caches in zip(*trees, strict=True)
        )
        return keys, values


def _memory(device: Any, kind: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=kind)
