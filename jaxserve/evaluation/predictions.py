"""What the cost model expects of this model on GPUs that need not be there: figures to stand beside measured ones.

Simulated devices share the cores of one machine, so their speeds say nothing about a mesh of GPUs. What the cost model
makes of data sheets does, as far as it goes (docs/planning.md): it knows products, memory, links and launches, and
neither the host's work between steps nor queues. No module here starts jax before a prediction is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.cli.output import bytes_text, seconds_text
from jaxserve.evaluation.result import Figure, Table
from sharding.audit import OP_OF
from sharding.collectives import Kind
from sharding.cost_model import Collective, Step, StepTime, communication_time, tick_collectives, tick_time
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape
from sharding.planner import Limits, Plan, Rejection, Workload, score

if TYPE_CHECKING:
    from jaxserve.dry_run import Program

HOW = "cost model on data sheets (docs/planning.md), not measured"
KIND_OF: Mapping[str, Kind] = {
    **{op: kind for kind, op in OP_OF.items()},
    "send": "permute",
    "ragged-all-to-all": "all_to_all",
    "collective-broadcast": "all_gather",
}
"""What the cost model takes a compiled program's collectives for."""


@dataclass(frozen=True)
class Forecast:
    """A model on a mesh of GPUs of one kind: seconds of its steps."""

    original: ModelShape
    shape: ModelShape
    """Fitted to the mesh."""
    mesh: MeshConfig
    cluster: Cluster
    limits: Limits

    @classmethod
    def of(cls, options: dict[str, Any], gpu: str, mesh: MeshConfig | None = None) -> Forecast:
        """``options``: keyword arguments of ``LLM``; ``mesh`` takes the place of theirs. Reads config.json only.
        ValueError where the cost model has no answer: it says why."""
        from jaxserve.build import ModelFiles, resolve_dtype, resolve_kv_dtype, resolve_mesh
        from jaxserve.engine_args import EngineArgs
        from jaxserve.models.shape import model_shape

        args, usual = EngineArgs.of(**options), Limits()
        mesh = resolve_mesh(args) if mesh is None else mesh
        if mesh.rules:
            raise ValueError(f"mesh {mesh.short}: the cost model knows the usual sharding rules only")
        files = ModelFiles.find(args)
        dtype = resolve_dtype(args.dtype, files.hf)
        shape = model_shape(files.decoder, str(dtype), str(resolve_kv_dtype(args.kv_cache_dtype, dtype)))
        limits = Limits(
            args.max_num_seqs or usual.max_num_seqs, args.max_num_batched_tokens or usual.max_num_batched_tokens
        )
        cluster = Cluster.parse(f"{mesh.num_devices}x{gpu}")
        return cls(shape, shape.fit_to(mesh), mesh, cluster, limits)

    @property
    def name(self) -> str:
        """ "8×H200"."""
        return f"{self.mesh.num_devices}×{self.cluster.gpu.name.upper()}"

    def decode(self, num_seqs: int, context: int) -> StepTime:
        """From one token to the next of ``num_seqs`` sequences that all replicas have together, ``context`` tokens
        long. With pp: through all stages."""
        batch = -(-num_seqs // self.mesh.dp)
        microbatch = -(-batch // min(batch, self.mesh.pp))
        return self.step(Step.decode(microbatch, context)) * self.mesh.pp

    def prompt(self, num_tokens: int) -> StepTime:
        """Of one prompt, alone, chunk by chunk, through all stages."""
        chunk = self.limits.max_num_batched_tokens
        ticks = [self.step(Step.prefill(min(chunk, num_tokens - i), i)) for i in range(0, num_tokens, chunk)]
        return sum(ticks, ticks[-1] * (self.mesh.pp - 1))

    def step(self, step: Step) -> StepTime:
        """What one replica computes together (with pp: one tick)."""
        return tick_time(self.shape, step, self.mesh, self.cluster)

    def plan(self, workload: Workload) -> Plan:
        """A load of requests that are alike, as ``jaxserve plan`` scores it; ValueError says what does not fit."""
        found = score(self.original, self.cluster, self.mesh, workload, "throughput", self.limits)
        if isinstance(found, Rejection):
            raise ValueError(found.reason)
        return found

    def audited_share(self, program: Program) -> float:
        """Share of a compiled step's predicted seconds that its collectives take: those that the audit found, over this
        cluster's links. Branches may not run: what sampling has in them is the cost model's. XLA:CPU carries 16-bit
        numbers as float32: the share that it gives for such a model is too large."""
        from jaxserve.dry_run import step_of

        step = step_of(program.layout)
        found = [
            Collective(KIND_OF[c.op], c.axes, c.num_bytes)
            for c in program.audit.collectives
            if c.axes and not c.in_branch
        ]
        around, sampled = (tick_collectives(self.shape, step, self.mesh, sampling) for sampling in (False, True))
        found += [c for c in sampled if c not in around]
        links, work = communication_time(found, self.mesh, self.cluster).seconds, self.step(step)
        return links / (work.seconds - work.communication + links)


@dataclass(frozen=True)
class Prediction:
    """What a load would be like on a mesh of GPUs, or why nothing can be said."""

    mesh: MeshConfig
    workload: Workload
    forecast: Forecast | None
    plan: Plan | None
    reason: str = ""
    """Why there is none."""

    @property
    def decode(self) -> StepTime:
        """A decode step in the middle of the answers, nobody else's prompt beside it."""
        assert self.forecast is not None and self.plan is not None
        context = self.workload.input_len + -(-self.workload.output_len // 2)
        return self.forecast.decode(self.plan.batch * self.mesh.dp, context)

    @property
    def communication(self) -> float:
        """Share of a decode step."""
        return self.decode.communication / self.decode.seconds

    def figures(self, prefix: str = "") -> list[Figure]:
        """None where there is no prediction: ``prediction_table`` says why."""
        if self.forecast is None or self.plan is None:
            return []
        name, plan = f"{prefix}predicted for {self.forecast.name}", self.plan
        how = f"{HOW}: {workload_text(self.workload)}, in {self.forecast.shape.dtype}"
        return [
            Figure(f"{name}: throughput", plan.tokens_per_second, "tok/s", f"{how}; requests come as others end"),
            Figure(f"{name}: first token", plan.ttft, "s", f"{how}; the replica is busy, but nobody queues"),
            Figure(f"{name}: decode step", self.decode.seconds, "s", f"{how}; no prompts beside it"),
            Figure(f"{name}: communication", self.communication, "", f"{how}; share of a decode step"),
            Figure(f"{name}: memory without KV blocks", plan.memory.needed, "B", f"{how}; of one GPU"),
        ]


def predict(options: dict[str, Any], gpu: str, workload: Workload, mesh: MeshConfig | None = None) -> Prediction:
    """``options``: keyword arguments of ``LLM``; ``mesh`` takes the place of theirs."""
    from jaxserve.evaluation.engines import mesh_of

    mesh = mesh_of(options) if mesh is None else mesh
    try:
        forecast = Forecast.of(options, gpu, mesh)
        return Prediction(mesh, workload, forecast, forecast.plan(workload))
    except ValueError as error:
        return Prediction(mesh, workload, None, None, str(error))


def workload_text(workload: Workload) -> str:
    at_once = "" if workload.concurrency is None else f"{workload.concurrency} requests at once, "
    return f"{at_once}{workload.input_len} tokens in and {workload.output_len} out"


def prediction_table(gpu: str, predictions: Sequence[Prediction]) -> Table:
    """One row for each; where there is none, why."""
    rows = []
    for p in predictions:
        row = ["", "", "", "", "", ""]
        if p.plan is not None:
            row = [
                f"{p.plan.tokens_per_second:,.0f} tok/s",
                seconds_text(p.plan.ttft),
                seconds_text(p.decode.seconds),
                f"{p.communication:.0%}",
                p.decode.bound_by,
                bytes_text(p.plan.memory.needed),
            ]
        rows.append([p.mesh.short, *row, p.reason])
    header = ["mesh", "output", "first token", "decode step", "links", "bound by", "memory", "not, because"]
    shown = len(header) if any(p.reason for p in predictions) else len(header) - 1
    return Table(f"Predicted for {gpu.upper()}", header[:shown], [row[:shown] for row in rows])
