"""The engine's step without weights, on devices that need not be there: compiled, read, and held against what the cost
model says of it."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh

from jaxserve.batch import BatchLayout
from jaxserve.build import (
    CPU_KV_BYTES,
    GPU_RESERVE_BYTES,
    ModelFiles,
    abstract_runner,
    blocks_that_fit,
    fit,
    kv_bytes,
    kv_bytes_on_gpu,
    open_mesh,
    resolve_mesh,
)
from jaxserve.config import SchedulerConfig
from jaxserve.device_state import bytes_per_device
from jaxserve.engine_args import EngineArgs
from jaxserve.models.shape import model_shape
from jaxserve.runner import ModelRunner
from jaxserve.step_costs import step_of
from sharding import aot, build_mesh, launches
from sharding.audit import SAMPLE, Audit, Budget, audit
from sharding.cost_model import MemoryPerGpu, payload_bytes
from sharding.hardware import Cluster
from sharding.launches import Launches
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape

TOLERANCE = 0.05
"""Of a prediction, relative to what the compiled program says."""


@dataclass(frozen=True)
class Program:
    """One step, compiled."""

    name: str
    layout: BatchLayout
    seconds: float
    audit: Audit
    budget: Budget
    broken: tuple[str, ...]
    launches: Launches | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, and the KV tokens that find room in what is left."""

    limit: int
    usable: int
    weights: int
    """With all else that the largest step needs, but for KV blocks and the reserve: ``step``."""
    step: int
    reserve: int
    kv: int
    tokens_per_replica: int
    tokens: int
    longest: int

    @property
    def fits(self) -> bool:
        """One sequence of ``longest`` tokens, at least."""
        return self.tokens_per_replica >= self.longest


@dataclass(frozen=True)
class Comparison:
    """A prediction and what the compiled program has, in bytes of one device."""

    what: str
    predicted: int
    compiled: int

    @property
    def error(self) -> float:
        """Of the prediction, relative to what is compiled."""
        return self.predicted / self.compiled - 1 if self.compiled else float(self.predicted > 0)

    @property
    def holds(self) -> bool:
        return abs(self.error) <= TOLERANCE


@dataclass(frozen=True)
class DryRun:
    """A model's step on a mesh, without weights."""

    args: EngineArgs
    files: ModelFiles
    runner: ModelRunner
    limits: SchedulerConfig
    mesh: MeshConfig
    cluster: Cluster | None
    """Its GPUs; None = simulated CPU devices."""
    num_blocks: tuple[int, ...]
    """That programs are compiled for, of each group of layers."""

    @classmethod
    def of(cls, args: EngineArgs, cluster: Cluster | None) -> DryRun:
        """Raises ValueError for a mesh that does not fit the model or the cluster, NotImplementedError where what
        compiles for GPUs is not installed."""
        config, files = resolve_mesh(args), ModelFiles.find(args)
        fit(files.decoder, config)  # first of all: says with the model's numbers what does not fit
        mesh = _mesh(config, cluster)
        runner, limits = abstract_runner(args, files, mesh)
        limits = replace(limits, num_blocks=_likely_blocks(args, runner, limits, cluster))
        num_blocks = tuple(limits.blocks_of(window) for window in limits.windows)
        return cls(args, files, runner, limits, config, cluster, num_blocks)

    @property
    def weights(self) -> int:
        """Bytes of one device."""
        return bytes_per_device(self.runner.params)

    @property
    def kv(self) -> int:
        """Bytes of one device's KV blocks in the programs that are compiled."""
        state = self.runner.abstract_state(self.num_blocks)
        return bytes_per_device((state.keys, state.values))

    @property
    def shape(self) -> ModelShape:
        """The model as the cost model sees it, fitted to the mesh."""
        dtype, kv_dtype = str(self.runner.params[0].dtype), str(self.runner.config.kv_dtype)
        return model_shape(self.files.decoder, dtype, kv_dtype).fit_to(self.mesh)

    def layouts(self, tokens: int | None = None, decode: bool = False) -> list[BatchLayout]:
        """The largest decode step and the largest other one, or only one of them; of ``tokens`` rows if given."""
        config = self.runner.config
        kinds = [True] if decode else [True, False] if tokens is None else [False]
        largest = {True: config.decode_buckets[-1], False: config.token_buckets[-1]}
        for kind in kinds:
            if tokens is not None and tokens > largest[kind]:
                limit = "max_num_seqs" if kind else "max_num_batched_tokens"
                raise ValueError(f"tokens={tokens}: steps of this kind have at most {limit}={largest[kind]} rows")
        return [config.layout(tokens or largest[kind], kind) for kind in kinds]

    def program(self, layout: BatchLayout) -> Program:
        """Compile one step and read it."""
        start = time.perf_counter()
        with self._compiler() as dump:
            compiled = self.runner.step_program(layout, self.num_blocks)
            launched = None if dump is None else launches.read_launches(dump)
        found = audit(compiled, self.runner.mesh)
        seconds = time.perf_counter() - start
        budget = Budget.of_step(self.shape, step_of(layout), self.mesh, wide=self.cluster is None)
        name = self.runner.step_name(layout)
        broken = [] if self.mesh.rules else found.check(budget)
        return Program(name, layout, seconds, found, budget, tuple(broken), launched)

    @contextmanager
    def _compiler(self) -> Iterator[Path | None]:
        """Set up for the target; where it writes what it launches."""
        if self.cluster is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as dump, aot.not_cached():
            self.runner.compiler_options |= {**aot.COMPILER_OPTIONS, launches.OPTION: dump}
            yield Path(dump)

    def memory(self, programs: Sequence[Program]) -> Memory | None:
        """On a target, from what the programs need."""
        if self.cluster is None:
            return None
        step = self.step_bytes(programs)
        limit, share = self.cluster.gpu.memory_bytes, self.args.gpu_memory_utilization
        available = kv_bytes_on_gpu(limit, share, step)
        fits = kv_bytes(self.runner, replace(self.limits, num_blocks=2)) <= available
        blocks = blocks_that_fit(self.runner, self.limits, available) if fits else 1
        tokens = (blocks - 1) * self.limits.block_size
        return Memory(
            limit=limit,
            usable=int(limit * share),
            weights=self.weights,
            step=step,
            reserve=GPU_RESERVE_BYTES,
            kv=available,
            tokens_per_replica=tokens,
            tokens=tokens * self.mesh.dp,
            longest=self.limits.max_model_len,
        )

    def step_bytes(self, programs: Sequence[Program]) -> int:
        """That the largest of these steps needs besides KV blocks."""
        return max(p.audit.memory.total for p in programs if p.audit.memory is not None) - self.kv

    def compare(self, predicted: MemoryPerGpu, programs: Sequence[Program]) -> list[Comparison]:
        """What the planner says of memory and of the bytes that each step sends, with what these programs have."""
        needed = predicted.needed - predicted.reserve
        found = [
            Comparison("weights", predicted.weights, self.weights),
            Comparison("memory without KV blocks", needed, self.step_bytes(programs)),
        ]
        for program in programs:
            sent = Counter[tuple[str, ...]]()
            for c in program.audit.collectives:
                if c.axes and c.where != SAMPLE:  # most of what sampling has may not run
                    sent[c.axes] += c.num_bytes
            expected = payload_bytes(self.shape, step_of(program.layout), self.mesh, sampling=False)
            for axes in sorted(sent.keys() | expected.keys()):
                name = f"{program.name} over {','.join(axes)}"
                found.append(Comparison(name, expected[axes], sent[axes]))
        return found


def _mesh(config: MeshConfig, cluster: Cluster | None) -> Mesh:
    if cluster is None:
        return open_mesh(config)
    if config.num_devices > cluster.num_gpus:
        raise ValueError(f"mesh {config} needs {config.num_devices} GPUs, the target has {cluster.num_gpus}")
    return build_mesh(config, aot.devices(cluster))


def _likely_blocks(args: EngineArgs, runner: ModelRunner, limits: SchedulerConfig, cluster: Cluster | None) -> int:
    """Half of what fits if the step needs little beside weights: programs of another number of blocks are alike, and
    XLA would spend its time on saving memory where their arguments alone fill most of a GPU."""
    available = CPU_KV_BYTES // runner.mesh.size
    if cluster is not None:
        weights = bytes_per_device(runner.params)
        available = kv_bytes_on_gpu(cluster.gpu.memory_bytes, args.gpu_memory_utilization, weights) // 2
    return max(2, blocks_that_fit(runner, limits, available))
