"""Which device holds what: meshes, logical-axis rules, and the shardings that follow; and which mesh to choose.

Names are loaded on first use, so that plans can be made without jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.mesh import MESH_AXES, MeshConfig, build_mesh
    from sharding.partition import shard_shape, shardings_for
    from sharding.rules import ShardingRules

__all__ = ["MESH_AXES", "MeshConfig", "ShardingRules", "build_mesh", "shard_shape", "shardings_for"]

_HOME = {
    "ShardingRules": "sharding.rules",
    "shard_shape": "sharding.partition",
    "shardings_for": "sharding.partition",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sharding' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "sharding.mesh")), name)
