"""Which device holds what: meshes, logical-axis rules, and the shardings that follow from them."""

from sharding.mesh import MESH_AXES, MeshConfig, build_mesh
from sharding.partition import shard_shape, shardings_for
from sharding.rules import ShardingRules

__all__ = ["MESH_AXES", "MeshConfig", "ShardingRules", "build_mesh", "shard_shape", "shardings_for"]
