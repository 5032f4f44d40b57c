"""Flags of XLA's compiler that the step is compiled with: ours for GPUs, and those of a mesh file.

They are given to the compiler with each program, so that it does not matter when jax started or what else it compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sharding.mesh import MeshConfig, Pairs, flags_for

ONE_GRAPH = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,COLLECTIVES,"
    "CONDITIONAL,WHILE"
)
"""The step is one CUDA graph. Left to itself XLA begins a new one at each collective, loop and condition."""
GPU_FLAGS: Pairs = (("0.11", (ONE_GRAPH,)), ("0.12", (ONE_GRAPH,)))
"""By version of jax, as in a mesh file: a flag that a compiler does not know is an error."""


def compiler_options(mesh: MeshConfig, platform: str, version: str) -> dict[str, Any]:
    """Of programs for ``mesh`` on ``platform`` (cpu or gpu) with this version of jax."""
    own = flags_for(GPU_FLAGS, version) if platform == "gpu" else ()
    return _as_options(own) | _as_options(mesh.flags_for(version))


def _as_options(flags: Sequence[str]) -> dict[str, Any]:
    """--xla_gpu_x=true as an option of ``jit(...).lower(...).compile``."""
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    return {name: {"true": True, "false": False, "": True}.get(value.lower(), value) for name, _, value in pairs}
