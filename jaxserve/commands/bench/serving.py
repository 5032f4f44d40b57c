"""What ``jaxserve bench throughput`` says about requests that come over time."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from jaxserve.cli.output import seconds_text
from jaxserve.commands.bench.cases import Case, pairs
from jaxserve.commands.bench.engines import devices, is_simulated
from jaxserve.commands.bench.options import DatasetFlags, PaceFlags
from jaxserve.evaluation.plots import Plot, Theme
from jaxserve.evaluation.result import Check, Figure
from jaxserve.evaluation.sweep import Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxserve import LLM
    from jaxserve.evaluation.clients import Load
    from jaxserve.evaluation.datasets import Workload
    from jaxserve.evaluation.serving import Goodput

NAMES = {
    "ttft": "first token (TTFT)",
    "tpot": "per token after it (TPOT)",
    "itl": "between tokens (ITL)",
    "e2el": "whole answer (E2EL)",
}
PANELS = ("ttft", "tpot", "e2el")
"""Latencies that are compared."""


def measure_serving(case: Setting, llm: LLM, workload: Workload) -> Case:
    from jaxserve.evaluation.offline import compiled
    from jaxserve.evaluation.serving import goodput, latency_statistics, serving_figures, serving_runs, targets_text

    data: DatasetFlags = case.groups["data"]
    flags: PaceFlags = case.groups["pace"]
    pace, targets = flags.check()
    loads = serving_runs(llm, workload, pace, case.groups["runs"].repeats or 1, case.groups["engine"].seed)
    seconds, simulated = median(load.seconds for load in loads), is_simulated(llm)
    good = goodput(loads, targets) if targets else None
    described = data.described(workload)
    described["workload"] |= {"arrivals": pace.text(workload), "targets_seconds": targets}
    report = {
        **described,
        "seconds": seconds,
        "output_tokens_per_second": workload.num_output_tokens / seconds,
        "total_tokens_per_second": (workload.num_prompt_tokens + workload.num_output_tokens) / seconds,
        "requests_per_second": len(workload.calls) / seconds,
        "latency_seconds": latency_statistics(loads),
        "goodput": None if good is None else vars(good),
        **compiled(llm),
        "simulated": simulated,
        "runs": [load.to_json() for load in loads],
    }
    repeated = f", median of {len(loads)}" if len(loads) > 1 else ""
    name = case.name or "requests"
    checks = _checks(name, flags.least_goodput, good, targets_text(targets))
    return Case(
        case,
        report,
        pairs(
            f"{workload.text}, {pace.text(workload)}{repeated}",
            _values(report, targets_text(targets)) | workload.notes | devices(llm),
        ),
        _row(report),
        [*_rates(name, workload, loads, good, simulated), *serving_figures(name, loads, simulated)],
        _panels(report),
        [_plot(name, loads, targets, simulated)],
        checks,
        simulated,
    )


def _values(report: dict[str, Any], targets: str) -> dict[str, str]:
    seen, good = report["latency_seconds"], report["goodput"]
    latencies = {
        title: ", ".join(f"{of} {seconds_text(value)}" for of, value in seen[name].items())
        for name, title in NAMES.items()
        if name in seen
    }
    values = {
        "output": f"{report['output_tokens_per_second']:,.0f} tok/s",
        "total": f"{report['total_tokens_per_second']:,.0f} tok/s",
        "requests": f"{report['requests_per_second']:,.2f} per second",
        "wall": f"{seconds_text(report['seconds'])}, from the first request to the last token",
        **latencies,
    }
    if good:
        values["goodput"] = f"{good['share']:.1%} of the requests, {good['per_second']:,.2f} per second: {targets}"
    compiled = f"{report['programs']} programs in {seconds_text(report['compile_seconds'])}, not counted"
    return values | {"compiled": compiled}


def _row(report: dict[str, Any]) -> dict[str, str]:
    seen, good = report["latency_seconds"], report["goodput"]
    row = {"output tok/s": f"{report['output_tokens_per_second']:,.0f}"}
    for name in PANELS:
        if name in seen:
            middle, high = (_milliseconds(seen[name][of]) for of in ("median", "p99"))
            row[f"{name.upper()} p50 / p99, ms"] = f"{middle} / {high}"
    if good:
        row |= {"goodput": f"{good['share']:.1%}", "good/s": f"{good['per_second']:.2f}"}
    return row


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _rates(name: str, workload: Workload, loads: Sequence[Load], good: Goodput | None, simulated: bool) -> list[Figure]:
    how = f"from when the first request was due to the last token; median of {len(loads)} runs"
    counts = {"throughput": (workload.num_output_tokens, "tok/s"), "requests": (len(workload.calls), "/s")}
    figures = [
        Figure.of(
            f"{name}: {what}",
            [[count / load.seconds] for load in loads],
            "median",
            unit,
            how,
            better="higher",
            simulated=simulated,
        )
        for what, (count, unit) in counts.items()
    ]
    if good is None:
        return figures
    note = f"requests that met every target; {len(loads)} runs"
    return [
        *figures,
        Figure(_goodput(name), good.share, "", f"share of the {note}", better="higher", simulated=simulated),
        Figure(f"{name}: goodput rate", good.per_second, "/s", note, better="higher", simulated=simulated),
    ]


def _goodput(name: str) -> str:
    return f"{name}: goodput"


def _checks(name: str, least: float | None, good: Goodput | None, targets: str) -> list[Check]:
    if least is None or good is None:
        return []
    detail = f"{good.share:.1%} met {targets}, at least {least:.1%} wanted"
    figures = _goodput(name), f"{name}: goodput rate"
    return [Check(f"{name}: enough requests meet their targets", good.share >= least, detail, figures)]


def _panels(report: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    seen, good = report["latency_seconds"], report["goodput"]
    rates = {"output tokens per second": {"output": report["output_tokens_per_second"]}}
    rates["requests per second"] = {"all": report["requests_per_second"]}
    if good:
        rates["requests per second"]["met their targets"] = good["per_second"]
    latencies = {
        f"{name.upper()}, ms": {"p50": 1e3 * seen[name]["median"], "p99": 1e3 * seen[name]["p99"]}
        for name in PANELS
        if name in seen
    }
    return {"throughput": rates, "latency": latencies}


def _plot(name: str, loads: Sequence[Load], targets: dict[str, float], simulated: bool) -> Plot:
    def draw(axes: Sequence[Any], theme: Theme) -> None:
        from jaxserve.evaluation.latencies import draw_latencies
        from jaxserve.evaluation.serving import answers_of

        draw_latencies(axes, theme, {name: answers_of(loads)})
        for panel, target in zip(axes, ("ttft", None, "e2el"), strict=True):
            if target in targets:
                panel.axvline(1e3 * targets[target], color=theme.ink, linewidth=1, linestyle="--", label="target")
                panel.legend(loc="lower right")

    return Plot(
        "latency",
        "Latency" + " (simulated)" * simulated,
        "Share of all requests (or gaps between tokens) that took at most so long, as the clients saw it. Tokens that "
        "came together have no gap and are left out. Dashed: targets.",
        draw,
        panels=3,
    )
