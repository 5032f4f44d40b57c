"""What do many callers get from one engine, and does each get a fair part? asyncio clients against ``AsyncLLM``.

The same requests run as one offline batch, then from clients: in a closed loop (each asks again when it has its
answer), and in open loops (arrivals that wait for nobody, Poisson or in bursts). Tokens must be the batch's, whoever
asks when.
Fairness is Jain's index over the share of the speed that requests would have had alone, by tenant and by size.

    python scripts/concurrent_requests.py --out report
    python scripts/concurrent_requests.py --load closed:32 --load poisson:20 --load burst:16@1 --requests 200
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import typer
from bench_workload import Machine
from tqdm import tqdm

from jaxserve import LLM, AsyncLLM
from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import seconds_text, watched
from jaxserve.evaluation.clients import Call, Load, alone, closed_loop, fairness, open_loop, speeds
from jaxserve.evaluation.command import begin, engine_options, finish
from jaxserve.evaluation.engines import mesh_of, open_llm, random_prompts, reserve_devices
from jaxserve.evaluation.flags import PredictionFlags, ReportFlags
from jaxserve.evaluation.latencies import draw_latencies, latencies, latency_figures
from jaxserve.evaluation.plots import Plot, Theme, bars, limit_line
from jaxserve.evaluation.predictions import predict, prediction_table
from jaxserve.evaluation.result import Check, Figure, Result, Table
from jaxserve.evaluation.same_tokens import Difference, differences, offline_batch, token_check, wrong
from jaxserve.evaluation.statistics import statistic
from jaxserve.evaluation.traces import arrival_times
from sharding.planner import Workload

QUESTION = "What do concurrent callers get, and does each get a fair part?"
SIZES = {"short": (8, 8), "medium": (32, 16), "long": (96, 32)}
"""Tokens of prompt and answer."""
LOADS = ("closed:8", "poisson:70%")
OFFLINE = "offline batch"


@dataclass(frozen=True)
class Measured:
    """Everything that ran: per kind of load the runs, the seconds of each offline batch, and of calls alone."""

    calls: list[Call]
    tokens: list[list[int]]
    """Of the offline batch."""
    offline: list[float]
    alone: dict[str, float]
    loads: dict[str, list[Load]]

    differences: list[Difference] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    def shares(self, name: str) -> dict[str, dict[str, float]]:
        """By tenant and by size."""
        loads = self.loads[name]
        by_size = speeds(loads, self.calls, self.alone, lambda call: call.size)
        return {
            "tenants": speeds(loads, self.calls, self.alone, lambda call: call.tenant),
            "sizes": {size: by_size[size] for size in SIZES if size in by_size},
        }


@epilog(
    "python scripts/concurrent_requests.py",
    "python scripts/concurrent_requests.py --load closed:16 --load burst:8@0.5 --tenants 4 -tp 2",
)
def concurrent_requests(
    engine: EngineFlags,
    prediction: PredictionFlags,
    report: ReportFlags,
    load: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="closed:CLIENTS, poisson:RATE, burst:N@PERIOD or uniform:RATE; RATE per second, or N% of the offline "
            "batch's. May be repeated; none = closed:8 and poisson:70%.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="In each run: a third each short, medium and long.")] = 36,
    tenants: Annotated[int, typer.Option(min=1, help="Who ask in turn.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each load.")] = 3,
    least_fairness: Annotated[float, typer.Option(help="Of Jain's index over tenants; less fails.")] = 0.9,
) -> None:
    """Latency, throughput and fairness of concurrent requests, beside one offline batch of the same.

    Exit code 1 if a request's tokens are not those of the batch, or tenants are not served alike.
    """
    options = engine_options(engine, max_num_seqs=16, max_num_batched_tokens=128) | {"skip_tokenizer_init": True}
    mesh = mesh_of(options)
    reserve_devices(mesh.num_devices)
    result = begin("concurrent_requests", QUESTION, options, engine.seed, mesh.sizes)
    kinds = list(dict.fromkeys(load or LOADS))
    for kind in kinds:
        _times(kind, 1.0, 1, 1, engine.seed)  # says what is wrong before anything is loaded
    llm, machine = open_llm(options).llm, Machine()
    calls = _calls(llm, requests, tenants, engine.seed)
    found = _measure(llm, calls, kinds, repeats, engine.seed)
    _fill(result, found, least_fairness)
    _predict(result, found, options, prediction.gpu)
    result.samples = {
        "other_cores": machine.other_cores(),
        "alone_seconds": found.alone,
        "differences": [asdict(d) for d in found.differences],
        "loads": {name: [run.to_json() for run in runs] for name, runs in found.loads.items()},
    }
    finish(result, _plots(found, result, least_fairness), report)


def _calls(llm: LLM, count: int, tenants: int, seed: int) -> list[Call]:
    """Sizes and tenants in an order drawn once; every tenant asks for the same mix."""
    limit = llm.engine.scheduler.config.max_model_len
    longest = max(sum(lengths) for lengths in SIZES.values())
    if longest > limit:
        raise ValueError(f"requests are up to {longest} tokens, the longest sequence is {limit}")
    sizes = [list(SIZES)[i // tenants % len(SIZES)] for i in range(count)]
    order = np.random.default_rng([seed, 1]).permutation(count)
    prompts = random_prompts(llm.engine.runner.decoder.vocab_size, [SIZES[s][0] for s in sizes], seed)
    return [Call(prompts[i], SIZES[sizes[i]][1], f"tenant {i % tenants}", sizes[i]) for i in order]


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measure(llm: LLM, calls: list[Call], kinds: Sequence[str], repeats: int, seed: int) -> Measured:
    batches = [offline_batch(llm, calls) for _ in range(1 + repeats)][1:]  # the first one warms up
    rate = len(calls) / float(np.median([seconds for seconds, _ in batches]))
    times = {kind: _times(kind, rate, len(calls), repeats, seed) for kind in kinds}
    measured = Measured(calls, batches[0][1], [seconds for seconds, _ in batches], {}, {kind: [] for kind in kinds})

    async def run() -> None:
        async with AsyncLLM.from_engine(llm.engine) as clients:
            for size in SIZES:
                call = next((c for c in calls if c.size == size), None)
                if call is not None:
                    measured.alone[size] = await alone(clients, call, 3)
            with tqdm(total=len(kinds) * repeats * len(calls), desc="requests", disable=not watched()) as bar:
                for kind in kinds:
                    for i in range(repeats):
                        await clients.reset_prefix_cache()
                        arrivals = times[kind]
                        measured.loads[kind].append(
                            await closed_loop(clients, calls, _num_clients(kind), bar.update)
                            if arrivals is None
                            else await open_loop(clients, calls, arrivals[i].tolist(), bar.update)
                        )

    asyncio.run(run())
    measured.differences.extend(differences(llm, calls, measured.tokens, measured.loads))
    return measured


def _num_clients(kind: str) -> int:
    count = kind.removeprefix("closed:")
    if not count.isdigit() or int(count) < 1:
        raise ValueError(f"--load {kind}: it is closed:CLIENTS, at least one")
    return int(count)


def _times(kind: str, rate: float, count: int, repeats: int, seed: int) -> list[np.ndarray] | None:
    """Of each run's arrivals; None for a closed loop. ``rate``: of the offline batch."""
    if kind.startswith("closed"):
        _num_clients(kind)
        return None
    name, _, text = kind.partition(":")
    if text.endswith("%"):
        share = text[:-1]
        if not share.replace(".", "", 1).isdigit():
            raise ValueError(f"--load {kind}: it is a share like {name}:70%")
        text = f"{rate * float(share) / 100:.6f}"
    try:
        draw = arrival_times(f"{name}:{text}")
    except ValueError:
        kinds = "closed:CLIENTS, poisson:RATE, uniform:RATE (per second or like 70%), burst:N@PERIOD"
        raise ValueError(f"--load {kind}: it is one of {kinds}") from None
    return [draw(np.random.default_rng([seed, 2, i]), count) for i in range(repeats)]


# -- figures -----------------------------------------------------------------------------------------------------------


def _fill(result: Result, found: Measured, least: float) -> None:
    total, several = found.num_tokens, result.simulated
    offline = [[total / seconds] for seconds in found.offline]
    how = f"output tokens over wall clock, {len(found.calls)} requests at once; median of {len(offline)} runs"
    result.figures.append(
        Figure.of(f"{OFFLINE}: throughput", offline, "median", "tok/s", how, better="higher", simulated=several)
    )
    for name, loads in found.loads.items():
        result.figures += _load_figures(name, loads, total, several)
        for what, shares in found.shares(name).items():
            note = f"Jain's index over {len(shares)} {what} of the mean share of the speed that they would have alone"
            result.figures.append(Figure(_fair(name, what), fairness(shares), "", note, better="higher"))
        result.checks.append(_fair_check(name, found.shares(name)["tenants"], least))
    compared = sum(len(load.answers) for loads in found.loads.values() for load in loads)
    result.checks.insert(0, token_check(found.differences, compared, _throughput("{load}")))
    result.tables.append(_table(found))


def _fair(load: str, what: str) -> str:
    return f"{load}: fairness over {what}"


def _throughput(load: str) -> str:
    return f"{load}: throughput"


def _fair_check(name: str, shares: dict[str, float], least: float) -> Check:
    index = fairness(shares)
    worst = min(shares, key=lambda tenant: shares[tenant])
    detail = f"Jain's index {index:.3f}, at least {least:g} wanted; {worst} has {shares[worst]:.0%} of its own speed"
    return Check(f"{name}: tenants are served alike", index >= least, detail, (_fair(name, "tenants"),))


def _load_figures(name: str, loads: Sequence[Load], total: int, simulated: bool) -> list[Figure]:
    answers = [a for load in loads for a in load.answers]
    rate = [[total / load.seconds] for load in loads]
    how = f"output tokens from the first call to the last token; median of {len(loads)} runs"
    return [
        Figure.of(_throughput(name), rate, "median", "tok/s", how, better="higher", simulated=simulated),
        *latency_figures(name, answers, ("median", "p90", "p99"), len(loads), simulated),
    ]


def _table(found: Measured) -> Table:
    rows: list[Sequence[str]] = [
        (OFFLINE, f"{found.num_tokens / float(np.median(found.offline)):,.0f} tok/s", "", "", "", "", "")
    ]
    for name, loads in found.loads.items():
        answers = [a for load in loads for a in load.answers]
        kinds = latencies(answers).values()
        seen = [" / ".join(seconds_text(statistic(of, groups)) for of in ("median", "p99")) for groups in kinds]
        rate = found.num_tokens / float(np.median([load.seconds for load in loads]))
        indices = [f"{fairness(shares):.3f}" for shares in found.shares(name).values()]
        rows.append((name, f"{rate:,.0f} tok/s", *seen, *indices))
    header = ("load", "output", "first token p50 / p99", "between p50 / p99", "answer p50 / p99", "tenants", "sizes")
    return Table("Loads", header, rows)


def _predict(result: Result, found: Measured, options: dict[str, Any], gpu: str) -> None:
    """The same loads on GPUs, as if their requests were all of the mean size."""
    predictions = {name: predict(options, gpu, _workload(found, name)) for name in found.loads}
    for name, prediction in predictions.items():
        result.figures += prediction.figures(f"{name}: ")
    table = prediction_table(gpu, [*predictions.values()])
    rows = [(name, *row) for name, row in zip(predictions, table.rows, strict=True)]
    result.tables.append(Table(table.title, ("load", *table.header), rows))


def _workload(found: Measured, name: str) -> Workload:
    """Of a closed loop, as many at once as it has clients; of an open one, the rate at which they were due."""
    lengths = [(len(call.prompt), call.num_tokens) for call in found.calls]
    prompt, answer = (max(1, round(float(mean))) for mean in np.mean(lengths, axis=0))
    if name.startswith("closed"):
        return Workload(prompt, answer, concurrency=_num_clients(name))
    seconds = float(np.mean([max(a.due for a in load.answers) for load in found.loads[name]]))
    if not seconds:
        return Workload(prompt, answer, concurrency=len(found.calls))
    return Workload(prompt, answer, rate=len(found.calls) / seconds)


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(found: Measured, result: Result, least: float) -> list[Plot]:
    simulated = " (simulated)" if result.simulated else ""
    names = list(found.loads)

    def draw_latency(axes: Sequence[Any], theme: Theme) -> None:
        draw_latencies(
            axes, theme, {name: [a for load in of for a in load.answers] for name, of in found.loads.items()}
        )

    def draw_throughput(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        rates = [found.offline, *([load.seconds for load in found.loads[name]] for name in names)]
        values = [found.num_tokens / float(np.median(seconds)) for seconds in rates]
        bad = {1 + names.index(name) for name in {d.load for d in wrong(found.differences)}}
        bars(panel, theme, [OFFLINE, *names], {"output": values}, lambda _, i: i in bad)
        panel.set(ylabel="output tokens per second")

    def draw_fairness(axes: Sequence[Any], theme: Theme) -> None:
        for panel, what in zip(axes, ("tenants", "sizes"), strict=True):
            shares = [found.shares(name)[what] for name in names]
            groups = {key: [s[key] for s in shares] for key in shares[0]}
            unfair = {i for i, s in enumerate(shares) if what == "tenants" and fairness(s) < least}
            bars(panel, theme, names, groups, lambda _, i, unfair=unfair: i in unfair)
            limit_line(panel, theme, 1.0, "as if alone")
            panel.set_ylim(top=max(1.1, panel.get_ylim()[1]))
            panel.set_title(f"by {what}: " + ", ".join(f"{fairness(s):.2f}" for s in shares))
        axes[0].set_ylabel("share of the speed alone")

    return [
        Plot(
            "latency",
            "Latency" + simulated,
            "Share of all requests (or gaps between tokens) that took at most so long, as the clients saw it. Tokens "
            "that came together have no gap and are left out.",
            draw_latency,
            panels=3,
        ),
        Plot(
            "throughput",
            "Throughput" + simulated,
            "Median over the runs. An open loop is as fast as its arrivals; red where tokens differ from the batch's.",
            draw_throughput,
        ),
        Plot(
            "fairness",
            "Fairness",
            "Mean share of the speed that requests would have had alone (dashed: all of it), with Jain's index for "
            f"each load above. Red where the index over tenants is under {least:g}.",
            draw_fairness,
            panels=2,
        ),
    ]


def main() -> None:
    run_script(concurrent_requests)


if __name__ == "__main__":
    main()
