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

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """PartitionSpec for ``axes``; raises if two of them would land on the same mesh axis."""
        known = {field.name for field in fields(self)}
        for axis in axes:
            if axis is not None and axis not in known:
                raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(sorted(known))}")
        entries = [None if axis is None else getattr(self, axis) for axis in axes]
        used = [name for entry in entries if entry is not None for name in mesh_axes(entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(axes)} would use one mesh axis twice: {tuple(entries)}")
        return PartitionSpec(*entries)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a rule or of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
