"""Mosaic GPU kernels on a CPU: the one place that knows jax's interpreter of them."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def racing(**options: Any) -> Any:
    """The ``interpret`` argument under which a kernel runs with its warpgroups as threads. Memory is NaN until it is
    written, and an access that no barrier orders is an error."""
    return plgpu.InterpretGPUParams(detect_races=True, **options)
