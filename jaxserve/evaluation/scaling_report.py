"""What scaling runs say: figures beside predictions, checks, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from jaxserve.cli.output import seconds_text
from jaxserve.evaluation.flags import Limits
from jaxserve.evaluation.mesh_runs import (
    answers_figure,
    as_budgeted,
    collective_figures,
    collective_table,
    num_equal,
    same_tokens,
)
from jaxserve.evaluation.plots import Plot, Theme, bars
from jaxserve.evaluation.predictions import prediction_table
from jaxserve.evaluation.result import Check, Figure, Result, Table
from jaxserve.evaluation.scaling_runs import Impossible, ScaleRun

KINDS = {"strong": False, "weak": True}


def fill(
    result: Result, runs: Sequence[ScaleRun], impossible: Sequence[Impossible], limits: Limits, gpu: str
) -> list[Plot]:
    """Put it all into the result. Returns the plots."""
    first, scaled = runs[0], runs[1:]
    meshes = [r.run for r in runs]
    result.checks += [same_tokens(meshes), as_budgeted(meshes)]
    result.checks += [_stage_check(r, limits) for r in runs if r.place.mesh.pp > 1]
    if limits.least_efficiency is not None:
        result.checks += [_efficiency_check(r, first, limits.least_efficiency) for r in scaled]
    for run in runs:
        result.figures += _figures(run, first, gpu, result.simulated)
    result.tables += [
        *(_table(kind, runs, gpu, result.simulated) for kind in KINDS),
        *_impossible_table(impossible),
        prediction_table(gpu, [r.predicted_strong for r in runs]),
        collective_table(meshes),
    ]
    result.samples = {
        "runs": {
            r.name: {"strong": r.strong, "weak": r.weak, "tokens": r.run.tokens, "computing": r.computing} for r in runs
        },
        "load": asdict(first.load),
        "impossible": {i.place.name: i.reason for i in impossible},
    }
    return _plots(result, runs, limits, gpu)


def speed_up(run: ScaleRun, first: ScaleRun, weak: bool) -> float:
    """Ratio of the median rates of output tokens."""
    return float(np.median(run.rates(weak)) / np.median(first.rates(weak)))


def predicted_speed_up(run: ScaleRun, first: ScaleRun, weak: bool) -> float | None:
    many, one = run.predicted(weak).plan, first.predicted(weak).plan
    return None if many is None or one is None else many.tokens_per_second / one.tokens_per_second


# -- checks ------------------------------------------------------------------------------------------------------------


def _stage_check(run: ScaleRun, limits: Limits) -> Check:
    name = f"{run.name}: stages take alike"
    if not run.stages:
        return Check(name, False, "the profile does not show every device")
    seen, ratio = ", ".join(f"{i}: {seconds_text(s)}" for i, s in run.stages.items()), _uneven(run)
    slowest = max(run.stages, key=lambda i: run.stages[i])
    detail = f"stage {slowest} takes {ratio:.2f} times the quickest, {limits.uneven_stages:g} allowed; {seen}"
    return Check(name, ratio <= limits.uneven_stages, detail, (_stages(run),))


def _uneven(run: ScaleRun) -> float:
    return max(run.stages.values()) / min(run.stages.values())


def _efficiency_check(run: ScaleRun, first: ScaleRun, least: float) -> Check:
    seen = speed_up(run, first, weak=True) / run.factor
    detail = f"{seen:.0%}, at least {least:.0%} wanted"
    return Check(f"{run.name}: weak scaling is efficient", seen >= least, detail, (_efficiency(run, "weak"),))


# -- figures -----------------------------------------------------------------------------------------------------------


def _stages(run: ScaleRun) -> str:
    return f"{run.name}: slowest stage over the quickest"


def _efficiency(run: ScaleRun, kind: str) -> str:
    return f"{run.name}: {kind} scaling, efficiency"


def _figures(run: ScaleRun, first: ScaleRun, gpu: str, simulated: bool) -> list[Figure]:
    several = simulated and run.place.mesh.num_devices > 1
    figures = [] if run is first else [answers_figure(run.run, first.run)]
    for kind in KINDS if run is not first else ["strong"]:
        figures += _speed_figures(run, first, kind, gpu, several)
    figures += collective_figures(run.run)
    if run.communication_share is not None and run.place.mesh.num_devices > 1:
        how = "bytes of the collectives in the compiled decode step over the links' model, of the step's predicted time"
        name = f"{run.name}: communication over links of {gpu.upper()}"
        figures.append(Figure(name, run.communication_share, "", how, better="lower"))
    if run.measured_share is not None and not simulated:
        how = "time in which a collective ran, of that in which devices did anything; from a profile"
        figures.append(Figure(f"{run.name}: communication, measured", run.measured_share, "", how, better="lower"))
    if run.stages:
        how = "from a profile: a stage's operations but for collectives, each as quick as in a quarter of its runs"
        figures.append(Figure(_stages(run), _uneven(run), "", how, better="lower", simulated=several))
    return figures


def _speed_figures(run: ScaleRun, first: ScaleRun, kind: str, gpu: str, simulated: bool) -> list[Figure]:
    weak, load = KINDS[kind], run.load
    count = load.count(run.factor, weak)
    how = f"output tokens over wall clock, {count} requests at once; median of {load.repeats} runs"
    label = f"{run.name}: {kind} scaling"
    rates = [[rate] for rate in run.rates(weak)]
    figures = [
        Figure.of(f"{label}, output", rates, "median", "tok/s", how, better="higher", simulated=simulated),
    ]
    if run is first:
        return figures
    ratio, than = speed_up(run, first, weak), f"{first.name}'s"
    each = f"speed-up over {run.factor} times the devices"
    figures += [
        Figure(f"{label}, speed-up", ratio, "", f"output beside {than}", better="higher", simulated=simulated),
        Figure(_efficiency(run, kind), ratio / run.factor, "", each, better="higher", simulated=simulated),
    ]
    predicted = predicted_speed_up(run, first, weak)
    if predicted is not None:
        how = "cost model on data sheets (docs/planning.md), not measured: as many requests, which come as others end"
        figures.append(Figure(f"{label}, speed-up predicted for {gpu.upper()}", predicted, "", how))
    return figures


def _table(kind: str, runs: Sequence[ScaleRun], gpu: str, simulated: bool) -> Table:
    weak, first, rows = KINDS[kind], runs[0], []
    for run in runs:
        ratio, predicted = speed_up(run, first, weak), predicted_speed_up(run, first, weak)
        share = run.communication_share
        rows.append(
            [
                run.name,
                str(run.load.count(run.factor, weak)),
                f"{float(np.median(run.rates(weak))):,.0f} tok/s",
                f"{ratio:.2f}",
                f"{ratio / run.factor:.0%}",
                "" if predicted is None else f"{predicted:.2f}",
                "" if predicted is None else f"{predicted / run.factor:.0%}",
                "" if share is None else f"{share:.0%}",
            ]
        )
    name = gpu.upper()
    header = ("mesh", "requests", "output", "speed-up", "efficient", f"{name} speed-up", "efficient", "links")
    bad = [i for i, run in enumerate(runs) if is_wrong(run, first)]
    return Table(f"{kind.capitalize()} scaling" + (", simulated" if simulated else ""), header, rows, bad)


def is_wrong(run: ScaleRun, first: ScaleRun) -> bool:
    """Whether its tokens or collectives are not as they should be."""
    return num_equal(run.run, first.run) < len(run.run.tokens) or any(p.broken for p in run.run.programs)


def _impossible_table(impossible: Sequence[Impossible]) -> list[Table]:
    rows = [(i.place.name, i.reason) for i in impossible]
    return [Table("Not measured", ("mesh", "because"), rows)] if rows else []


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(result: Result, runs: Sequence[ScaleRun], limits: Limits, gpu: str) -> list[Plot]:
    simulated, first = " (simulated)" if result.simulated else "", runs[0]
    axes_of = list(dict.fromkeys(r.place.axis for r in runs[1:]))
    staged = [r for r in runs if r.stages]

    def draw_speed_up(panels: Sequence[Any], theme: Theme) -> None:
        most = max(r.factor for r in runs)
        for panel, (kind, weak) in zip(panels, KINDS.items(), strict=True):
            panel.plot([1, most], [1, most], ":", color=theme.ink, label="ideal", zorder=4)
            for k, axis in enumerate(axes_of):
                along = [first, *(r for r in runs if r.place.axis == axis)]
                factors = [r.factor for r in along]
                panel.plot(
                    factors,
                    [speed_up(r, first, weak) for r in along],
                    "o-",
                    color=theme.series(k),
                    label=f"{axis}{simulated}",
                )
                expected = [predicted_speed_up(r, first, weak) for r in along]
                if None not in expected:
                    panel.plot(
                        factors, expected, "x--", color=theme.series(k), label=f"{axis}, predicted {gpu.upper()}"
                    )
            wrong = [r for r in runs if is_wrong(r, first)]
            seen = [speed_up(r, first, weak) for r in wrong]
            panel.plot([r.factor for r in wrong], seen, "o", color=theme.bad, markersize=9, zorder=5)
            _powers_of_two(panel, most)
            panel.set(title=f"{kind} scaling", xlabel="times the devices")
        panels[0].set_ylabel("times the output tokens per second")
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))

    def draw_communication(panels: Sequence[Any], theme: Theme) -> None:
        (panel,) = panels
        shown = [r for r in runs[1:] if r.communication_share is not None]
        shares = {"audited bytes, modelled links": [r.communication_share or 0.0 for r in shown]}
        if not result.simulated and all(r.measured_share is not None for r in shown):
            shares["measured"] = [r.measured_share or 0.0 for r in shown]
        broken = {i for i, r in enumerate(shown) if any(p.broken for p in r.run.programs)}
        bars(panel, theme, [r.name for r in shown], shares, lambda _, i: i in broken)
        panel.set(ylabel="share of a decode step", ylim=(0, 1))

    def draw_stages(panels: Sequence[Any], theme: Theme) -> None:
        (panel,) = panels
        at = [(r, stage) for r in staged for stage in r.stages]
        least = {r.name: min(r.stages.values()) for r in staged}
        slow = {i for i, (r, stage) in enumerate(at) if r.stages[stage] > limits.uneven_stages * least[r.name]}
        names = [f"{stage}\n{r.name}" if stage == 0 else str(stage) for r, stage in at]
        bars(panel, theme, names, {"stages": [1e3 * r.stages[s] for r, s in at]}, lambda _, i: i in slow)
        for start in [i for i, (_, stage) in enumerate(at) if stage == 0][1:]:
            panel.axvline(start - 0.5, color=theme.grid)
        panel.set(ylabel="milliseconds of computing", xlabel="stage")

    plots = [
        Plot(
            "speed_up",
            "Speed-up" + simulated,
            "Output tokens per second beside the first mesh's: with the same requests on every mesh (strong), and with "
            f"requests that grow with the devices (weak). Dashed: what the cost model expects of {gpu.upper()}."
            + " Red: other tokens or collectives than expected."
            + (" Simulated devices share the cores of one machine: nothing becomes faster." if simulated else ""),
            draw_speed_up,
            panels=2,
        ),
        Plot(
            "communication",
            f"Communication on {gpu.upper()}",
            "Share of the largest decode step: bytes of the collectives in the compiled step, over the modelled links, "
            "of the step's predicted time. Red where the collectives are not those of the cost model.",
            draw_communication,
        ),
        Plot(
            "stages",
            "Pipeline stages" + simulated,
            "How long the operations of each stage's devices take, without collectives, for the same requests: each as "
            "quick as in the quicker quarter of its runs, a loop beside what is in it. Red: more than "
            f"{limits.uneven_stages:g} times the quickest.",
            draw_stages,
        ),
    ]
    wanted = {"speed_up": bool(axes_of), "communication": len(runs) > 1, "stages": bool(staged)}
    return [plot for plot in plots if wanted[plot.name]]


def _powers_of_two(panel: Any, most: int) -> None:
    ticks = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    panel.set(xscale="log", yscale="log")
    panel.minorticks_off()
    panel.set_xticks(ticks, [str(t) for t in ticks])
    low = panel.get_ylim()[0]
    marks = [2.0**i for i in range(-6, most.bit_length()) if 2.0**i >= low / 1.2 and 2.0**i <= most]
    panel.set_yticks(marks, [f"{m:g}" for m in marks])
