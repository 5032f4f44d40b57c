"""From shapes with logical axes to NamedShardings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from jax.sharding import Mesh, NamedSharding

from sharding.rules import ShardingRules, mesh_axes


def shard_shape(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: ShardingRules
) -> tuple[int, ...]:
    """Shape of one device's part; raises ValueError with the numbers when an axis does not divide."""
    if len(shape) != len(axes):
        raise ValueError(f"{name}: shape {tuple(shape)} has {len(shape)} axes, its annotation {tuple(axes)}")
    out = []
    for size, logical, mesh_axis in zip(shape, axes, rules.spec(axes), strict=True):
        parts = prod(mesh.shape[name] for name in mesh_axes(mesh_axis))
        if size % parts:
            divisors = [d for d in range(1, size + 1) if size % d == 0][:8]
            raise ValueError(
                f"{name}: axis {logical!r} has size {size}, which {mesh_axis}={parts} does not divide; "
                f"sizes of {mesh_axis} that fit: {', '.join(map(str, divisors))}"
            )
        out.append(size // parts)
    return tuple(out)


def shardings_for(
    shapes: Mapping[str, Sequence[int]],
    axes: Mapping[str, Sequence[str | None]],
    mesh: Mesh,
    rules: ShardingRules,
) -> dict[str, NamedSharding]:
    """NamedSharding of every named array, each checked to divide evenly."""
    for name, shape in shapes.items():
        shard_shape(name, shape, axes[name], mesh, rules)
    return {name: NamedSharding(mesh, rules.spec(axes[name])) for name in shapes}
