"""``jaxserve bench throughput``: requests that are all there at once, or that come over time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from jaxserve.cli.output import seconds_text
from jaxserve.commands.bench.cases import Bench, Case, conclude, pairs
from jaxserve.commands.bench.engines import Engines, devices, is_simulated
from jaxserve.commands.bench.options import BenchFlags, DatasetFlags
from jaxserve.commands.bench.serving import measure_serving
from jaxserve.evaluation.plots import Plot, Theme, bars
from jaxserve.evaluation.result import Figure
from jaxserve.evaluation.sweep import Setting, each, prepare, settings

if TYPE_CHECKING:
    from jaxserve import LLM
    from jaxserve.evaluation.datasets import Workload

BENCH = Bench(
    "throughput",
    "How many tokens per second, and how soon?",
    "Median of the runs; latencies over all requests of all runs. A setting whose check failed is red.",
)
OFFLINE_REPEATS = 3
RATES = {
    "output throughput": ("output_tokens_per_second", "tok/s"),
    "total throughput": ("total_tokens_per_second", "tok/s"),
    "requests": ("requests_per_second", "/s"),
}
"""Figures: of which entry of a run, and its unit."""


def run(groups: dict[str, Any], flags: BenchFlags) -> None:
    """Measure and show every setting of the sweep, or the only one. ``groups``: the command's options."""
    flags.check()
    cases = settings(flags.sweep or (), groups)
    prepare(cases, lambda case: case.groups["pace"].check())
    work = prepare(cases, lambda case: case.groups["data"].workload(case.groups["engine"]))
    if len({_over_time(case, work[case.name]) for case in cases}) > 1:
        raise ValueError("--sweep: requests come over time in all of its settings or in none, to be compared")
    engines = Engines(cases)

    def measure(case: Setting) -> Case:
        llm, workload = engines.open(case.groups["engine"]), work[case.name]
        of = measure_serving if _over_time(case, workload) else _measure_offline
        return of(case, llm, workload)

    conclude(BENCH, each(cases, measure), groups["engine"], flags)


def _over_time(case: Setting, workload: Workload) -> bool:
    return case.groups["pace"].is_given or workload.arrivals is not None


def _measure_offline(case: Setting, llm: LLM, workload: Workload) -> Case:
    from jaxserve.evaluation.offline import compiled, throughput_runs

    data: DatasetFlags = case.groups["data"]
    runs = throughput_runs(llm, workload, case.groups["runs"].repeats or OFFLINE_REPEATS)
    report = {
        **data.described(workload),
        **{name: median(run[name] for run in runs) for name in runs[0]},
        **compiled(llm),
        "simulated": is_simulated(llm),
        "runs": runs,
    }
    rates = {kind: report[f"{kind}_tokens_per_second"] for kind in ("prompt", "output")}
    row = {f"{kind} tok/s": f"{rates[kind]:,.0f}" for kind in ("prompt", "output")}
    row |= {"wall": seconds_text(report["seconds"]), "padding": f"{report['padding_share']:.1%}"}
    row |= {"cached": f"{report['prefix_hit_share']:.1%}"}
    return Case(
        case,
        report,
        pairs(f"{workload.text}, median of {len(runs)}", _values(report) | workload.notes | devices(llm)),
        row,
        _figures(case.prefix, runs, report["simulated"]),
        {"throughput": {f"{kind} tokens per second": {kind: rates[kind]} for kind in ("prompt", "output")}},
        [_plot(runs, report["simulated"])],
        simulated=report["simulated"],
    )


def _values(report: dict[str, Any]) -> dict[str, str]:
    found = report["prefix_hit_share"]
    cached = {"prefix cache": f"had {found:.1%} of the prompt tokens"} if found else {}
    return {
        "prompt": f"{report['prompt_tokens_per_second']:,.0f} tok/s",
        "output": f"{report['output_tokens_per_second']:,.0f} tok/s",
        "total": f"{report['total_tokens_per_second']:,.0f} tok/s",
        "requests": f"{report['requests_per_second']:,.2f} per second",
        "wall": seconds_text(report["seconds"]),
        "steps": f"{report['steps']:.0f}, {seconds_text(report['seconds'] / report['steps'])} each",
        "padding": f"{report['padding_share']:.1%} of the rows computed",
        "host": f"works {report['host_share']:.1%} of the time in steps; the devices wait for it at most "
        f"{report['device_idle_share']:.1%}",
        **cached,
        "KV blocks": f"{report['kv_efficiency']:.1%} of their token slots in use",
        "preemptions": f"{report['preemptions']:.0f}",
        "compiled": f"{report['programs']} programs in {seconds_text(report['compile_seconds'])}, not counted",
    }


def _figures(prefix: str, runs: list[dict[str, float]], simulated: bool) -> list[Figure]:
    how = f"wall clock of LLM.generate over all requests at once; median of {len(runs)} runs"
    return [
        Figure.of(
            f"{prefix}{name}", [[r[key]] for r in runs], "median", unit, how, better="higher", simulated=simulated
        )
        for name, (key, unit) in RATES.items()
    ]


def _plot(runs: list[dict[str, float]], simulated: bool) -> Plot:
    def draw(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        groups = {kind: [run[f"{kind}_tokens_per_second"] for run in runs] for kind in ("prompt", "output")}
        bars(panel, theme, [f"run {i}" for i in range(1, len(runs) + 1)], groups)
        panel.set_ylabel("tokens per second")

    caption = "Tokens of all requests over the wall clock of each run; prompts and answers are computed together."
    return Plot("throughput", "Throughput" + " (simulated)" * simulated, caption, draw)
