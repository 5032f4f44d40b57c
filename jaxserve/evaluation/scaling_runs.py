"""Measuring how a model scales: the same requests, and more requests, on more devices along one axis of the mesh.

Strong scaling keeps the requests and adds devices; weak scaling adds requests with the devices. One engine per mesh
serves both, and is dropped before the next one is made.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jaxserve import LLM
from jaxserve.build import ModelFiles, fit
from jaxserve.cli.output import progress
from jaxserve.engine_args import EngineArgs
from jaxserve.evaluation.clients import Call
from jaxserve.evaluation.engines import Loaded, on_mesh, open_llm
from jaxserve.evaluation.flags import Load
from jaxserve.evaluation.mesh_runs import MeshRun, random_calls, sizes_up_to, ties
from jaxserve.evaluation.predictions import Prediction, predict
from jaxserve.evaluation.profile import collective_share, read_operations, typical_seconds
from jaxserve.evaluation.same_tokens import offline_batch
from sharding.mesh import MeshConfig
from sharding.planner import Workload

PROFILED = 3
"""Batches in a profile."""
LEAST_ROWS = 256
"""Of a step with prompts: eight of the usual prompts."""


@dataclass(frozen=True)
class Place:
    """A mesh to measure."""

    axis: str
    factor: int
    """Times the devices of the first mesh."""
    mesh: MeshConfig

    @property
    def name(self) -> str:
        return self.mesh.short


@dataclass(frozen=True)
class Impossible:
    """A mesh that the model cannot have."""

    place: Place
    reason: str


@dataclass(frozen=True)
class ScaleRun:
    """What was measured on a mesh, and what is predicted of it."""

    place: Place
    load: Load
    run: MeshRun
    strong: list[float]
    """Seconds of each repeat."""
    weak: list[float]
    computing: dict[int, float]
    """Seconds by device, in the order of the mesh, outside of collectives; {} where it was not profiled."""
    measured_share: float | None
    """Of collectives in the time in which devices did something; None where it was not profiled."""
    predicted_strong: Prediction
    predicted_weak: Prediction

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def factor(self) -> int:
        return self.place.factor

    def rates(self, weak: bool) -> list[float]:
        """Output tokens per second of each repeat."""
        tokens = self.load.count(self.factor, weak) * self.load.output_len
        return [tokens / seconds for seconds in (self.weak if weak else self.strong)]

    def predicted(self, weak: bool) -> Prediction:
        return self.predicted_weak if weak else self.predicted_strong

    @cached_property
    def stages(self) -> dict[int, float]:
        """Mean seconds of the devices of each pipeline stage; {} where there is one, or nothing was profiled."""
        mesh = self.place.mesh
        if mesh.pp == 1 or not self.computing:
            return {}
        inner, seconds = mesh.cp * mesh.tp, list(self.computing.values())
        stage_of = [i // inner % mesh.pp for i in range(mesh.num_devices)]
        per_stage = {stage: [s for s, of in zip(seconds, stage_of, strict=True) if of == stage] for stage in stage_of}
        return {stage: sum(values) / len(values) for stage, values in per_stage.items()}

    @property
    def communication_share(self) -> float | None:
        """Of the audited collectives of the largest decode step, by the link model; None without a prediction."""
        forecast = self.predicted_weak.forecast
        return None if forecast is None else forecast.audited_share(self.run.programs[0])


def places(base: MeshConfig, axes: Sequence[str], num_devices: int) -> list[Place]:
    """The mesh itself first, then each axis times 2, 4, ... up to so many devices."""
    factors = sizes_up_to(max(1, num_devices // base.num_devices))[1:]
    along = [Place(axis, f, replace(base, **{axis: f * getattr(base, axis)})) for axis in axes for f in factors]
    return [Place("", 1, base), *along]


def check_places(
    options: dict[str, Any], found: Sequence[Place], load: Load, num_devices: int
) -> tuple[list[Place], list[Impossible]]:
    """Those that the model can have on so many devices, and why not the others. ValueError where the first cannot
    be, or a request is too long."""
    args = EngineArgs.of(**options)
    decoder = ModelFiles.find(args).decoder
    longest = args.max_model_len or decoder.max_position
    if load.input_len + load.output_len > longest:
        raise ValueError(f"requests of {load.input_len} + {load.output_len} tokens: the longest sequence has {longest}")
    possible, impossible = [], []
    for place in found:
        try:
            if place.mesh.num_devices > num_devices:
                raise ValueError(f"it needs {place.mesh.num_devices} devices, there are {num_devices}")
            fit(decoder, place.mesh)
            possible.append(place)
        except ValueError as error:
            if not possible:
                raise
            impossible.append(Impossible(place, str(error)))
    return possible, impossible


def measure(options: dict[str, Any], found: Sequence[Place], load: Load, gpu: str) -> Iterator[ScaleRun]:
    """One mesh after the other."""
    first = None
    for place in progress("meshes", found):
        run = measure_on(open_llm(sized(options, place, load)), place, load, gpu, first)
        first = first or run
        yield run
        gc.collect()  # parts of an engine know each other, and XLA:CPU maps memory for every program until they go


def sized(options: dict[str, Any], place: Place, load: Load) -> dict[str, Any]:
    """On the mesh, with room for the weak load and steps of just the sizes that the loads have, where the command line
    leaves them open."""
    most = -(-load.count(place.factor, weak=True) // place.mesh.dp)
    options = on_mesh(options, place.mesh)
    asked = options["max_num_batched_tokens"]
    seqs = options["max_num_seqs"] or min(most, asked or most)
    rows = asked or max(LEAST_ROWS, seqs)
    share = [-(-load.count(place.factor, weak) // (place.mesh.dp * place.mesh.pp)) for weak in (False, True)]
    blocks = 1 + seqs * -(-(load.input_len + load.output_len) // options["block_size"])
    given = options["num_gpu_blocks_override"], options["kv_cache_memory_bytes"]
    return options | {
        "max_num_seqs": seqs,
        "max_num_batched_tokens": rows,
        "num_gpu_blocks_override": max(2, blocks) if given == (None, None) else given[0],
        "decode_buckets": tuple(sorted({min(seqs, size) for size in (*share, seqs)})),
        "token_buckets": (rows,),
    }


def measure_on(loaded: Loaded, place: Place, load: Load, gpu: str, first: ScaleRun | None) -> ScaleRun:
    """Both kinds of scaling; a profile where there are stages, and on real devices. ``first``: whose tokens are
    wanted."""
    llm, most = loaded.llm, load.count(place.factor, weak=True)
    calls = random_calls(llm, [load.input_len] * most, load.output_len, load.seed)
    strong = [offline_batch(llm, calls[: load.requests]) for _ in range(1 + load.repeats)]  # the first one warms up
    weak = [offline_batch(llm, calls) for _ in range(1 + load.repeats)] if place.factor > 1 else strong
    tokens, asked = [*strong[0][1], *weak[0][1][: load.requests]], calls[: load.requests] * 2
    tied = frozenset[int]() if first is None else ties(llm, asked, tokens, first.run.tokens)
    wanted = place.mesh.pp > 1 or jax.default_backend() != "cpu"
    computing, share = profiled(llm, calls[: load.requests]) if wanted else ({}, None)
    of = [
        predict(vars(llm.args), gpu, Workload(load.input_len, load.output_len, concurrency=count), place.mesh)
        for count in (load.requests, most)
    ]
    return ScaleRun(
        place,
        load,
        MeshRun.of(place.name, loaded, place.mesh, tokens, tied),
        [seconds for seconds, _ in strong[1:]],
        [seconds for seconds, _ in weak[1:]],
        computing,
        share,
        *of,
    )


def profiled(llm: LLM, calls: Sequence[Call]) -> tuple[dict[int, float], float | None]:
    """Seconds of computing by device, in the order of the mesh, and the share of collectives in what all of them did;
    nothing where the profile does not show every device."""
    with TemporaryDirectory() as directory:
        llm.start_profile(directory)
        try:
            for _ in range(PROFILED):
                offline_batch(llm, calls)
        finally:
            llm.stop_profile()
        operations = read_operations(Path(directory))
    typical = typical_seconds(operations)
    order = [device.local_hardware_id for device in llm.engine.runner.mesh.devices.flat]
    if not typical.keys() >= set(order):
        return {}, None
    return {device: typical[device] / PROFILED for device in order}, collective_share(operations)
