"""What a step costs on a mesh: floating-point operations, bytes of memory and of links, seconds, and memory per GPU.

The notation is that of "How to Scale Your Model" (the JAX scaling book); axis letters as in ``model_shape``. All sizes
are those of one GPU of one replica, for a shape that was fitted to the mesh. Nothing here is measured: ``hardware``
says which fractions of the data sheets are assumed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from fractions import Fraction

from sharding.collectives import CommTime, Kind, collective
from sharding.hardware import GIB, MICROSECOND, Cluster, Gpu
from sharding.mesh import MeshConfig
from sharding.model_shape import VOCABULARY_AXES, ModelShape, vocabulary_shards

KERNEL_SECONDS = 2 * MICROSECOND
"""From the start of one kernel to that of the next where the first has nothing to do: launches inside a CUDA graph.
A guess, as are the next two, until steps have been timed on a GPU."""
KERNELS_PER_LAYER = 10
"""Two norms, QKV, rotary embedding, cache write, attention, output, gate/up, activation, down."""
KERNELS_PER_STEP = 20
"""Embedding, last norm, unembedding, sampling, bookkeeping."""
OVERLAP = 0.0
"""Share of the communication that hides behind computation: none, because each layer's all-reduces are on the way from
one product to the next."""
IMBALANCE = 0.05
"""What a tick of a pipeline takes longer than its share of the work: every stage waits for the slowest, and
microbatches are never quite alike. A guess."""
SAMPLING_REDUCTIONS = 2
"""All-reduces of one pair of numbers per sampled row: the largest score, and the smallest token id that has it."""
TRUNCATION_BYTES = 15 * 4
"""Most that an all-reduce of top_k and top_p carries per sampled row: for each threshold that is tried at once, how
many tokens reach it, or how much likelihood. They run in steps that ask for them, and are allowed but not counted."""
LOGIT_WORDS = 3
"""Of 4 bytes, per entry of the logits while they are sampled from: themselves, edited, and their keys. So XLA compiles
it for an H200."""
MEMORY_UTILIZATION = 0.92
"""The engine's default for ``gpu_memory_utilization``."""
RESERVE_BYTES = GIB // 2
"""What the engine leaves free beside weights, step and cache."""


# -- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Sequences of a step that are alike: each has ``num_tokens`` new tokens behind ``num_cached`` older ones."""

    num_seqs: int
    num_tokens: int
    num_cached: int = 0


@dataclass(frozen=True)
class Step:
    """One step of one replica, or of one microbatch of it: whatever is computed together."""

    groups: tuple[Group, ...]

    @classmethod
    def decode(cls, batch: int, context: int) -> Step:
        """One token each; ``context`` counts the token itself."""
        return cls((Group(batch, 1, context - 1),))

    @classmethod
    def prefill(cls, num_tokens: int, num_cached: int = 0) -> Step:
        return cls((Group(1, num_tokens, num_cached),))

    def __add__(self, other: Step) -> Step:
        return Step(self.groups + other.groups)

    @property
    def num_rows(self) -> int:
        """T: tokens that are computed."""
        return sum(g.num_seqs * g.num_tokens for g in self.groups)

    @property
    def num_seqs(self) -> int:
        """S: rows that are sampled."""
        return sum(g.num_seqs for g in self.groups)


def attended(num_tokens: int, num_cached: int, window: int | None = None) -> int:
    """Pairs of a new token and a token that it sees, itself included."""
    whole = num_tokens if window is None else min(max(window - num_cached, 0), num_tokens)
    cut = 0 if window is None else (num_tokens - whole) * window
    return whole * num_cached + whole * (whole + 1) // 2 + cut


def keys_read(num_tokens: int, num_cached: int, window: int | None = None) -> int:
    """Tokens whose K and V are read, each once: attention keeps a tile of queries while it reads."""
    return num_tokens + (num_cached if window is None else min(num_cached, window - 1))


# -- work and time on one GPU ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float


@dataclass(frozen=True)
class StepTime:
    """Seconds by what they are spent on. A part of the work is under ``compute`` or ``memory``, whichever bounds it."""

    compute: float = 0.0
    memory: float = 0.0
    communication: float = 0.0
    launches: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.communication + self.launches

    @property
    def bound_by(self) -> str:
        """What most of the time is spent on."""
        return max((f.name for f in fields(self)), key=lambda name: getattr(self, name))

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> StepTime:
        return StepTime(*(getattr(self, f.name) * times for f in fields(self)))


def dense_work(shape: ModelShape, num_rows: int, mesh: MeshConfig) -> Work:
    """Of one layer: 2 FLOP per active parameter and token, every stored parameter read once."""
    flops = 2 * num_rows * (shape.attention_params + shape.active_mlp_params)
    read = (shape.attention_params + shape.stored_mlp_params) * shape.dtype_bytes
    return Work(flops / mesh.tp, read / mesh.tp)


def attention_work(shape: ModelShape, step: Step, mesh: MeshConfig, window: int | None = None) -> Work:
    """Of one layer: 4 N H FLOP per pair of tokens (scores, and the sum over values); K and V read and written."""
    pairs = sum(g.num_seqs * attended(g.num_tokens, g.num_cached, window) for g in step.groups)
    read = sum(g.num_seqs * keys_read(g.num_tokens, g.num_cached, window) for g in step.groups)
    kv_token = 2 * shape.num_kv_heads * shape.head_dim * shape.kv_dtype_bytes
    ranks = mesh.tp * mesh.cp
    return Work(4 * pairs * shape.num_heads * shape.head_dim / ranks, (read + step.num_rows) * kv_token / ranks)


def vocabulary_work(shape: ModelShape, step: Step, mesh: MeshConfig) -> Work:
    """Logits of the sampled rows, and the rows of the embedding."""
    shards = vocabulary_shards(mesh)
    read = shape.unembedding_params / shards + step.num_rows * shape.hidden_size
    return Work(2 * step.num_seqs * shape.unembedding_params / shards, read * shape.dtype_bytes)


def roofline(work: Work, gpu: Gpu, dtype: str) -> StepTime:
    compute, memory = work.flops / gpu.flops(dtype), work.bytes / gpu.achievable_bandwidth
    return StepTime(compute=compute) if compute > memory else StepTime(memory=memory)


def layer_time(
    shape: ModelShape, step: Step, mesh: MeshConfig, cluster: Cluster, window: int | None = None
) -> StepTime:
    """One layer: max(compute, memory) of the products and of attention, and its collectives."""
    dense = roofline(dense_work(shape, step.num_rows, mesh), cluster.gpu, shape.dtype)
    attention = roofline(attention_work(shape, step, mesh, window), cluster.gpu, shape.dtype)
    own = StepTime(communication=_seconds(layer_collectives(shape, step, mesh), mesh, cluster))
    return dense + attention + own + StepTime(launches=KERNELS_PER_LAYER * KERNEL_SECONDS)


def tick_time(shape: ModelShape, step: Step, mesh: MeshConfig, cluster: Cluster) -> StepTime:
    """Every stage does its layers for one microbatch, all do their shard of the vocabulary; with pp=1, a step."""
    vocabulary = roofline(vocabulary_work(shape, step, mesh), cluster.gpu, shape.dtype)
    around = StepTime(
        communication=_seconds(tick_collectives(shape, step, mesh), mesh, cluster),
        launches=KERNELS_PER_STEP * KERNEL_SECONDS,
    )
    layers = (layer_time(shape, step, mesh, cluster, w) * n for w, n in shape.stage_windows(mesh).items())
    return sum(layers, vocabulary + around) * (1.0 if mesh.pp == 1 else 1 + IMBALANCE)


# -- communication -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """``count`` collectives of ``num_bytes`` (as ``collectives.collective`` counts them) over the ranks of ``axes``."""

    kind: Kind
    axes: tuple[str, ...]
    num_bytes: int
    count: int = 1


def layer_collectives(shape: ModelShape, step: Step, mesh: MeshConfig) -> list[Collective]:
    """tp: an all-reduce of [T, D] after attention and one after the feed-forward. cp: the ranks' attention outputs are
    merged in float32, by the largest log-sum-exps [T, N], then weighted outputs and weights [T, N, H + 1] of the own
    heads. dp: nothing."""
    found = []
    if mesh.tp > 1:
        found.append(Collective("all_reduce", ("tp",), step.num_rows * shape.hidden_size * shape.dtype_bytes, 2))
    if mesh.cp > 1:
        heads = step.num_rows * shape.num_heads // mesh.tp
        found.append(Collective("all_reduce", ("cp",), heads * 4))
        found.append(Collective("all_reduce", ("cp",), heads * 4 * (shape.head_dim + 1)))
    return found


def tick_collectives(shape: ModelShape, step: Step, mesh: MeshConfig, sampling: bool = True) -> list[Collective]:
    """Outside of layers. The vocabulary's shards: [T, D] embeddings are summed, and sampling compares pairs of numbers
    per row (what top_k and top_p add up is allowed, not counted). pp: [T, D] goes to the next stage, and the last
    stage's [S, D] to all for the unembedding."""
    row = shape.hidden_size * shape.dtype_bytes
    found = []
    if vocabulary_shards(mesh) > 1:
        axes = tuple(axis for axis in VOCABULARY_AXES if getattr(mesh, axis) > 1)
        found.append(Collective("all_reduce", axes, step.num_rows * row))
        if sampling:
            found.append(Collective("all_reduce", axes, step.num_seqs * 8, SAMPLING_REDUCTIONS))
            found.append(Collective("all_reduce", axes, step.num_seqs * TRUNCATION_BYTES, count=0))
    if mesh.pp > 1:
        found.append(Collective("permute", ("pp",), step.num_rows * row))
        found.append(Collective("all_reduce", ("pp",), step.num_seqs * row))
    return found


def payload_bytes(shape: ModelShape, step: Step, mesh: MeshConfig, sampling: bool = True) -> Counter[tuple[str, ...]]:
    """Bytes that the collectives of one tick carry, by the axes that they go over; ``sampling``: with its own."""
    found = Counter[tuple[str, ...]]()
    for c in layer_collectives(shape, step, mesh):
        found[c.axes] += c.num_bytes * c.count * shape.layers_per_stage(mesh)
    for c in tick_collectives(shape, step, mesh, sampling):
        found[c.axes] += c.num_bytes * c.count
    return found


def communication_time(collectives: list[Collective], mesh: MeshConfig, cluster: Cluster) -> CommTime:
    times = (collective(c.kind, c.num_bytes, cluster.span(mesh, c.axes)) * c.count for c in collectives)
    return sum(times, CommTime())


def _seconds(collectives: list[Collective], mesh: MeshConfig, cluster: Cluster) -> float:
    return communication_time(collectives, mesh, cluster).seconds * (1 - OVERLAP)


# -- pipeline ----------------------------------------------------------------------------------------------------------


def bubble(stages: int, microbatches: int, rounds: int = 1) -> Fraction:
    """Share of the stages' time that is idle while ``microbatches`` pass ``rounds`` times, filling and draining
    included: (p-1)/(m+p-1) for one round; for m >= p it goes to 0 with the rounds, for m < p to (p-m)/p."""
    ticks = (rounds - 1) * max(microbatches, stages) + microbatches + stages - 1
    return 1 - Fraction(microbatches * rounds, ticks)


def schedule_grid(stages: int, microbatches: int, rounds: int = 1) -> list[list[int | None]]:
    """[stage][tick] -> the microbatch that it works on, or None. A microbatch starts its next round (its next token)
    when it has left the last stage."""
    period = max(microbatches, stages)
    ticks = (rounds - 1) * period + microbatches + stages - 1
    grid: list[list[int | None]] = [[None] * ticks for _ in range(stages)]
    for start, microbatch in ((r * period + m, m) for r in range(rounds) for m in range(microbatches)):
        for stage in range(stages):
            grid[stage][start + stage] = microbatch
    return grid


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPerGpu:
    """Bytes. ``kv`` is all that is left of the share of the memory that may be used."""

    weights: int
    sampler: int
    activations: int
    reserve: int
    kv: int

    @property
    def total(self) -> int:
        return self.weights + self.sampler + self.activations + self.reserve + self.kv

    @property
    def needed(self) -> int:
        """Without the KV cache."""
        return self.total - self.kv


def usable_bytes(gpu: Gpu) -> int:
    return int(gpu.memory_bytes * MEMORY_UTILIZATION)


def memory_per_gpu(shape: ModelShape, mesh: MeshConfig, gpu: Gpu, num_slots: int, num_rows: int) -> MemoryPerGpu:
    """For ``num_slots`` sequences and steps of up to ``num_rows`` tokens."""
    vocabulary = shape.vocab_size // vocabulary_shards(mesh)
    taken = {
        "weights": shape.weight_bytes_per_gpu(mesh),
        "sampler": num_slots * vocabulary * 8,  # float32 bias and int32 counts
        "activations": _activation_bytes(shape, mesh, num_slots, num_rows),
        "reserve": RESERVE_BYTES,
    }
    return MemoryPerGpu(**taken, kv=max(0, usable_bytes(gpu) - sum(taken.values())))


def _activation_bytes(shape: ModelShape, mesh: MeshConfig, num_slots: int, num_rows: int) -> int:
    """What one layer has alive at most (residual and normalised input; gate, up and their product), or sampling, if
    that is more; and the hidden states that come out, or with stages also wait for the next tick."""
    row = shape.hidden_size * shape.dtype_bytes
    layer = num_rows * (2 * row + 3 * shape.intermediate_size * shape.dtype_bytes // mesh.tp)
    sampling = LOGIT_WORDS * 4 * num_slots * shape.vocab_size // vocabulary_shards(mesh)
    return max(layer, sampling) + num_rows * row * (1 if mesh.pp == 1 else 2)


def kv_tokens(shape: ModelShape, mesh: MeshConfig, memory: MemoryPerGpu, sequence: int) -> int:
    """Tokens that one replica's cache holds in sequences of this length."""
    return int(memory.kv * sequence / shape.kv_bytes_per_gpu(mesh, sequence))
