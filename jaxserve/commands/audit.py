"""``jaxserve audit``: what the compiled step does on a mesh, of devices that need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.command import epilog
from jaxserve.cli.options import Json, StepFlags
from jaxserve.cli.output import bytes_text, count_text, print_json, print_pairs, print_table, progress, seconds_text

if TYPE_CHECKING:
    from jaxserve.dry_run import DryRun, Memory, Program
    from sharding.audit import Collective

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
    engine: StepFlags,
    target: Annotated[
        str | None, typer.Option(metavar="GPUS", help='Like "h200:8"; none = simulated CPU devices.')
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
    from jaxserve.dry_run import DryRun
    from sharding.hardware import Cluster

    run = DryRun.of(engine.engine_args(), None if target is None else Cluster.parse(target))
    programs = [run.program(layout) for layout in progress("compiling", run.layouts(tokens, decode))]
    memory = run.memory(programs)
    if as_json:
        print_json(_report(run, programs, memory))
    else:
        _print(run, programs, memory)
    if any(p.broken for p in programs) or (memory is not None and not memory.fits):
        raise typer.Exit(1)


# -- output ------------------------------------------------------------------------------------------------------------


def _report(run: DryRun, programs: Sequence[Program], memory: Memory | None) -> dict[str, Any]:
    return {
        "model": run.files.name,
        "mesh": run.mesh.sizes,
        "target": None if run.cluster is None else str(run.cluster),
        "attention": run.runner.kernels.attention.name,
        "matmul": run.runner.kernels.matmul.name,
        "num_blocks": run.num_blocks,
        "weight_bytes": run.weights,
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


def _print(run: DryRun, programs: Sequence[Program], memory: Memory | None) -> None:
    devices = f"{run.mesh.num_devices} simulated CPU devices" if run.cluster is None else str(run.cluster)
    name = run.runner.kernels.attention.name
    print_pairs(
        f"{run.files.name} on {devices}, {run.mesh.short}",
        {
            "weights": f"{bytes_text(run.weights)} per device in {run.runner.params[0].dtype}",
            "attention": f"{name} ({PLAIN})" if name == "reference" else name,
            "products": run.runner.kernels.matmul.name,
            "compiled": "; ".join(f"{p.name} in {seconds_text(p.seconds)}" for p in programs),
        },
    )
    for program in programs:
        _print_program(program, bool(run.mesh.rules))
    _print_memory(run, programs, memory)


def _print_program(program: Program, own_rules: bool) -> None:
    rows = [_row(c, count, program.budget.num_layers) for c, count in program.audit.groups()]
    typer.echo(program.name)
    if rows:
        print_table(["collective", "over", "where", "count", "bytes each", "in all"], rows)
    else:
        typer.echo("  no collective")
    if own_rules:
        typer.echo("  not held against a budget: the mesh file has rules of its own")
    elif program.broken:
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


def _print_memory(run: DryRun, programs: Sequence[Program], memory: Memory | None) -> None:
    weights, kv = run.weights, run.kv
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
