"""What the cost model says of an engine's programs: beside its measured steps in a trace."""

from __future__ import annotations

import re

from jaxserve.batch import BatchLayout
from jaxserve.trace import StepCost
from sharding.cost_model import (
    Group,
    Step,
    communication_time,
    layer_collectives,
    payload_bytes,
    roofline,
    tick_collectives,
    vocabulary_work,
)
from sharding.hardware import GPUS, Cluster, Gpu, find_gpu
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape

STAND_IN = "h100"
"""Predicted for where devices are simulated."""


def gpu_of(device_kind: str, platform: str) -> Gpu | None:
    """Of jax's name for a device; None for a GPU that the cost model does not know."""
    if platform == "cpu":
        return find_gpu(STAND_IN)
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device_kind, re.I)), None)


def step_of(layout: BatchLayout) -> Step:
    """The fullest step of a layout, for the cost model."""
    rows, seqs = layout.num_tokens, layout.num_seqs
    chunk = (Group(1, rows - seqs + 1),) if rows > seqs else ()
    return Step((*chunk, Group(seqs - len(chunk), 1)))


def step_cost(shape: ModelShape, mesh: MeshConfig, gpu: Gpu, layout: BatchLayout) -> StepCost:
    """Of a program; of a pipeline, one tick. ``shape`` is fitted to the mesh."""
    per_host = min(mesh.num_devices, gpu.most_per_host)
    cluster, step = Cluster(gpu, per_host, -(-mesh.num_devices // per_host)), step_of(layout)
    layers = communication_time(layer_collectives(shape, step, mesh), mesh, cluster) * shape.layers_per_stage(mesh)
    around = communication_time(tick_collectives(shape, step, mesh), mesh, cluster)
    sampling = roofline(vocabulary_work(shape, step, mesh), gpu, shape.dtype)
    times = layout.num_steps
    return StepCost(
        {",".join(axes): size * times for axes, size in payload_bytes(shape, step, mesh).items()},
        (layers + around).seconds * times,
        sampling.seconds * times,
    )
