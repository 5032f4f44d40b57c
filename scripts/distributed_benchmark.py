"""Is this mesh worth its devices, and is it right? One mesh against one device, in one report.

Both serve the same requests: as one batch, as a batch that grows with the devices, and from concurrent clients. What
the mesh serves is held against a plain forward of the checkpoint; what its devices hold, what its steps communicate
and how its pipeline stages keep pace is checked; and the speed-up stands beside what the cost model predicts.

    python scripts/distributed_benchmark.py -tp 2 -pp 2 --out report
    python scripts/distributed_benchmark.py -m path/to/checkpoint -tp 8 --dtype bfloat16 --input-len 1024 --gpu h200
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from jaxserve import AsyncLLM, RequestOutput
from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import progress, seconds_text
from jaxserve.engine_args import EngineArgs
from jaxserve.evaluation.agreement import compare_logprobs, forwards, other_choices, sequence_of, serve
from jaxserve.evaluation.agreement_report import agreement_checks, agreement_figures, choice_table, logprob_plot
from jaxserve.evaluation.clients import Answer, closed_loop
from jaxserve.evaluation.clients import Load as Answers
from jaxserve.evaluation.command import begin, engine_options, finish
from jaxserve.evaluation.engines import mesh_of, open_llm, random_prompts, reserve_devices
from jaxserve.evaluation.flags import Load, PredictionFlags, ReportFlags, ScalingFlags
from jaxserve.evaluation.latencies import draw_latencies, latency_figures
from jaxserve.evaluation.mesh_runs import even_memory, load_figure, memory_figures, random_calls
from jaxserve.evaluation.plots import Plot
from jaxserve.evaluation.predictions import Prediction, predict
from jaxserve.evaluation.reference import PlainModel
from jaxserve.evaluation.result import Figure, Result, Table
from jaxserve.evaluation.same_tokens import Difference, differences, offline_batch, token_check
from jaxserve.evaluation.scaling_report import fill
from jaxserve.evaluation.scaling_runs import Place, ScaleRun, check_places, measure_on, sized
from sharding.mesh import MeshConfig
from sharding.planner import Workload

QUESTION = "What does this mesh bring beside one device, and is it right?"
DEFAULTS = EngineFlags(dtype="float32", skip_tokenizer_init=True)
MESH = "pp=2,tp=2"
"""Where none is given."""
VERIFIED_LENGTHS = (5, 21, 40)
"""Tokens of the prompts that are held against the plain forward: one KV block, and more."""


@dataclass(frozen=True)
class Measured:
    """One mesh."""

    scale: ScaleRun
    served: list[RequestOutput]
    """To the prompts that are held against the plain forward."""
    args: EngineArgs
    dtype: Any
    answers: list[Answers]
    """Of each run of the concurrent clients."""
    differences: list[Difference]
    predicted: Prediction
    """For as many requests at once as there are clients."""

    @property
    def load_name(self) -> str:
        return f"{self.scale.name}, concurrent"

    @property
    def all_answers(self) -> list[Answer]:
        return [answer for run in self.answers for answer in run.answers]

    @property
    def rates(self) -> list[float]:
        """Output tokens per second of each run."""
        return [sum(len(a.tokens) for a in run.answers) / run.seconds for run in self.answers]


@epilog(
    "python scripts/distributed_benchmark.py",
    "python scripts/distributed_benchmark.py --mesh dp=2,tp=2 --requests 16 --out report",
    "python scripts/distributed_benchmark.py -m DIR -tp 8 --dtype bfloat16 --input-len 1024 --gpu h200",
)
def distributed_benchmark(
    report: ReportFlags,
    prediction: PredictionFlags,
    asked: ScalingFlags,
    engine: EngineFlags = DEFAULTS,
    clients: Annotated[int, typer.Option(min=1, help="Who ask again when they have their answer.")] = 8,
) -> None:
    """One mesh (pp=2,tp=2 unless given) against one device: right, even, how much faster, what concurrent callers get.

    Exit code 1 if log-probabilities or tokens are not the checkpoint's and one device's, if devices hold unequal
    shares, if collectives are not those expected, or a pipeline stage is slower than the others.
    """
    options = engine_options(engine)
    if mesh_of(options).num_devices == 1:
        options["mesh"] = MESH
    mesh = mesh_of(options)
    reserve_devices(mesh.num_devices)
    load = asked.load(engine.seed)
    found, impossible = check_places(options, places(mesh), load, mesh.num_devices)
    if impossible:
        raise ValueError(impossible[0].reason)
    result = begin("distributed_benchmark", QUESTION, options, engine.seed, mesh.sizes)
    limits = asked.limits(result.simulated)
    runs: list[Measured] = []
    for place in progress("meshes", found):
        runs.append(_measure(options, place, load, clients, prediction.gpu, runs[0].scale if runs else None))
        gc.collect()  # of the engine: see scaling_runs.measure
    plots = fill(result, [run.scale for run in runs], [], limits, prediction.gpu)
    finish(result, [*_fill(result, runs), *plots, *_agree(result, runs[-1])], report)


def places(mesh: MeshConfig) -> list[Place]:
    """One device, and the mesh as so many times that."""
    return [Place("", 1, MeshConfig()), Place(mesh.short, mesh.num_devices, mesh)]


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(
    options: dict[str, Any], place: Place, load: Load, num_clients: int, gpu: str, first: ScaleRun | None
) -> Measured:
    options = sized(options, place, load)
    loaded = open_llm(options)
    llm, room = loaded.llm, loaded.llm.engine.scheduler.config.max_model_len - load.output_len
    scale = measure_on(loaded, place, load, gpu, first)
    lengths = [min(length, room) for length in VERIFIED_LENGTHS]
    prompts = random_prompts(llm.engine.runner.decoder.vocab_size, lengths, load.seed)
    served = serve(llm, prompts, load.output_len)
    calls = random_calls(llm, [load.input_len] * 3 * num_clients, load.output_len, load.seed)
    _, tokens = offline_batch(llm, calls)

    async def run() -> list[Answers]:
        async with AsyncLLM.from_engine(llm.engine) as engine:
            runs = []
            for _ in range(1 + load.repeats):
                await engine.reset_prefix_cache()
                runs.append(await closed_loop(engine, calls, num_clients, lambda: None))
            return runs[1:]  # the first one warms up

    answers = asyncio.run(run())
    workload = Workload(load.input_len, load.output_len, concurrency=num_clients)
    measured = Measured(
        scale,
        served,
        llm.args,
        llm.engine.runner.params[0].dtype,
        answers,
        [],
        predict(options, gpu, workload),
    )
    measured.differences.extend(differences(llm, calls, tokens, {measured.load_name: answers}))
    return measured


# -- figures -----------------------------------------------------------------------------------------------------------


def _fill(result: Result, runs: Sequence[Measured]) -> list[Plot]:
    """What is beside scaling: memory, load time, concurrent clients."""
    for run in runs:
        result.figures += [load_figure(run.scale.run, result.simulated), *memory_figures(run.scale.run)]
        result.checks += even_memory(run.scale.run)
        several = result.simulated and run.scale.place.mesh.num_devices > 1
        result.figures.append(_rate_figure(run, several))
        result.figures += latency_figures(run.load_name, run.all_answers, ("median", "p99"), len(run.answers), several)
        result.figures += run.predicted.figures(f"{run.scale.name}: ")
    compared = sum(len(run.all_answers) for run in runs)
    result.checks.append(token_check([d for run in runs for d in run.differences], compared, OUTPUT))
    result.tables.insert(0, _table(runs, result.simulated))
    result.samples["concurrent"] = {run.scale.name: [load.to_json() for load in run.answers] for run in runs}
    return [_latency_plot(runs, result.simulated)]


OUTPUT = "{load}: output"


def _rate_figure(run: Measured, simulated: bool) -> Figure:
    how = f"output tokens from the first call to the last token; median of {len(run.answers)} runs"
    rates = [[rate] for rate in run.rates]
    name = OUTPUT.format(load=run.load_name)
    return Figure.of(name, rates, "median", "tok/s", how, better="higher", simulated=simulated)


def _table(runs: Sequence[Measured], simulated: bool) -> Table:
    rows = []
    for run in runs:
        answers = run.all_answers
        seen = [[a.first for a in answers], [g for a in answers for g in a.gaps], [a.whole for a in answers]]
        waits = [seconds_text(float(np.median(values))) for values in seen]
        rows.append([run.scale.name, f"{float(np.median(run.rates)):,.0f} tok/s", *waits])
    title = "Concurrent clients" + (", simulated" if simulated else "")
    return Table(title, ("mesh", "output", "first token", "between tokens", "whole answer"), rows)


def _latency_plot(runs: Sequence[Measured], simulated: bool) -> Plot:
    def draw(axes: Sequence[Any], theme: Any) -> None:
        draw_latencies(axes, theme, {run.scale.name: run.all_answers for run in runs})

    return Plot(
        "latency",
        "Latency of concurrent clients" + (" (simulated)" if simulated else ""),
        "Share of all requests (or gaps between tokens) that took at most so long, as the clients saw it.",
        draw,
        panels=3,
    )


def _agree(result: Result, run: Measured) -> list[Plot]:
    """What the mesh served, against the plain forward."""
    plain = PlainModel.load(run.args, max(len(sequence_of(o)) for o in run.served))
    exact, rounded = (
        forwards(model, run.served) for model in progress("plain forwards", [plain, plain.rounded(run.dtype)])
    )
    logprobs, choices = compare_logprobs(run.served, exact, rounded), other_choices(run.served, exact)
    result.figures += agreement_figures(logprobs, choices)
    result.checks += agreement_checks(logprobs, choices)
    result.tables += choice_table(choices)
    result.samples["logprobs"] = logprobs.to_json()
    return [logprob_plot(logprobs)]


def main() -> None:
    run_script(distributed_benchmark)


if __name__ == "__main__":
    main()
