"""``jaxserve bench startup``: how long until the first token, with and without compiled programs from before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from jaxserve.cli.output import progress, seconds_text
from jaxserve.commands.bench.cases import Bench, Case, conclude
from jaxserve.commands.bench.engines import SIMULATED
from jaxserve.commands.bench.options import BenchFlags, DatasetFlags, StartupFlags
from jaxserve.evaluation.plots import Plot, Theme, bars
from jaxserve.evaluation.result import Figure, Table
from jaxserve.evaluation.startup import PHASES, Startup, measure_startup
from jaxserve.evaluation.sweep import Setting, each, prepare, settings
from jaxserve.placement import placement

BENCH = Bench(
    "startup",
    "How long does a new process take until its first token, and with what?",
    "From starting a process to its first token; median of the processes.",
)
KINDS = {
    "cold": "a new process with an empty compile cache",
    "warm": "a new process with the compile cache that the one before left",
}


def run(groups: dict[str, Any], flags: BenchFlags) -> None:
    """Measure and show every setting of the sweep, or the only one. ``groups``: the command's options."""
    flags.check()
    cases = settings(flags.sweep or (), groups)
    prompts = prepare(cases, _prompt)

    def measure(case: Setting) -> Case:
        return _measure(case, prompts[case.name])

    conclude(BENCH, each(cases, measure), groups["engine"], flags)


def _prompt(case: Setting) -> list[int]:
    """ValueError, before a process is started, for what cannot be measured."""
    engine, start = case.groups["engine"], case.groups["start"]
    if engine.compilation_cache_dir is not None:
        raise ValueError("--compilation-cache-dir: startup measures with a cache of its own, which is empty at first")
    if placement(engine.coordinator, engine.num_processes, engine.process_id, os.environ) is not None:
        raise NotImplementedError("startup of several processes that are one engine is not measured")
    data = DatasetFlags(num_prompts=1, input_len=str(start.input_len), output_len="1")
    return data.workload(engine).calls[0].prompt


def _measure(case: Setting, prompt: list[int]) -> Case:
    from jaxserve.evaluation.engines import own_files

    start: StartupFlags = case.groups["start"]
    options = case.groups["engine"].engine_options() | {"use_tqdm_on_load": False}
    seen: dict[str, list[Startup]] = {kind: [] for kind in KINDS}
    with TemporaryDirectory() as caches:
        for i, kind in progress("processes", [(i, kind) for i in range(start.repeats) for kind in KINDS]):
            seen[kind].append(measure_startup(own_files(options, f"{kind}-{i}"), prompt, f"{caches}/{i}"))
    report = {
        "workload": vars(start),
        **{kind: {**_medians(of_kind), "total": median(s.total for s in of_kind)} for kind, of_kind in seen.items()},
        "programs": seen["cold"][0].programs,
        "simulated": seen["cold"][0].simulated,
        "runs": {kind: [s.seconds for s in of_kind] for kind, of_kind in seen.items()},
    }
    return Case(
        case,
        report,
        _details(report, start.repeats),
        _row(report),
        _figures(case.prefix, seen, report["simulated"]),
        {"startup": {f"{kind}, seconds": {"until the first token": report[kind]["total"]} for kind in KINDS}},
        [_plot(report)],
        simulated=report["simulated"],
    )


def _details(report: dict[str, Any], repeats: int) -> Table:
    title = f"until the first token of a new process: {report['programs']} programs"
    title += f", median of {repeats}" * (repeats > 1) + f", devices are {SIMULATED}" * report["simulated"]
    rows = [(phase, *(seconds_text(report[kind][phase]) for kind in KINDS)) for phase in (*PHASES, "total")]
    return Table(title, ("phase", *KINDS), rows)


def _medians(starts: Sequence[Startup]) -> dict[str, float]:
    return {phase: median(start.seconds[phase] for start in starts) for phase in PHASES}


def _row(report: dict[str, Any]) -> dict[str, str]:
    totals = {kind: seconds_text(report[kind]["total"]) for kind in KINDS}
    compile_ = {f"compile, {kind}": seconds_text(report[kind]["compile"]) for kind in KINDS}
    return totals | compile_ | {"load": seconds_text(report["warm"]["load"]), "programs": f"{report['programs']}"}


def _figures(prefix: str, seen: dict[str, list[Startup]], simulated: bool) -> list[Figure]:
    whole = {"total": "from starting the process to its first token"}
    return [
        Figure.of(
            f"{prefix}{kind} start, {phase}",
            [[start.total if phase in whole else start.seconds[phase]] for start in starts],
            "median",
            "s",
            f"{how}: {KINDS[kind]}; {len(starts)} processes",
            better="lower",
            simulated=simulated,
        )
        for kind, starts in seen.items()
        for phase, how in (whole | PHASES).items()
    ]


def _plot(report: dict[str, Any]) -> Plot:
    def draw(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        groups = {phase: [report[kind][phase] for kind in KINDS] for phase in PHASES}
        bars(panel, theme, list(KINDS), groups, stacked=True)
        panel.set(ylabel="seconds")

    caption = f"Median of the processes. Cold: {KINDS['cold']}. Warm: {KINDS['warm']}."
    return Plot("startup", "Until the first token" + " (simulated)" * report["simulated"], caption, draw)
