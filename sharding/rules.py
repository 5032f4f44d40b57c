"""The one table from logical axis to mesh axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from jax.sharding import PartitionSpec


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axis of each logical axis; ``None`` keeps the axis whole on every device.

    A parameter or an activation names its axes once (``("embed", "kv_heads", None, None)``), and its
    PartitionSpec follows from here.
    """

    replica: str | None = "dp"
    stage: str | None = "pp"
    vocab: str | tuple[str, ...] | None = ("pp", "tp")
    embed: str | None = None
    kv_blocks: str | None = "cp"
    kv_heads: str | None = "tp"
    q_group: str | None = None
    """The query heads of one KV head."""
    qkv_group: str | None = None
    """The query heads of one KV head, then its K and its V."""
    mlp: str | None = "tp"

    def spec(self, axes: Sequence[str | tuple[str, ...] | None]) -> PartitionSpec:
        """PartitionSpec for ``axes``, of which a tuple are several in one, the first outermost; raises if two of them
        would land on the same mesh axis."""
        entries = [self._entry(axis) if isinstance(axis, tuple) else self._mesh_axis(axis) for axis in axes]
        used = [name for entry in entries if entry is not None for name in mesh_axes(entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(axes)} would use one mesh axis twice: {tuple(entries)}")
        return PartitionSpec(*entries)

    def _entry(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for axis in axes for name in mesh_axes(self._mesh_axis(axis)))

    def _mesh_axis(self, axis: str | None) -> str | tuple[str, ...] | None:
        known = {field.name for field in fields(self)}
        if axis is not None and axis not in known:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(sorted(known))}")
        return None if axis is None else getattr(self, axis)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a rule or of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
