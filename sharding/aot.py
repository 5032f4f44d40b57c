"""Compile for GPUs that are not there: devices that programs can be compiled for, and not run on."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sharding.hardware import Cluster, Gpu
from sharding.platform import use_cpu

CUDA = "13"
ACCELERATED = (9, 10)
"""Major compute capabilities with instructions that only this very architecture has ("sm_90a")."""

COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
"""Without a GPU nothing can be timed, and XLA takes a quarter longer to find that out."""

TARGET = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {chip.num_sms}
  fpus_per_core: {chip.fp32_units}
  clock_rate_ghz: {chip.clock_ghz}
  l2_cache_size: {chip.l2_bytes}
  device_memory_size: {gpu.memory_bytes}
  memory_bandwidth: {bandwidth}
  shared_memory_per_core: {chip.shared_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {chip.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.22.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 22 patch: 0 }}
device_description_str: "{name}"
"""
"""XLA's GpuTargetConfigProto. The limits that are written out are the same for all of these GPUs."""


SAME_CHIP = {"NVIDIA L40S": "NVIDIA L40"}
"""That jax's Pallas knows by the other product's name."""


def target_config(gpu: Gpu) -> str:
    """The GPU as XLA's compiler wants it described."""
    major, minor = gpu.chip.capability
    return TARGET.format(
        gpu=gpu,
        name=SAME_CHIP.get(gpu.chip.name, gpu.chip.name),
        chip=gpu.chip,
        major=major,
        minor=minor,
        extension="ACCELERATED_FEATURES" if major in ACCELERATED else "NONE",
        bandwidth=int(gpu.memory_bandwidth),
        optin=gpu.chip.shared_bytes - 1024,
    )


def devices(target: Cluster) -> Sequence[Any]:
    """The target's GPUs, for ``build_mesh``. A mesh of them gives shapes shardings, and ``jit(...).lower(...)`` a
    program; nothing is allocated. Where jax has not started yet, it is kept to the CPU.

    NotImplementedError says what is to be installed, where something is missing.
    """
    if reason := missing():
        raise NotImplementedError(reason)
    from jax.experimental import topologies

    use_cpu()
    topology = f"1x{target.hosts}x{target.gpus_per_host}"
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(target.gpu), topology=topology
        )
    except NotImplementedError:
        raise NotImplementedError(
            "jax started without its CUDA plug-in: set JAX_PLATFORMS=cpu before it starts"
        ) from None
    return found.devices


@contextmanager
def not_cached() -> Iterator[None]:
    """While programs are compiled for such devices: jax's compilation cache would keep them, and fail to read them."""
    import jax

    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def missing() -> str | None:
    """What has to be installed before programs can be compiled for GPUs; None if nothing has to."""
    import jax

    plugin = f"jax-cuda{CUDA}-plugin"
    wanted = f"{plugin}=={jax.__version__} jax-cuda{CUDA}-pjrt=={jax.__version__}"
    try:
        found = version(plugin)
    except PackageNotFoundError:
        found = None
    if found != jax.__version__:
        there = "is not installed" if found is None else f"is {found}"
        return f"compiling for GPUs needs jax's CUDA plug-in in jax's version; {plugin} {there}: pip install {wanted}"
    if not _ptxas():
        return "compiling for GPUs needs ptxas: install the CUDA toolkit, or pip install nvidia-cuda-nvcc nvidia-nvvm"
    return None


def _ptxas() -> bool:
    """Whether XLA will find it: on the path, in the toolkit's usual place, or in NVIDIA's wheel."""
    wheel = find_spec("nvidia")
    wheels = [Path(root) / f"cu{CUDA}" for root in (wheel and wheel.submodule_search_locations) or ()]
    roots = [Path("/usr/local/cuda"), *wheels]
    return shutil.which("ptxas") is not None or any((root / "bin" / "ptxas").exists() for root in roots)
