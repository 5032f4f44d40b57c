"""Mosaic GPU kernels on a CPU: the one place that knows jax's interpreter of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


def racing(**options: Any) -> Any:
    """The ``interpret`` argument under which a kernel runs with its warpgroups as threads. Memory is NaN until it is
    written, and an access that no barrier orders is an error."""
    return plgpu.InterpretGPUParams(detect_races=True, **options)


def copy_whole_tiles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse copies between global and tiled shared memory that begin within a tile, on either side: the box of rows
    that TMA copies ends where the first tile does, and behind it are zeros. The interpreter has no tiles."""
    gpu_callbacks.reset_gpu_interpret_mode_state()  # a kernel that failed before would fail the next one too
    for name in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
        monkeypatch.setattr(gpu_callbacks, name, _checked(getattr(gpu_callbacks, name)))


def _checked(copy: Callable[..., Any]) -> Callable[..., Any]:
    def checked(**operands: Any) -> Any:
        _check_starts(**operands)
        return copy(**operands)

    return checked


@gpu_callbacks.fail_on_exception  # else the other threads wait for ever
def _check_starts(*, token: Any, thread: Any, src_transforms: Any, dst_transforms: Any, **_: Any) -> None:
    transforms = (*src_transforms, *dst_transforms)
    for tile in (t.tiling for t in transforms if hasattr(t, "tiling")):
        for indices in (t.indices[-len(tile) :] for t in transforms if hasattr(t, "indices")):
            starts = [int(getattr(index, "start", index)) for index in indices]
            if any(start % size for start, size in zip(starts, tile, strict=True)):
                raise ValueError(f"a copy begins at {starts}, within a tile of {tile}")
