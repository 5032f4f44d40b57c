"""Runs of the same script side by side: every figure, its ratio to the first run's, and how sure that is.

The interval is a 95 % bootstrap over the raw samples in result.json (requests, or repeats): it knows how much these
differ within a run, not what the machine did between two runs. Where a figure has too few samples there is none.

    python scripts/compare_runs.py before/ after/ --out comparison
    python scripts/compare_runs.py tp1/result.json tp2/result.json --worse 1.1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxserve.cli.command import epilog, run_script
from jaxserve.evaluation.command import begin, finish
from jaxserve.evaluation.flags import ReportFlags
from jaxserve.evaluation.plots import Plot, Theme
from jaxserve.evaluation.result import Check, Figure, Table, read_result, value_text
from jaxserve.evaluation.statistics import ratio_interval

QUESTION = "What differs between these runs, and is it more than chance?"
SAME = ("mesh", "seed", "options")
"""Of two results, what a reader has to know if it is not."""


@dataclass(frozen=True)
class Ratio:
    """A figure of one run over the first run's."""

    run: str
    figure: str
    unit: str
    first: float
    value: float
    interval: tuple[float, float] | None
    better: str | None
    sampled: bool
    """Whether it is a statistic of samples, and not a plain fact such as a number of bytes."""

    @property
    def ratio(self) -> float | None:
        return self.value / self.first if self.first else None

    @property
    def verdict(self) -> str:
        """What the interval says; nothing where there is none."""
        if self.interval is None or self.better is None:
            return ""
        low, high = self.interval
        if low <= 1 <= high:
            return "no clear difference"
        return "better" if (low > 1) == (self.better == "higher") else "worse"

    def worse_by(self, factor: float) -> bool:
        """Whether even the kind end of the interval is that much worse; of a plain fact, the fact."""
        ends = self.interval
        if not self.sampled and self.ratio is not None:
            ends = self.ratio, self.ratio
        if ends is None or self.better is None:
            return False
        return ends[0] > factor if self.better == "lower" else ends[1] < 1 / factor


@epilog(
    "python scripts/compare_runs.py before after", "python scripts/compare_runs.py a b c --worse 1.05 --out comparison"
)
def compare_runs(
    report: ReportFlags,
    runs: Annotated[list[Path], typer.Argument(metavar="A B ...", help="result.json files, or their directories.")],
    worse: Annotated[
        float | None, typer.Option(help="Fail where a figure is surely worse by more than this factor, like 1.1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Show runs side by side, with ratios to the first and 95 % intervals."""
    if len(runs) < 2:
        raise ValueError("give at least two runs")
    if worse is not None and worse < 1:
        raise ValueError(f"--worse {worse}: it is a factor of at least 1")
    found = dict(zip(_names(runs), map(read_result, runs), strict=True))
    scripts = sorted({r["script"] for r in found.values()})
    if len(scripts) > 1:
        raise ValueError(f"these are results of {' and '.join(scripts)}: compare runs of one script")
    result = begin("compare_runs", QUESTION, {"runs": ", ".join(found), "worse": worse}, seed, None)
    ratios = compare(found, seed)
    result.tables += [*_differences(found), _table(found, ratios, worse)]
    result.figures += [
        Figure(
            f"{r.figure}, {r.run}",
            r.ratio,
            "",
            "over the first run's" + ("" if r.interval is None else f"; 95 % between {_interval(r)}"),
        )
        for r in ratios
        if r.ratio is not None
    ]
    result.checks += [_passed(name, r) for name, r in found.items()]
    if worse is not None:
        result.checks.append(_worse(ratios, worse))
    result.samples = {"ratios": [vars(r) for r in ratios]}
    finish(result, _plots(ratios, worse), report)


def _names(paths: Sequence[Path]) -> list[str]:
    """Short, and each once."""
    short = [(p if p.is_dir() else p.parent).resolve().name for p in paths]
    return short if len(set(short)) == len(short) else [str(p) for p in paths]


def compare(found: dict[str, dict[str, Any]], seed: int) -> list[Ratio]:
    """Every figure that a run has in common with the first."""
    first, *others = found
    base = {f["name"]: f for f in found[first]["figures"]}
    return [
        Ratio(
            name,
            f["name"],
            f["unit"],
            base[f["name"]]["value"],
            f["value"],
            ratio_interval(f["statistic"], base[f["name"]]["samples"], f["samples"], seed),
            f["better"],
            bool(f["samples"]),
        )
        for name in others
        for f in found[name]["figures"]
        if f["name"] in base
    ]


def _passed(name: str, run: dict[str, Any]) -> Check:
    failed = [c["name"] for c in run["checks"] if not c["passed"]]
    return Check(f"{name}: its own checks passed", not failed, "; ".join(failed) or "they did")


def _worse(ratios: Sequence[Ratio], factor: float) -> Check:
    bad = [r for r in ratios if r.worse_by(factor)]
    seen = "; ".join(f"{r.figure} of {r.run}: {r.ratio:.3g} times" for r in bad if r.ratio is not None)
    names = tuple(f"{r.figure}, {r.run}" for r in bad)
    return Check(f"nothing is worse by more than {factor:g}", not bad, seen or "nothing is", names)


def _interval(ratio: Ratio) -> str:
    return "" if ratio.interval is None else f"{ratio.interval[0]:.3f} and {ratio.interval[1]:.3f}"


def _table(found: dict[str, dict[str, Any]], ratios: Sequence[Ratio], worse: float | None) -> Table:
    rows = [
        (
            r.figure,
            value_text(r.first, r.unit),
            r.run,
            value_text(r.value, r.unit),
            "" if r.ratio is None else f"{r.ratio:.3f}",
            _interval(r),
            r.verdict,
        )
        for r in ratios
    ]
    bad = [i for i, r in enumerate(ratios) if worse is not None and r.worse_by(worse)]
    header = ("figure", next(iter(found)), "run", "value", "ratio", "95 % between", "")
    return Table("Figures side by side", header, rows, bad)


def _differences(found: dict[str, dict[str, Any]]) -> list[Table]:
    """What was not the same, besides what was measured."""
    facts = {name: _flat({k: run[k] for k in SAME} | run["environment"]) for name, run in found.items()}
    keys = dict.fromkeys(key for of in facts.values() for key in of)
    rows = [
        (key, *(str(of.get(key, "")) for of in facts.values()))
        for key in keys
        if len({str(of.get(key, "")) for of in facts.values()}) > 1
    ]
    return [Table("What was not the same", ("", *found), rows)] if rows else []


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix} {key}".strip()).items()}


def _plots(ratios: Sequence[Ratio], worse: float | None) -> list[Plot]:
    shown = [r for r in ratios if r.ratio and r.ratio > 0]
    runs = list(dict.fromkeys(r.run for r in shown))
    figures = list(dict.fromkeys(r.figure for r in shown))

    def draw(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        for r in shown:
            k = runs.index(r.run)
            at = figures.index(r.figure) + 0.6 * (k + 0.5) / len(runs) - 0.3
            colour = theme.bad if worse is not None and r.worse_by(worse) else theme.series(k)
            if r.interval is not None:
                panel.plot(r.interval, (at, at), color=colour, linewidth=2.5, alpha=0.6)
            panel.plot([r.ratio], [at], "o", color=colour, markersize=5)
        for k, run in enumerate(runs):
            panel.plot([], [], "o", color=theme.series(k), label=run)
        panel.axvline(1, color=theme.ink, linewidth=1, linestyle="--")
        panel.set(xlabel="ratio to the first run", ylim=(len(figures) - 0.5, -0.5))
        panel.set_yticks(range(len(figures)), figures)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    caption = "Each figure over the first run's, with its 95 % interval where there are samples for one."
    return [Plot("ratios", "Ratios to the first run", caption, draw, rows=len(figures))] if shown else []


def main() -> None:
    run_script(compare_runs)


if __name__ == "__main__":
    main()
