"""Which mesh to choose: every way to lay a model over a cluster, scored and ranked, and why the others cannot be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sharding.collectives import collective, within_a_host
from sharding.cost_model import (
    MemoryPerGpu,
    Step,
    StepTime,
    kv_tokens,
    layer_collectives,
    memory_per_gpu,
    tick_time,
    usable_bytes,
)
from sharding.hardware import GIB, Cluster
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape

Objective = Literal["latency", "throughput"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput")
Cause = Literal["shape", "hosts", "memory", "rate"]


@dataclass(frozen=True)
class Workload:
    """Requests that are alike. ``rate`` is requests per second, ``concurrency`` how many are served at once; without
    either it is one for latency, and as many as fit for throughput."""

    input_len: int = 1024
    output_len: int = 256
    rate: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "rate", "concurrency"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"workload {name}={value!r}: it is above 0")
        if self.rate is not None and self.concurrency is not None:
            raise ValueError(f"workload has rate={self.rate} and concurrency={self.concurrency}: give one of them")

    @property
    def length(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True)
class Limits:
    """Of one replica's steps: the engine's defaults on a GPU."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    """Longest sequence that the cache must hold; None = the workload's."""


@dataclass(frozen=True)
class Plan:
    """A mesh that fits, and what it would do."""

    mesh: MeshConfig
    memory: MemoryPerGpu
    kv_tokens: int
    """Tokens that the caches of all replicas hold."""
    batch: int
    """Sequences that each replica serves at once."""
    ttft: float
    """Seconds to the first token of a request that finds its replica busy but no queue."""
    time_per_token: float
    tokens_per_second: float
    """Output tokens of all replicas, for the workload."""
    max_tokens_per_second: float
    """The same with as many requests as fit."""
    bound_by: str
    padding: float
    """Share of the weights that is there only to divide over the mesh: copies, zeros, places of idle layers."""

    def request_seconds(self, workload: Workload) -> float:
        return self.ttft + (workload.output_len - 1) * self.time_per_token


@dataclass(frozen=True)
class Rejection:
    mesh: MeshConfig
    cause: Cause
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Plans, the best first, and the meshes that cannot be."""

    plans: tuple[Plan, ...]
    rejected: tuple[Rejection, ...]


def meshes(num_devices: int) -> Iterator[MeshConfig]:
    """Every mesh of so many devices."""
    for tp in _divisors(num_devices):
        for cp in _divisors(num_devices // tp):
            for pp in _divisors(num_devices // (tp * cp)):
                yield MeshConfig(dp=num_devices // (tp * cp * pp), pp=pp, cp=cp, tp=tp)


def rank(
    shape: ModelShape,
    cluster: Cluster,
    workload: Workload,
    objective: Objective = "throughput",
    limits: Limits | None = None,
    candidates: Iterable[MeshConfig] | None = None,
) -> Ranking:
    """Score ``candidates``, or every mesh of the whole cluster."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r}: it is one of {', '.join(OBJECTIVES)}")
    limits = limits or Limits()
    cluster.gpu.flops(shape.dtype)  # refuses what it does not compute in
    if limits.max_model_len is not None and limits.max_model_len < workload.length:
        raise ValueError(
            f"max_model_len={limits.max_model_len}: the workload's sequences have "
            f"{workload.input_len} + {workload.output_len} tokens"
        )
    candidates = meshes(cluster.num_gpus) if candidates is None else candidates
    outcomes = [score(shape, cluster, mesh, workload, objective, limits) for mesh in candidates]
    plans = [o for o in outcomes if isinstance(o, Plan)]
    rejected = [o for o in outcomes if isinstance(o, Rejection)]
    return Ranking(tuple(sorted(plans, key=lambda p: _order(p, workload, objective))), tuple(rejected))


def score(
    shape: ModelShape,
    cluster: Cluster,
    mesh: MeshConfig,
    workload: Workload,
    objective: Objective = "throughput",
    limits: Limits | None = None,
) -> Plan | Rejection:
    """One mesh: what it would do, or why it cannot be."""
    limits = limits or Limits()
    try:
        fitted = shape.fit_to(mesh)
    except ValueError as error:
        return Rejection(mesh, "shape", str(error))
    if reason := _crosses_hosts(fitted, cluster, mesh):
        return Rejection(mesh, "hosts", reason)
    replica = _Replica(fitted, cluster, mesh, workload, limits)
    if reason := replica.does_not_fit():
        return Rejection(mesh, "memory", reason)
    batch = replica.batch(objective)
    if batch is None:
        asked, most = workload.rate, mesh.dp * replica.requests_per_second(replica.most_seqs)
        return Rejection(mesh, "rate", f"cannot keep up: {asked:g} requests/s asked, {most:.3g} served")
    return _plan(shape, replica, batch, objective)


def _plan(shape: ModelShape, replica: _Replica, batch: int, objective: Objective) -> Plan:
    mesh, output_len = replica.mesh, replica.workload.output_len
    alone = objective == "latency" and replica.workload.rate is None
    served = min(replica.workload.concurrency or (1 if alone else mesh.dp * batch), mesh.dp * batch)
    requests = replica.workload.rate or served / batch * replica.requests_per_second(batch)
    return Plan(
        mesh=mesh,
        memory=replica.memory,
        kv_tokens=mesh.dp * replica.kv_tokens,
        batch=batch,
        ttft=replica.first_token(batch).seconds,
        time_per_token=replica.next_token(batch).seconds,
        tokens_per_second=requests * output_len,
        max_tokens_per_second=mesh.dp * replica.requests_per_second(replica.most_seqs) * output_len,
        bound_by=replica.request(batch).bound_by,
        padding=max(0.0, 1 - shape.num_params / (replica.shape.params_per_gpu(mesh) * mesh.pp * mesh.tp)),
    )


def _order(plan: Plan, workload: Workload, objective: Objective) -> tuple[float, ...]:
    """Of equals, the one that uses fewer axes."""
    axes = sum(size > 1 for size in plan.mesh.shape)
    seconds, most = plan.request_seconds(workload), -plan.max_tokens_per_second
    return (seconds, most, axes) if objective == "latency" else (most, seconds, axes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _crosses_hosts(shape: ModelShape, cluster: Cluster, mesh: MeshConfig) -> str | None:
    """tp and cp communicate in every layer: never over the links between hosts. Says what one decoded token would
    cost there."""
    for axis in ("tp", "cp"):
        span = cluster.span(mesh, (axis,))
        if span.hosts == 1 or axis in dict(mesh.links):  # whoever names the link knows that it goes there
            continue
        own = [c for c in layer_collectives(shape, Step.decode(1, 1), mesh) if c.axes == (axis,)]
        layers = shape.layers_per_stage(mesh)
        slow, fast = (
            layers * sum(c.count * collective(c.kind, c.num_bytes, s).seconds for c in own)
            for s in (span, within_a_host(span))
        )
        return (
            f"{axis}={span.size} crosses hosts of {cluster.gpus_per_host}: never proposed; its collectives take "
            f"{slow * 1e3:.1f} ms per token there, {fast * 1e3:.1f} ms over {cluster.intra.name}"
        )
    return None


@dataclass(frozen=True)
class _Replica:
    """One replica of a mesh under its share of the workload. Methods take the sequences that it serves at once."""

    shape: ModelShape
    cluster: Cluster
    mesh: MeshConfig
    workload: Workload
    limits: Limits

    @cached_property
    def memory(self) -> MemoryPerGpu:
        limits = self.limits
        return memory_per_gpu(
            self.shape, self.mesh, self.cluster.gpu, limits.max_num_seqs, limits.max_num_batched_tokens
        )

    @property
    def longest(self) -> int:
        return self.limits.max_model_len or self.workload.length

    @cached_property
    def kv_tokens(self) -> int:
        return kv_tokens(self.shape, self.mesh, self.memory, self.workload.length)

    @property
    def most_seqs(self) -> int:
        """Sequences at their full length that the cache holds, and that a step takes."""
        return max(1, min(self.limits.max_num_seqs, self.kv_tokens // self.workload.length))

    def does_not_fit(self) -> str | None:
        there = usable_bytes(self.cluster.gpu)
        if self.memory.needed >= there:
            return self._weights_do_not_fit(there - (self.memory.needed - self.memory.weights))
        sequence = self.shape.kv_bytes_per_gpu(self.mesh, self.longest)
        if sequence > self.memory.kv:
            return (
                f"no room for one sequence of {self.longest} tokens: {sequence / GIB:.1f} GiB of KV per GPU, "
                f"{self.memory.kv / GIB:.1f} GiB there"
            )
        return None

    def _weights_do_not_fit(self, there: int) -> str:
        weights, shards = self.memory.weights, self.mesh.pp * self.mesh.tp
        least = -(-weights * shards // max(there, 1))
        return (
            f"does not fit: {weights / GIB:.1f} GiB of weights per GPU, {there / GIB:.1f} GiB there; "
            f"pp·tp of {least} or more would"
        )

    def batch(self, objective: Objective) -> int | None:
        """Sequences that this replica serves at once for the workload; None if it cannot keep up."""
        if self.workload.rate is not None:
            return self._batch_for(self.workload.rate / self.mesh.dp)
        if self.workload.concurrency is not None:
            return min(self.most_seqs, -(-self.workload.concurrency // self.mesh.dp))
        return 1 if objective == "latency" else self.most_seqs

    def _batch_for(self, rate: float) -> int | None:
        """The fewest that finish ``rate`` requests per second."""
        most = self.most_seqs
        found = bisect_left(range(1, most + 1), rate, key=self.requests_per_second)
        return None if found == most else found + 1

    def requests_per_second(self, batch: int) -> float:
        """By Little's law: requests there = rate × time of each."""
        return batch / self.request(batch).seconds

    def decode(self, batch: int) -> StepTime:
        """One token for each sequence, half of the output behind it. With pp they are dealt to as many microbatches,
        and a token passes all stages before the next one can begin."""
        microbatch = -(-batch // min(batch, self.mesh.pp))
        context = self.workload.input_len + -(-self.workload.output_len // 2)
        return self._tick(Step.decode(microbatch, context)) * self.mesh.pp

    def prefill(self, riding: int = 0) -> list[StepTime]:
        """Ticks of one prompt, chunk by chunk, with ``riding`` other sequences of the replica decoding in them."""
        context = self.workload.input_len + -(-self.workload.output_len // 2)
        beside = riding // self.mesh.pp
        chunk, total = max(1, self.limits.max_num_batched_tokens - beside), self.workload.input_len
        decoding = Step.decode(beside, context) if beside else Step(())
        chunks = (Step.prefill(min(chunk, total - done), done) for done in range(0, total, chunk))
        return [self._tick(step + decoding) for step in chunks]

    def first_token(self, batch: int) -> StepTime:
        """A prompt's chunks follow each other through the stages; the last has pp - 1 more to pass."""
        ticks = self.prefill(batch - 1)
        return sum(ticks, ticks[-1] * (self.mesh.pp - 1))

    def next_token(self, batch: int) -> StepTime:
        """Between two tokens of a sequence: a decode step, and the others' prompts that come in between."""
        return self.decode(batch) + self._prompt * ((batch - 1) / self.workload.output_len)

    def request(self, batch: int) -> StepTime:
        return self.first_token(batch) + self.next_token(batch) * (self.workload.output_len - 1)

    @cached_property
    def _prompt(self) -> StepTime:
        """What one prompt takes of every stage."""
        return sum(self.prefill(), StepTime())

    def _tick(self, step: Step) -> StepTime:
        return tick_time(self.shape, step, self.mesh, self.cluster)


def fewest_gpus(shape: ModelShape, cluster: Cluster) -> int:
    """GPUs of this type whose usable memory holds the weights, and nothing else."""
    return -(-shape.num_params * shape.dtype_bytes // usable_bytes(cluster.gpu))
