"""What makes a function an evaluation script: its options, where its report goes, its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import print_json, print_table, watched
from jaxserve.evaluation.environment import environment
from jaxserve.evaluation.flags import ReportFlags
from jaxserve.evaluation.plots import Plot, require_matplotlib
from jaxserve.evaluation.report import FILE_NAME, write_report
from jaxserve.evaluation.result import Result


def engine_options(engine: EngineFlags, **more: Any) -> dict[str, Any]:
    """Keyword arguments of ``LLM``; ``more`` where the command line leaves them open."""
    options = engine.engine_options() | {"use_tqdm_on_load": watched()}
    return options | {name: value for name, value in more.items() if options.get(name) is None}


def begin(script: str, question: str, options: dict[str, Any], seed: int, mesh: dict[str, int] | None) -> Result:
    """An empty result of what runs here. NotImplementedError where there could be no report in the end."""
    require_matplotlib()
    found = environment()
    several = mesh is not None and max(mesh.values()) > 1
    simulated = several and found["platform"] == "cpu"
    return Result(script, question, _shown(options), seed, mesh, found, simulated)


def _shown(options: dict[str, Any]) -> dict[str, Any]:
    """Without what was left at nothing."""
    return {name: value if isinstance(value, int | float) else str(value) for name, value in options.items() if value}


def finish(result: Result, plots: Sequence[Plot], flags: ReportFlags) -> None:
    """Write, print, and exit with 1 if a check failed."""
    write_report(result, plots, flags.out)
    if flags.as_json:
        print_json(result.to_json())
    else:
        _print(result, flags.out)
    for check in result.failed:
        typer.echo(f"FAILED: {check.name}: {check.detail}", err=True)
    if result.failed:
        raise typer.Exit(1)


def _print(result: Result, out: Path) -> None:
    for table in result.tables:
        typer.echo(table.title)
        print_table(table.header, table.rows)
    if result.figures:
        rows = [(f.name, f.text, "simulated" if f.simulated else "") for f in result.figures]
        print_table(["figure", "value", ""], rows)
    for check in result.checks:
        typer.echo(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    typer.echo(f"report: {out / FILE_NAME}")
