"""Profiles of the devices, by ``jax.profiler``."""

from __future__ import annotations

from pathlib import Path

import jax


def start_profile(directory: str | Path) -> None:
    """Of this process's devices, until ``stop_profile``. RuntimeError if a profile is being recorded."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would be most of it, and slow the host down
    jax.profiler.start_trace(directory, profiler_options=options)


def stop_profile() -> None:
    """Write it. RuntimeError if none is being recorded."""
    jax.profiler.stop_trace()
