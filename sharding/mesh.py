"""The device mesh: named axes, their sizes, and the devices laid over them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

MESH_AXES = ("dp", "pp", "cp", "tp")
"""Outermost first: tp varies fastest, so its collectives stay between neighbouring devices."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes.

    dp: replicas, each with its own KV blocks; pp: pipeline stages; cp: ranks that share one context;
    tp: ranks that share heads, feed-forward columns and vocabulary.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"mesh axis {field.name}={size!r}: a size is a whole number of at least 1")

    @property
    def num_devices(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in MESH_AXES)

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Read ``"dp=2,tp=4"``; an axis that is not named has size 1."""
        sizes: dict[str, int] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, _, size = part.partition("=")
            if axis not in MESH_AXES or not size.isdigit() or axis in sizes:
                raise ValueError(f"mesh {text!r}: {part!r} is not one AXIS=SIZE with AXIS in {', '.join(MESH_AXES)}")
            sizes[axis] = int(size)
        return cls(**sizes)

    @classmethod
    def from_file(cls, path: str | Path) -> MeshConfig:
        """Read a TOML file whose ``[axes]`` table gives the sizes."""
        with open(path, "rb") as f:
            try:
                table = tomllib.load(f)
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"mesh file {path}: {error}") from None
        axes = table.get("axes")
        known = axes if isinstance(axes, dict) else {}
        unknown = sorted(set(table) - {"axes"}) or sorted(set(known) - set(MESH_AXES))
        if unknown or not isinstance(axes, dict):
            raise ValueError(
                f"mesh file {path}: {f'unknown key {unknown[0]!r}' if unknown else 'no [axes] table'}; "
                f"it holds one table [axes] with sizes for {', '.join(MESH_AXES)}"
            )
        return cls(**axes)

    @classmethod
    def resolve(cls, mesh: MeshConfig | str | Path | None, **sizes: int) -> MeshConfig:
        """One config from ``mesh`` and the ``*_size`` arguments; where both speak they must agree."""
        if mesh is None:
            return cls(**sizes)
        if isinstance(mesh, (str, Path)):
            is_file = isinstance(mesh, Path) or mesh.endswith(".toml")
            mesh = cls.from_file(mesh) if is_file else cls.parse(str(mesh))
        for axis, size in sizes.items():
            if size != 1 and size != getattr(mesh, axis):
                raise ValueError(f"mesh says {axis}={getattr(mesh, axis)}, the {axis} size argument says {size}")
        return mesh


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay ``devices`` (default: all of the process's, in order) over the axes.

    All axes are ``Auto``: programs carry PartitionSpecs and XLA inserts the collectives.
    """
    import jax  # late: sizes of meshes are planned without it
    import numpy as np
    from jax.sharding import AxisType, Mesh

    available = list(jax.devices() if devices is None else devices)
    if config.num_devices > len(available):
        raise ValueError(
            f"mesh {config} needs {config.num_devices} devices and this process sees {len(available)} "
            f"({available[0].platform}); make the mesh smaller"
            + (
                f", or start the process with JAX_NUM_CPU_DEVICES={config.num_devices} to simulate more on the CPU"
                if available[0].platform == "cpu"
                else ""
            )
        )
    grid = np.asarray(available[: config.num_devices], dtype=object).reshape(config.shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
