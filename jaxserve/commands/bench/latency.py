"""``jaxserve bench latency``: one request alone, beside what the memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.cli.output import bytes_text, seconds_text
from jaxserve.commands.bench.cases import Bench, Case, conclude, pairs
from jaxserve.commands.bench.engines import Engines, devices, is_simulated
from jaxserve.commands.bench.options import BenchFlags, DatasetFlags, SingleFlags
from jaxserve.evaluation.plots import Plot, Theme, cumulative
from jaxserve.evaluation.result import Figure
from jaxserve.evaluation.sweep import Setting, each, prepare, settings

if TYPE_CHECKING:
    from jaxserve import LLM
    from jaxserve.evaluation.datasets import Workload

BENCH = Bench(
    "latency",
    "How soon is the first token there, and the next, of one request alone?",
    "Median of the runs. The floor is the time that reading the weights from memory takes.",
)


def run(groups: dict[str, Any], flags: BenchFlags) -> None:
    """Measure and show every setting of the sweep, or the only one. ``groups``: the command's options."""
    flags.check()
    cases = settings(flags.sweep or (), groups)
    work = prepare(cases, _workload)
    engines = Engines(cases)

    def measure(case: Setting) -> Case:
        return _measure(case, engines.open(case.groups["engine"]), work[case.name])

    conclude(BENCH, each(cases, measure), groups["engine"], flags)


def _workload(case: Setting) -> Workload:
    single: SingleFlags = case.groups["single"]
    data = DatasetFlags(num_prompts=1, input_len=str(single.input_len), output_len=str(single.output_len))
    return data.workload(case.groups["engine"])


def _measure(case: Setting, llm: LLM, workload: Workload) -> Case:
    from jaxserve.evaluation.bandwidth import floor
    from jaxserve.evaluation.offline import compiled, single_stream

    single: SingleFlags = case.groups["single"]
    runs = single_stream(llm, workload, single.repeats)
    first, gaps = [times[0] for times in runs], [np.diff(times).tolist() for times in runs]
    between = [gap for of_run in gaps for gap in of_run]
    report = {
        "workload": vars(single),
        "ttft_median": median(first),
        "ttft_p90": float(np.percentile(first, 90)),
        "token_seconds_median": median(between),
        "token_seconds_p90": float(np.percentile(between, 90)),
        "ttft": first,
        **floor(llm),
        **compiled(llm),
        "simulated": is_simulated(llm),
        "runs": runs,
    }
    report["times_the_floor"] = report["token_seconds_median"] / report["floor_seconds"]
    values = _values(report)
    title = f"one request, {single.input_len} prompt tokens, {single.output_len} output tokens, {single.repeats} times"
    row = {name: values[name].partition(" median")[0] for name in ("first token", "per token", "output")}
    return Case(
        case,
        report,
        pairs(title, values | devices(llm)),
        row | {"floor": seconds_text(report["floor_seconds"]), "× the floor": f"{report['times_the_floor']:.2f}"},
        _figures(case.prefix, first, gaps, report),
        {"latency": _panels(report)},
        [_plot(between, report)],
        simulated=report["simulated"],
    )


def _panels(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    measured, floor = 1e3 * report["token_seconds_median"], 1e3 * report["floor_seconds"]
    return {
        "first token, ms": {"first token": 1e3 * report["ttft_median"]},
        "per token, ms": {"measured": measured, "floor": floor},
    }


def _values(report: dict[str, Any]) -> dict[str, str]:
    return {
        "first token": f"{seconds_text(report['ttft_median'])} median, {seconds_text(report['ttft_p90'])} p90",
        "per token": f"{seconds_text(report['token_seconds_median'])} median, "
        f"{seconds_text(report['token_seconds_p90'])} p90",
        "output": f"{1 / report['token_seconds_median']:,.0f} tok/s",
        "floor": f"{seconds_text(report['floor_seconds'])} per token: {bytes_text(report['weight_bytes_read'])} "
        f"of weights at {report['bandwidth'] / 1e9:.1f} GB/s measured",
        "ratio": f"{report['times_the_floor']:.2f} × the floor",
        "compiled": f"{report['programs']} programs in {seconds_text(report['compile_seconds'])}, not counted",
    }


def _figures(prefix: str, first: list[float], gaps: list[list[float]], report: dict[str, Any]) -> list[Figure]:
    how, simulated = f"LLM.stream of one request; {len(first)} runs", report["simulated"]
    seen = {"first token": [[seconds] for seconds in first], "between tokens": gaps}
    floor = f"{bytes_text(report['weight_bytes_read'])} of weights over the memory bandwidth measured here"
    return [
        *(
            Figure.of(f"{prefix}{name}, {of}", groups, of, "s", how, better="lower", simulated=simulated)
            for name, groups in seen.items()
            for of in ("median", "p90")
        ),
        Figure(f"{prefix}floor per token", report["floor_seconds"], "s", floor, better="lower", simulated=simulated),
        Figure(f"{prefix}median over the floor", report["times_the_floor"], "", "of one token", better="lower"),
    ]


def _plot(between: list[float], report: dict[str, Any]) -> Plot:
    def draw(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        cumulative(panel, theme, {"between tokens": 1e3 * np.array(between)}, "milliseconds")
        panel.axvline(1e3 * report["floor_seconds"], color=theme.ink, linewidth=1, linestyle="--", label="floor")
        panel.legend(loc="lower right")
        panel.set_ylabel("share")

    return Plot(
        "latency",
        "Between tokens" + " (simulated)" * report["simulated"],
        "Share of the gaps between tokens of one request alone that took at most so long. Dashed: the time that "
        "reading the weights from memory takes.",
        draw,
    )
