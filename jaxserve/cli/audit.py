"""``jaxserve audit``: what the compiled step does on a mesh, of devices that need not be there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.command import epilog
from jaxserve.cli.options import Json, ModelFlags
from jaxserve.cli.output import bytes_text, count_text, print_json, print_pairs, print_table, seconds_text
from jaxserve.cli.plan import axes_of, mesh_text, model_shape
from jaxserve.engine_args import EngineArgs

if TYPE_CHECKING:
    import jax

    from jaxserve.batch import BatchLayout
    from jaxserve.build import ModelFiles
    from jaxserve.config import SchedulerConfig
    from jaxserve.runner import ModelRunner
    from sharding.audit import Audit, Budget, Collective
    from sharding.hardware import Cluster
    from sharding.launches import Launches
    from sharding.mesh import MeshConfig

MOST_BROKEN = 8
"""Lines about a broken budget that are shown; --json has all."""
PLAIN = "plain XLA: each token reads its whole table, so temporaries and loops are not those of a kernel"


@epilog(
    "jaxserve audit --model llama-3.1-70b -tp 8 --target h200:8",
    "jaxserve audit -tp 2 -dp 2",
    "jaxserve audit --model path/to/checkpoint -tp 4 --target a100:4 --decode --tokens 64 --json",
)
def audit(
    *,
    engine: ModelFlags,
    target: Annotated[
        str | None, typer.Option(metavar="GPUS", help='Like "h200:8"; none = simulated CPU devices.')
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest sequence in tokens; none = the model's.")] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences per step and replica; none = 64, GPU 256.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per step and replica; none = 512, GPU 2048.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory to use.")
    ] = EngineArgs.gpu_memory_utilization,
    attention_backend: Annotated[
        str | None, typer.Option(help="Paged attention to use; none = the platform's.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Rows of the step; none = the largest decode and the largest other step.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Only the step in which every sequence has one token.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile the engine's step for a mesh and report its collectives, copies and memory per device.

    No weights are read, and no GPU has to be there. Exit code 1 if the step communicates or copies more than it should,
    or does not fit the target's memory.
    """
    args = EngineArgs(
        **engine.engine_options(),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        attention_backend=attention_backend,
    )
    subject = _Subject.of(args, target)
    programs = [subject.program(layout) for layout in subject.layouts(tokens, decode)]
    memory = subject.memory(programs)
    if as_json:
        print_json(_report(subject, programs, memory))
    else:
        _print(subject, programs, memory)
    if any(p.broken for p in programs) or (memory is not None and not memory.fits):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Program:
    """One step, compiled."""

    name: str
    seconds: float
    audit: Audit
    budget: Budget
    broken: tuple[str, ...]
    launches: Launches | None


@dataclass(frozen=True)
class _Memory:
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
class _Subject:
    """A model's step on a mesh, without weights."""

    args: EngineArgs
    files: ModelFiles
    runner: ModelRunner
    limits: SchedulerConfig
    mesh: MeshConfig
    cluster: Cluster | None
    num_blocks: tuple[int, ...]
    """That programs are compiled for, of each group of layers."""

    @classmethod
    def of(cls, args: EngineArgs, target: str | None) -> _Subject:
        from jaxserve.build import ModelFiles, abstract_runner, fit, resolve_mesh

        cluster, config, files = _cluster(target), resolve_mesh(args), ModelFiles.find(args)
        fit(files.decoder, config)  # first of all: says with the model's numbers what does not fit
        mesh = _mesh(config, cluster)
        runner, limits = abstract_runner(args, files, mesh)
        blocks = _likely_blocks(args, runner, limits, cluster)
        limits = replace(limits, num_blocks=blocks)
        num_blocks = tuple(limits.blocks_of(window) for window in limits.windows)
        return cls(args, files, runner, limits, config, cluster, num_blocks)

    @property
    def weights(self) -> int:
        """Bytes of one device."""
        return _bytes(self.runner.params)

    @property
    def kv(self) -> int:
        """Bytes of one device's KV blocks in the programs that are compiled."""
        state = self.runner.abstract_state(self.num_blocks)
        return _bytes((state.keys, state.values))

    def layouts(self, tokens: int | None, decode: bool) -> list[BatchLayout]:
        config = self.runner.config
        kinds = [True] if decode else [True, False] if tokens is None else [False]
        largest = {True: config.decode_buckets[-1], False: config.token_buckets[-1]}
        for kind in kinds:
            if tokens is not None and tokens > largest[kind]:
                limit = "max_num_seqs" if kind else "max_num_batched_tokens"
                raise ValueError(f"--tokens {tokens}: steps of this kind have at most {limit}={largest[kind]} rows")
        return [config.layout(tokens or largest[kind], kind) for kind in kinds]

    def program(self, layout: BatchLayout) -> _Program:
        from sharding.audit import audit as read

        start = time.perf_counter()
        compiled, launches = self._compile(layout)
        found = read(compiled, self.runner.mesh)
        seconds = time.perf_counter() - start
        budget = self._budget(layout)
        name = self.runner.compiled[-1].program
        return _Program(name, seconds, found, budget, tuple(found.check(budget)), launches)

    def _compile(self, layout: BatchLayout) -> tuple[Any, Launches | None]:
        from sharding.aot import COMPILER_OPTIONS, not_cached
        from sharding.launches import OPTION, read_launches

        if self.cluster is None:
            return self.runner.step_program(layout, self.num_blocks), None
        with tempfile.TemporaryDirectory() as dump, not_cached():
            self.runner.compiler_options = {**COMPILER_OPTIONS, OPTION: dump}
            compiled = self.runner.step_program(layout, self.num_blocks)
            return compiled, read_launches(Path(dump))

    def _budget(self, layout: BatchLayout) -> Budget:
        from sharding.audit import Budget
        from sharding.cost_model import Group, Step

        dtype = str(self.runner.params[0].dtype)
        shape = model_shape(self.files.decoder, dtype, str(self.runner.config.kv_dtype)).fit_to(self.mesh)
        rows, seqs = layout.num_tokens, layout.num_seqs
        chunk = (Group(1, rows - seqs + 1),) if rows > seqs else ()
        step = Step((*chunk, Group(seqs - len(chunk), 1)))
        return Budget.of_step(shape, step, self.mesh, wide=self.cluster is None)

    def memory(self, programs: Sequence[_Program]) -> _Memory | None:
        """On a target, from what the programs need."""
        from jaxserve.build import GPU_RESERVE_BYTES, blocks_that_fit, kv_bytes, kv_bytes_on_gpu

        if self.cluster is None:
            return None
        step = max(p.audit.memory.total for p in programs if p.audit.memory is not None) - self.kv
        limit, share = self.cluster.gpu.memory_bytes, self.args.gpu_memory_utilization
        available = kv_bytes_on_gpu(limit, share, step)
        fits = kv_bytes(self.runner, replace(self.limits, num_blocks=2)) <= available
        blocks = blocks_that_fit(self.runner, self.limits, available) if fits else 1
        tokens = (blocks - 1) * self.limits.block_size
        return _Memory(
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


def _cluster(target: str | None) -> Cluster | None:
    from sharding.hardware import Cluster

    return None if target is None else Cluster.parse(target)


def _mesh(config: MeshConfig, cluster: Cluster | None) -> jax.sharding.Mesh:
    from jaxserve.build import open_mesh
    from sharding import build_mesh
    from sharding.aot import devices

    if cluster is None:
        return open_mesh(config)
    if config.num_devices > cluster.num_gpus:
        raise ValueError(f"mesh {config} needs {config.num_devices} GPUs, the target has {cluster.num_gpus}")
    return build_mesh(config, devices(cluster))


def _likely_blocks(args: EngineArgs, runner: ModelRunner, limits: SchedulerConfig, cluster: Cluster | None) -> int:
    """Half of what fits if the step needs little beside weights: programs of another number of blocks are alike, and
    XLA would spend its time on saving memory where their arguments alone fill most of a GPU."""
    from jaxserve.build import CPU_KV_BYTES, blocks_that_fit, kv_bytes_on_gpu

    available = CPU_KV_BYTES // runner.mesh.size
    if cluster is not None:
        available = kv_bytes_on_gpu(cluster.gpu.memory_bytes, args.gpu_memory_utilization, _bytes(runner.params)) // 2
    return max(2, blocks_that_fit(runner, limits, available))


def _bytes(arrays: Any) -> int:
    from jaxserve.device_state import bytes_per_device

    return bytes_per_device(arrays)


# -- output ------------------------------------------------------------------------------------------------------------


def _report(subject: _Subject, programs: Sequence[_Program], memory: _Memory | None) -> dict[str, Any]:
    return {
        "model": subject.files.directory.name,
        "mesh": axes_of(subject.mesh),
        "target": None if subject.cluster is None else str(subject.cluster),
        "attention": subject.runner.attention.name,
        "num_blocks": subject.num_blocks,
        "weight_bytes": subject.weights,
        "programs": [
            {
                "name": p.name,
                "seconds": p.seconds,
                **p.audit.to_json(p.budget.num_layers),
                "broken": p.broken,
                "launches": p.launches,
            }
            for p in programs
        ],
        "memory": None if memory is None else asdict(memory) | {"fits": memory.fits},
    }


def _print(subject: _Subject, programs: Sequence[_Program], memory: _Memory | None) -> None:
    devices = f"{subject.mesh.num_devices} simulated CPU devices" if subject.cluster is None else str(subject.cluster)
    name = subject.runner.attention.name
    print_pairs(
        f"{subject.files.directory.name} on {devices}, {mesh_text(subject.mesh)}",
        {
            "weights": f"{bytes_text(subject.weights)} per device in {subject.runner.params[0].dtype}",
            "attention": f"{name} ({PLAIN})" if name == "reference" else name,
            "compiled": "; ".join(f"{p.name} in {seconds_text(p.seconds)}" for p in programs),
        },
    )
    for program in programs:
        _print_program(program)
    _print_memory(subject, programs, memory)


def _print_program(program: _Program) -> None:
    rows = [_row(c, count, program.budget.num_layers) for c, count in program.audit.groups()]
    typer.echo(program.name)
    if rows:
        print_table(["collective", "over", "where", "count", "bytes each", "in all"], rows)
    else:
        typer.echo("  no collective")
    if program.broken:
        for line in program.broken[:MOST_BROKEN]:
            typer.echo(f"  BROKEN: {line}")
        if len(program.broken) > MOST_BROKEN:
            typer.echo(f"  BROKEN: {len(program.broken) - MOST_BROKEN} more")
    else:
        typer.echo("  as budgeted: no other collective, these bytes; all state updated in place, no KV block copied")
    if program.launches is not None:
        typer.echo(f"  {program.launches}")
    typer.echo("")


def _row(c: Collective, count: int, num_layers: int) -> list[str]:
    from sharding.audit import LAYER_PARTS

    notes = ["in a loop"] * c.in_loop + ["may not run"] * c.in_branch
    where = c.part + (f" ({', '.join(notes)})" if notes else "")
    layers = c.part in LAYER_PARTS and count % num_layers == 0
    times = f"{count // num_layers} per layer" if layers else str(count)
    return [c.op, ",".join(c.axes) or "-", where, times, bytes_text(c.num_bytes), bytes_text(count * c.num_bytes)]


def _print_memory(subject: _Subject, programs: Sequence[_Program], memory: _Memory | None) -> None:
    weights, kv = subject.weights, subject.kv
    rows = [
        [p.name, *map(bytes_text, (weights, m.arguments - weights - kv, m.temporaries, m.total - kv))]
        for p in programs
        if (m := p.audit.memory) is not None
    ]
    header = ["one device, without KV", "weights", "state", "temporaries", "in all"]
    print_table(header, rows)
    if memory is None:
        return
    tokens = f"{count_text(memory.tokens_per_replica)} tokens per replica, {count_text(memory.tokens)} in all"
    verdict = "fits" if memory.fits else f"DOES NOT FIT: no room for one sequence of {memory.longest} tokens"
    typer.echo(
        f"{verdict}; of {bytes_text(memory.limit)} per GPU {bytes_text(memory.usable)} usable, "
        f"{bytes_text(memory.step)} for the step, {bytes_text(memory.reserve)} kept;"
    )
    typer.echo(f"{bytes_text(memory.kv)} of KV blocks: {tokens}")
