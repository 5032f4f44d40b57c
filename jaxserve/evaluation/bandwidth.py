"""The least time that a token can take: that of reading the weights from memory, whose speed is measured here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import LLM
from jaxserve.config import GIB

NOT_READ = ("embedding.weight", "position_embedding.weight")
"""Tables of which a step reads only the rows of its tokens."""


def floor(llm: LLM) -> dict[str, float]:
    """The least time that a token can take: every weight is read once from memory."""
    weight_bytes = weight_bytes_read(llm)
    bandwidth = read_bandwidth(llm.engine.runner.mesh.devices.flat[0])
    return {
        "weight_bytes_read": weight_bytes,
        "bandwidth": bandwidth,
        "floor_seconds": weight_bytes / bandwidth,
    }


def weight_bytes_read(llm: LLM) -> int:
    """Bytes of weights that share one memory and are read for every token."""
    runner = llm.engine.runner
    on_cpu = runner.mesh.devices.flat[0].platform == "cpu"
    read = {name: weight for name, weight in runner.named_params.items() if name not in NOT_READ}
    shards = [array.addressable_shards for array in jax.tree.leaves(read)]
    return sum(shard.data.nbytes for of_array in shards for shard in (of_array if on_cpu else of_array[:1]))


def read_bandwidth(device: Any, num_bytes: int = GIB) -> float:
    """Bytes per second, the best of several reads of an array that no cache holds."""
    if device.platform != "cpu":
        return _device_bandwidth(device, num_bytes)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return num_bytes / min(_timed(lambda: list(pool.map(np.max, parts))) for _ in range(5))


def _device_bandwidth(device: Any, num_bytes: int) -> float:
    array = jax.device_put(jnp.ones((num_bytes // 4,), jnp.float32), device)
    largest = jax.jit(jnp.max)
    largest(array).block_until_ready()
    return num_bytes / min(_timed(lambda: largest(array).block_until_ready()) for _ in range(5))


def _timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
