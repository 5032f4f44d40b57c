"""Engines of a script: on how many devices, how they were loaded, what each device holds, what a step communicates."""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import LLM
from jaxserve.build import ModelFiles, resolve_mesh
from jaxserve.dry_run import DryRun, Program
from jaxserve.engine_args import EngineArgs
from sharding.mesh import MeshConfig
from sharding.platform import use_cpu_without_gpus

FILES = ("trace", "record")
"""Options that name files which an engine writes."""
PARALLEL = ("tensor", "data", "pipeline", "decode_context")
"""What the sizes of a mesh are called among the arguments of ``LLM``: NAME_parallel_size."""


@dataclass(frozen=True)
class Loaded:
    """An engine, and what it took to get there."""

    llm: LLM
    seconds: float
    """From nothing to ready: weights and compilation."""
    compile_seconds: float
    """Of it, as the programs' own times add up (several are compiled at once)."""


def open_llm(options: dict[str, Any]) -> Loaded:
    start = time.perf_counter()
    llm = LLM(**options)
    seconds = time.perf_counter() - start
    return Loaded(llm, seconds, sum(record.seconds for record in llm.compiled_programs()))


def mesh_of(options: dict[str, Any]) -> MeshConfig:
    return resolve_mesh(EngineArgs.of(**options))


def own_files(options: dict[str, Any], name: str) -> dict[str, Any]:
    """For one of several engines: the files that it writes get its name, like trace-tp=2.json."""
    paths = {key: Path(options[key]) for key in FILES if options.get(key) is not None}
    slug = re.sub(r"[^\w=.,-]+", "_", name).strip("_")
    return options | {key: str(path.with_stem(f"{path.stem}-{slug}")) for key, path in paths.items()}


def on_mesh(options: dict[str, Any], mesh: MeshConfig) -> dict[str, Any]:
    """The same options on another mesh, one of several."""
    options = own_files(options, mesh.short)
    return options | {"mesh": mesh} | {f"{axis}_parallel_size": 1 for axis in PARALLEL}


def reserve_devices(count: int) -> None:
    """On a CPU, simulate so many devices: their number is fixed when jax starts, so the largest mesh comes first.
    ValueError where there are fewer."""
    there = start_devices(count)
    if there < count:
        raise ValueError(f"the mesh needs {count} devices, this process has {there}")


def start_devices(count: int) -> int:
    """How many devices there are; on a CPU as many as wanted, unless jax has started."""
    use_cpu_without_gpus()
    with suppress(RuntimeError):  # jax has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    return len(jax.devices())


def weight_bytes(llm: LLM) -> dict[int, int]:
    """What lies on each device, by its id: counted from the arrays' shards, not from their shapes."""
    return _bytes_by_device(llm, llm.engine.runner.params)


def kv_bytes(llm: LLM) -> dict[int, int]:
    """KV blocks, the same way."""
    state = llm.engine.runner.state
    assert state is not None
    return _bytes_by_device(llm, [*state.keys, *state.values])


def _bytes_by_device(llm: LLM, arrays: list[jax.Array]) -> dict[int, int]:
    held = Counter({device.id: 0 for device in llm.engine.runner.mesh.devices.flat})
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return dict(held)


def audit_steps(llm: LLM) -> list[Program]:
    """The engine's own programs, its largest decode step and its largest other one, held against the cost model."""
    runner, limits = llm.engine.runner, llm.engine.scheduler.config
    files = ModelFiles.find(llm.args)
    run = DryRun(llm.args, files, runner, limits, resolve_mesh(llm.args), None, runner.num_blocks)
    return [run.program(layout) for layout in run.layouts()]


def random_prompts(vocab_size: int, lengths: list[int], seed: int) -> list[list[int]]:
    """Uniform token ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]
