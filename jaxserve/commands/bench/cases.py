"""What ``jaxserve bench`` shows and keeps: one setting in full, a table of several, JSON, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import print_json, print_pairs, print_table
from jaxserve.commands.bench.engines import SIMULATED
from jaxserve.commands.bench.options import BenchFlags
from jaxserve.evaluation.command import begin
from jaxserve.evaluation.plots import Plot, Theme, bars
from jaxserve.evaluation.report import FILE_NAME, write_report
from jaxserve.evaluation.result import Check, Figure, Table
from jaxserve.evaluation.sweep import Measured, Setting


@dataclass(frozen=True)
class Case:
    """What was measured with one setting."""

    setting: Setting
    report: dict[str, Any]
    """For programs."""
    details: Table
    """For people."""
    row: dict[str, str]
    """The most important of it, for a table of several."""
    figures: list[Figure]
    panels: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Bars that compare settings: by plot, then by panel, then by name."""
    plots: list[Plot]
    """Where it is the only one."""
    checks: list[Check] = field(default_factory=list)
    simulated: bool = False

    @property
    def failed(self) -> bool:
        return any(not check.passed for check in self.checks)


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """Names beside values, as ``details``."""
    return Table(title, ("", ""), list(values.items()))


@dataclass(frozen=True)
class Bench:
    """One of the commands."""

    command: str
    question: str
    caption: str
    """Of the plot that compares settings."""


def conclude(bench: Bench, measured: Measured[Case], engine: EngineFlags, flags: BenchFlags) -> None:
    """Print, write the report if one is wanted, and raise what ended the measurements before their time. Exit code 1
    if a check failed."""
    cases, stopped = measured.done, measured.stopped
    checks = [check for case in cases for check in case.checks]
    if cases:
        _print(cases, flags, stopped is None)
        if flags.out is not None:
            _write(bench, cases, engine, flags, flags.out)
    if stopped is not None:
        if len(measured.settings) > 1:
            typer.echo(measured.where, err=True)
        raise stopped
    failed = [check for check in checks if not check.passed]
    for check in failed:
        typer.echo(f"FAILED: {check.name}: {check.detail}", err=True)
    if failed:
        raise typer.Exit(1)


def _print(cases: Sequence[Case], flags: BenchFlags, complete: bool) -> None:
    if flags.as_json and not flags.sweep:
        print_json(cases[0].report)
    elif flags.as_json:
        reports = [{"setting": case.setting.texts} | case.report for case in cases]
        print_json({"sweep": flags.sweep, "complete": complete, "cases": reports})
    elif not flags.sweep:
        details = cases[0].details
        if any(details.header):
            typer.echo(details.title)
            print_table(details.header, details.rows)
        else:
            print_pairs(details.title, {row[0]: row[1] for row in details.rows})
    else:
        table = _table(cases)
        typer.echo(table.title)
        print_table(table.header, table.rows)
        if any(case.simulated for case in cases):
            typer.echo(f"devices are {SIMULATED}")


def _table(cases: Sequence[Case]) -> Table:
    """What all settings have in common is its title."""
    titles = {case.details.title for case in cases}
    title = titles.pop() if len(titles) == 1 else f"{len(cases)} settings"
    rows = [(*case.setting.texts.values(), *case.row.values()) for case in cases]
    failed = [i for i, case in enumerate(cases) if case.failed]
    return Table(title, (*cases[0].setting.texts, *cases[0].row), rows, failed)


def _write(bench: Bench, cases: Sequence[Case], engine: EngineFlags, flags: BenchFlags, out: Path) -> None:
    from jaxserve.evaluation.engines import mesh_of
    from sharding.platform import use_cpu_without_gpus

    use_cpu_without_gpus()  # where another process was measured, this one has not started jax yet
    options = engine.engine_options() | cases[0].report["workload"] | {"sweep": flags.sweep}
    mesh = mesh_of(engine.engine_options()).sizes
    result = begin(f"jaxserve bench {bench.command}", bench.question, options, engine.seed, mesh)
    result.simulated = any(case.simulated for case in cases)
    result.checks += [check for case in cases for check in case.checks]
    result.figures += [figure for case in cases for figure in case.figures]
    result.tables.append(_table(cases) if flags.sweep else cases[0].details)
    result.samples = {"cases": [{"setting": case.setting.texts} | case.report for case in cases]}
    write_report(result, _comparisons(cases, bench.caption) if flags.sweep else cases[0].plots, out)
    if not flags.as_json:
        typer.echo(f"report: {out / FILE_NAME}")


# -- plots -------------------------------------------------------------------------------------------------------------


def _comparisons(cases: Sequence[Case], caption: str) -> list[Plot]:
    """Bars of each setting; red where a check failed."""
    labels = ["\n".join(case.setting.texts.values()) for case in cases]
    simulated = " (simulated)" if any(case.simulated for case in cases) else ""

    def plot(name: str) -> Plot:
        panels = cases[0].panels[name]

        def draw(axes: Sequence[Any], theme: Theme) -> None:
            for panel, (unit, series) in zip(axes, panels.items(), strict=True):
                groups = {key: [case.panels[name][unit][key] for case in cases] for key in series}
                bars(panel, theme, labels, groups, lambda _, i: cases[i].failed)
                panel.set(title=unit, xlabel=", ".join(cases[0].setting.texts))

        return Plot(name, name.capitalize() + simulated, caption, draw, panels=len(panels))

    return [plot(name) for name in cases[0].panels]
