"""The device mesh: named axes, their sizes, and the devices laid over them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sharding.rules import ShardingRules

MESH_AXES = ("dp", "pp", "cp", "tp")
"""Outermost first: tp varies fastest, so its collectives stay between neighbouring devices."""


LINKS = ("nvlink", "pcie", "infiniband")
"""What an axis may communicate over."""
FIXED_RULES = ("replica", "stage", "kv_blocks")
"""Logical axes that lie where they do by what dp, pp and cp mean."""
TABLES = {
    "axes": "sizes of the axes",
    "devices": "order = [...]: the devices in the order of the mesh, by their place in jax.devices()",
    "links": "what each axis communicates over",
    "rules": "mesh axis or axes of a logical axis, where it is not that of ShardingRules",
    "xla_flags": 'flags by version of jax, such as "0.11" = [...]',
}
"""Of a mesh file; all but ``axes`` may be left out."""

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, and what a mesh file may say besides.

    dp: replicas, each with its own KV blocks; pp: pipeline stages; cp: ranks that share one context;
    tp: ranks that share heads, feed-forward columns and vocabulary.
    """

    dp: int = 1
    pp: int = 1
    cp: int = 1
    tp: int = 1
    device_order: tuple[int, ...] = ()
    """Devices in the order of the mesh, by their place in ``jax.devices()``; () = as they come."""
    links: Pairs = ()
    """(axis, one of ``LINKS``): for plans, and for those who read the config. Nothing else depends on it."""
    rules: Pairs = ()
    """(logical axis, mesh axes) that replace entries of ``ShardingRules``."""
    xla_flags: Pairs = ()
    """(version of jax, flags of XLA's compiler): those under the longest version that jax's own begins with count, for
    the step and beside our own (``sharding.xla_flags``)."""

    def __post_init__(self) -> None:
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"mesh axis {axis}={size!r}: a size is a whole number of at least 1")
        if self.device_order and sorted(self.device_order) != list(range(self.num_devices)):
            raise ValueError(
                f"mesh devices.order={list(self.device_order)}: it names each of 0 to {self.num_devices - 1} once"
            )
        for axis, link in self.links:
            if axis not in MESH_AXES or link not in LINKS:
                raise ValueError(
                    f"mesh links.{axis}={link!r}: axes are {', '.join(MESH_AXES)}, links {', '.join(LINKS)}"
                )
        for logical, axes in self.rules:
            unknown = [a for a in axes if a not in MESH_AXES]
            if unknown:
                raise ValueError(f"mesh rules.{logical}: {unknown[0]!r} is no mesh axis ({', '.join(MESH_AXES)})")

    def flags_for(self, version: str) -> tuple[str, ...]:
        """XLA flags for this version of jax."""
        return flags_for(self.xla_flags, version)

    @property
    def sharding_rules(self) -> ShardingRules:
        """The rules, with this mesh's own entries; ValueError for a logical axis that does not exist."""
        from sharding.rules import ShardingRules

        known = [f.name for f in fields(ShardingRules) if f.name not in FIXED_RULES]
        for logical, _ in self.rules:
            if logical not in known:
                why = "it is fixed" if logical in FIXED_RULES else "no such logical axis"
                raise ValueError(f"mesh rules.{logical}: {why}; there are {', '.join(known)}")
        return ShardingRules(**{logical: axes[0] if len(axes) == 1 else axes or None for logical, axes in self.rules})

    @property
    def num_devices(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in MESH_AXES)

    @property
    def sizes(self) -> dict[str, int]:
        """By axis."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def short(self) -> str:
        """Without the axes of size 1, like "pp=2,tp=4"."""
        return ",".join(f"{a}={getattr(self, a)}" for a in MESH_AXES if getattr(self, a) > 1) or "one device"

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Read ``"dp=2,tp=4"``; an axis that is not named has size 1."""
        sizes: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            axis, _, size = part.partition("=")
            if axis not in MESH_AXES or not size.isdigit() or axis in sizes:
                raise ValueError(f"mesh {text!r}: {part!r} is not one AXIS=SIZE with AXIS in {', '.join(MESH_AXES)}")
            sizes[axis] = int(size)
        return cls(**sizes)

    @classmethod
    def from_file(cls, path: str | Path) -> MeshConfig:
        """Read a TOML file with a table ``[axes]`` and perhaps others of ``TABLES``."""
        with open(path, "rb") as f:
            try:
                file = tomllib.load(f)
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"mesh file {path}: {error}") from None
        axes = file.get("axes")
        unknown = sorted(set(file) - set(TABLES)) or sorted(
            set(axes if isinstance(axes, dict) else {}) - set(MESH_AXES)
        )
        tables = ", ".join(f"[{name}] ({what})" for name, what in TABLES.items())
        if unknown or not isinstance(axes, dict):
            raise ValueError(
                f"mesh file {path}: {f'unknown key {unknown[0]!r}' if unknown else 'no [axes] table'}; "
                f"axes are {', '.join(MESH_AXES)}, and its tables {tables}"
            )
        try:
            config = cls(
                **axes,
                device_order=tuple(_list_of(int, "devices.order", _only(file, "devices", "order"))),
                links=tuple((k, _text(f"links.{k}", v)) for k, v in _table(file, "links").items()),
                rules=tuple((k, _axes(f"rules.{k}", v)) for k, v in _table(file, "rules").items()),
                xla_flags=tuple(
                    (k, tuple(_list_of(str, f"xla_flags.{k}", v))) for k, v in _table(file, "xla_flags").items()
                ),
            )
            if config.rules:  # else jax need not be loaded
                _ = config.sharding_rules
        except ValueError as error:
            raise ValueError(f"mesh file {path}: {error}") from None
        return config

    @classmethod
    def resolve(cls, mesh: MeshConfig | str | Path | None, **sizes: Any) -> MeshConfig:
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


def flags_for(by_version: Pairs, version: str) -> tuple[str, ...]:
    """Those under the longest version that ``version`` begins with."""
    fitting = [(key, flags) for key, flags in by_version if f"{version}.".startswith(f"{key}.")]
    return max(fitting, key=lambda pair: len(pair[0]), default=("", ()))[1]


def _table(file: dict[str, Any], name: str) -> dict[str, Any]:
    found = file.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name}={found!r}: it is a table, [{name}]")
    return found


def _only(file: dict[str, Any], name: str, key: str) -> Any:
    table = _table(file, name)
    if unknown := sorted(set(table) - {key}):
        raise ValueError(f"[{name}] has an unknown key {unknown[0]!r}; there is {key}")
    return table.get(key, [])


def _list_of(kind: type, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        what = {int: "whole numbers", str: "texts"}[kind]
        raise ValueError(f"{name}={value!r}: it is a list of {what}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: it is a text")
    return value


def _axes(name: str, value: Any) -> tuple[str, ...]:
    """Mesh axes of a rule: a name, several, or "" for none."""
    axes = ([value] if value else []) if isinstance(value, str) else _list_of(str, name, value)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name}={value!r}: it names an axis twice")
    return tuple(axes)


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
    order = config.device_order or range(config.num_devices)
    grid = np.asarray([available[i] for i in order], dtype=object).reshape(config.shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
