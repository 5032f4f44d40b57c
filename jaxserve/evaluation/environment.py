"""On what a result was measured: versions, devices, the machine, the state of the source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jaxserve", "jax", "jaxlib", "flax", "numpy", "transformers")


def environment() -> dict[str, Any]:
    """What the process runs on. jax has started, or starts now."""
    import jax
    import psutil

    from sharding.platform import use_cpu_without_gpus

    use_cpu_without_gpus()
    devices = jax.devices()
    return {
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "git": git_revision(Path(__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(directory: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; None outside of a repository, or without git."""
    revision = _git(directory, "rev-parse", "HEAD")
    return None if revision is None else {"revision": revision, "changed": bool(_git(directory, "status", "--short"))}


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]  # looks, and writes nothing
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
