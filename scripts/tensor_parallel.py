"""Does tensor parallelism divide a model as it should? The same model over 1, 2, 4 devices, loaded one after the other.

Each size answers the same prompts, which must give the same tokens; what its devices hold is counted from the arrays'
shards, and must be equal; and the collectives are read out of the compiled steps that just served, and held against
what the cost model expects.

    python scripts/tensor_parallel.py --out report
    python scripts/tensor_parallel.py --model path/to/checkpoint -tp 8 -dp 1 --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Annotated, Any

import typer

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import bytes_text, progress, seconds_text
from jaxserve.evaluation.command import begin, engine_options, finish
from jaxserve.evaluation.engines import mesh_of, on_mesh, open_llm, reserve_devices
from jaxserve.evaluation.flags import PredictionFlags, ReportFlags
from jaxserve.evaluation.mesh_runs import (
    TOLERANCE,
    MeshRun,
    answers_figure,
    as_budgeted,
    collective_figures,
    collective_table,
    even_memory,
    fullest,
    load_figure,
    memory_figures,
    random_calls,
    same_tokens,
    sizes_up_to,
    uneven,
)
from jaxserve.evaluation.plots import Plot, Theme, bars
from jaxserve.evaluation.predictions import predict, prediction_table
from jaxserve.evaluation.result import Check, Result, Table
from jaxserve.evaluation.same_tokens import offline_batch
from sharding.mesh import MeshConfig
from sharding.planner import Workload

QUESTION = "Does tensor parallelism divide the model evenly, and give the same tokens?"
PROMPT_LENGTHS = (5, 20, 40, 70, 100)
MIB = 1 << 20
DEFAULTS = EngineFlags(tensor_parallel_size=4, dtype="float32")


@epilog("python scripts/tensor_parallel.py", "python scripts/tensor_parallel.py -tp 8 --out report --json")
def tensor_parallel(
    report: ReportFlags,
    prediction: PredictionFlags,
    engine: EngineFlags = DEFAULTS,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16,
) -> None:
    """Load a model with tp 1, 2, 4, ... up to -tp: same tokens, equal memory per device, collectives as expected.

    Other mesh axes stay as given. Exit code 1 if tokens, memory or collectives are not as they should be. Tokens are
    compared in float32 unless told otherwise: in less, other sums of the same numbers may tip a choice.
    """
    options = engine_options(engine, max_num_seqs=8, max_num_batched_tokens=128, num_gpu_blocks_override=128)
    options |= {"decode_buckets": (options["max_num_seqs"],), "token_buckets": (options["max_num_batched_tokens"],)}
    largest = mesh_of(options)
    reserve_devices(largest.num_devices)
    result = begin("tensor_parallel", QUESTION, options, engine.seed, largest.sizes)
    runs = [_run(options, replace(largest, tp=tp), max_tokens) for tp in progress("sizes", sizes_up_to(largest.tp))]
    workload = Workload(round(mean(PROMPT_LENGTHS)), max_tokens, concurrency=len(PROMPT_LENGTHS))
    predictions = [predict(options, prediction.gpu, workload, run.mesh) for run in runs]
    result.checks += [same_tokens(runs), *(c for r in runs for c in even_memory(r)), _divided(runs), as_budgeted(runs)]
    for run, predicted in zip(runs, predictions, strict=True):
        result.figures += [answers_figure(run, runs[0])] if run is not runs[0] else []
        result.figures += [*memory_figures(run), load_figure(run, result.simulated), *collective_figures(run)]
        result.figures += predicted.figures(f"{run.name}: ")
    result.tables += [_table(runs), collective_table(runs), prediction_table(prediction.gpu, predictions)]
    result.samples = {r.name: {"weights": r.weights, "kv": r.kv, "tokens": r.tokens} for r in runs}
    finish(result, _plots(runs, result), report)


def _run(options: dict[str, Any], mesh: MeshConfig, max_tokens: int) -> MeshRun:
    loaded = open_llm(on_mesh(options, mesh))
    room = loaded.llm.engine.scheduler.config.max_model_len - max_tokens
    lengths = [min(length, room) for length in PROMPT_LENGTHS]
    _, tokens = offline_batch(loaded.llm, random_calls(loaded.llm, lengths, max_tokens, options["seed"]))
    return MeshRun.of(f"tp={mesh.tp}", loaded, mesh, tokens)


def _divided(runs: Sequence[MeshRun]) -> Check:
    """Weights are divided by tp, but for what every rank has whole (norms) and what was filled up: between half and
    twice what division alone would give."""
    first = max(runs[0].weights.values())
    wrong = [r for r in runs if not 0.5 < max(r.weights.values()) * r.mesh.tp / first < 2]
    seen = ", ".join(f"{r.name} {max(r.weights.values()) / first:.0%}" for r in runs)
    names = tuple(fullest(run, "weights") for run in wrong)
    return Check("more ranks, fewer weights on each", not wrong, f"of those of one rank: {seen}", names)


def _table(runs: Sequence[MeshRun]) -> Table:
    bad = [i for i, r in enumerate(runs) if uneven(r.weights) or uneven(r.kv)]
    rows = [
        (
            r.name,
            str(r.mesh.num_devices),
            bytes_text(max(r.weights.values())),
            bytes_text(max(r.kv.values())),
            seconds_text(r.load_seconds),
            ", ".join(f"{count:g}" for count in r.collectives.values()),
        )
        for r in runs
    ]
    header = ("size", "devices", "weights each", "KV each", "load", "collectives per layer")
    return Table("Sizes", header, rows, bad)


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(runs: Sequence[MeshRun], result: Result) -> list[Plot]:
    simulated = " (simulated)" if result.simulated else ""

    def draw_memory(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        devices = [(run, device) for run in runs for device in sorted(run.weights)]
        labels = [f"{i}" for run in runs for i, _ in enumerate(run.weights)]
        groups = {
            "weights": [run.weights[device] / MIB for run, device in devices],
            "KV blocks": [run.kv[device] / MIB for run, device in devices],
        }
        odd = {
            (name, i)
            for i, (run, device) in enumerate(devices)
            for name, held in (("weights", run.weights), ("KV blocks", run.kv))
            if device in uneven(held)
        }
        bars(panel, theme, labels, groups, lambda name, i: (name, i) in odd, stacked=True)
        panel.set(ylabel="MiB", xlabel="device")
        start = 0
        for run in runs:
            middle = start + (len(run.weights) - 1) / 2
            panel.annotate(run.name, (middle, 1), xycoords=("data", "axes fraction"), ha="center", va="top", size=8.5)
            panel.axvline(start - 0.5, color=theme.grid)
            start += len(run.weights)

    def draw_load(axes: Sequence[Any], theme: Theme) -> None:
        time, layers = axes
        names = [run.name for run in runs]
        bars(time, theme, names, {"load": [run.load_seconds for run in runs]})
        time.set(ylabel="seconds", title="Load time" + simulated)
        steps = list(runs[0].collectives)
        groups = {step: [list(run.collectives.values())[k] for run in runs] for k, step in enumerate(steps)}
        broken = {(steps[k], i) for i, run in enumerate(runs) for k, p in enumerate(run.programs) if p.broken}
        bars(layers, theme, names, groups, lambda name, i: (name, i) in broken)
        layers.set(ylabel="per layer", title="Collectives in the layers")

    return [
        Plot(
            "memory",
            "What each device holds",
            "Weights and KV blocks of every device, counted from the shards that lie on it. A device off the median by "
            f"more than {TOLERANCE:.0%} is red.",
            draw_memory,
        ),
        Plot(
            "load",
            "Load time and collectives",
            "Load time is wall clock, once. Collectives are read from the compiled steps; red where they are not "
            "those of the cost model.",
            draw_load,
            panels=2,
        ),
    ]


def main() -> None:
    run_script(tensor_parallel)


if __name__ == "__main__":
    main()
