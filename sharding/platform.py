"""Which platform jax looks for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu")
"""One of these is there where a process can use an NVIDIA GPU: Linux, WSL, Tegra."""


def use_cpu() -> None:
    """Keep jax to the CPU, unless it was told something else."""
    import jax

    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")


def use_cpu_without_gpus() -> None:
    """Keep jax to the CPU where its CUDA plug-in is installed and no GPU is there. To be called before jax starts: it
    would look for GPUs all the same, and print why that failed. No other accelerator is hidden by this."""
    if _plugins() == {"cuda"} and not any(Path(node).exists() for node in DEVICE_NODES):
        use_cpu()


def _plugins() -> set[str]:
    """Kinds of accelerators that jax has plug-ins for here."""
    package = find_spec("jax_plugins")
    roots = map(Path, (package and package.submodule_search_locations) or ())
    names = {path.name for root in roots for path in root.iterdir() if not path.name.startswith("__")}
    kinds = {"cuda" if name.startswith("xla_cuda") else name for name in names}
    return kinds | ({"tpu"} if find_spec("libtpu") else set())
