"""What a comparison of accuracies shows: checks, figures, tables and plots of a model served in several ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.evaluation.accuracy import LEVEL, NEGLIGIBLE, Comparison, Scores, worse
from jaxserve.evaluation.direct import Agreement
from jaxserve.evaluation.harness import BITS, Outcome
from jaxserve.evaluation.plots import Plot, Theme
from jaxserve.evaluation.result import Check, Figure, Result, Table

NINETY_FIVE = 1.96
"""Standard errors to each side of a 95 % interval."""
LONGEST_SHOWN = 40
"""Characters of an answer, in tables."""


@dataclass(frozen=True)
class Run:
    """A model, served in one way."""

    name: str
    outcome: Outcome
    agreement: Agreement | None
    """With direct scoring, where that was asked for and is meant to hold."""


def fill(result: Result, runs: Sequence[Run], most_lost: float) -> list[Plot]:
    """Put into ``result`` what the runs say, of which the first is the baseline. The plots."""
    comparisons = _comparisons(runs)
    lost = worse([c for _, c in comparisons], most_lost)
    bad = {(name, c.base.name) for (name, c), is_worse in zip(comparisons, lost, strict=True) if is_worse}
    result.checks += [
        *(c for run in runs for c in _direct_checks(run)),
        *_variant_checks(runs, comparisons, bad, most_lost),
    ]
    result.figures += [*_figures(runs), *(f for run in runs for f in _direct_figures(run))]
    result.tables += [
        _score_table(runs, bad),
        *_difference_table(comparisons, bad, most_lost),
        *_direct_table(runs),
    ]
    result.samples = {run.name: _samples(run.outcome) for run in runs}
    return _plots(runs, comparisons, bad, most_lost)


def _comparisons(runs: Sequence[Run]) -> list[tuple[str, Comparison]]:
    """(variant, its scores beside the baseline's)"""
    base = runs[0].outcome.scores
    return [(r.name, Comparison(b, o)) for r in runs[1:] for b, o in zip(base, r.outcome.scores, strict=True)]


# -- checks ------------------------------------------------------------------------------------------------------------


def _direct_checks(run: Run) -> list[Check]:
    if run.agreement is None:
        return []
    rows, texts, allowed = run.agreement.likelihoods, run.agreement.texts, run.agreement.allowed
    checks = []
    if rows:
        wrong = [row for row in rows if not row.right(allowed)]
        worst = max(wrong or rows, key=lambda row: row.error)
        count = len(worst.exact.logprobs)
        where = f"{worst.request.task}, {count} token{'s' if count > 1 else ''}"
        seen = f"off by up to {worst.error:.2g} nats ({where}), {allowed.total(count):.2g} allowed there"
        name = f"{run.name}: likelihoods are those of direct scoring"
        checks.append(Check(name, not wrong, f"{len(wrong)} of {len(rows)} wrong; {seen}", (_error_name(run),)))
    if texts:
        wrong = [row for row in texts if not row.right(allowed)]
        ties = sum(row.tie > 0 for row in texts) - len(wrong)
        tied = f", {ties} where two tokens are as good as tied" if ties else ""
        name = f"{run.name}: answers are those of direct scoring"
        checks.append(Check(name, not wrong, f"{len(wrong)} of {len(texts)} are others{tied}", (_others_name(run),)))
    return checks


def _variant_checks(
    runs: Sequence[Run], comparisons: Sequence[tuple[str, Comparison]], bad: set[tuple[str, str]], most_lost: float
) -> list[Check]:
    checks = []
    tested = f"each metric at p < {LEVEL / max(1, len(comparisons)):.2g}"
    for run in runs[1:]:
        those = [c for name, c in comparisons if name == run.name]
        lost = [c for c in those if (run.name, c.base.name) in bad]
        named = "; ".join(f"{c.base.name}: {_signed(c)}" for c in lost)
        if not those:
            continue
        worst = max(those, key=lambda c: c.loss)
        may = f"{most_lost:g} or chance" if most_lost else "chance"
        most = f"most lost: {worst.base.name}, {_signed(worst)}, which {may} may explain"
        detail = f"{named or (most if worst.loss > NEGLIGIBLE else 'nothing lost')} ({tested})"
        figures = tuple(_figure_name(run.name, c.base) for c in lost)
        checks.append(Check(f"{run.name}: as accurate as the baseline", not lost, detail, figures))
    return checks


# -- figures and tables ------------------------------------------------------------------------------------------------


def _figure_name(run: str, scores: Scores) -> str:
    return f"{run}: {scores.name}"


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f} ± {error:.4f}"


def _signed(comparison: Comparison) -> str:
    return f"{comparison.difference:+.4f} ± {comparison.stderr:.4f}"


def _figures(runs: Sequence[Run]) -> list[Figure]:
    figures = []
    for run in runs:
        for s in run.outcome.scores:
            how = f"by the harness, {len(s.values)} cases; standard error {s.stderr:.2g}"
            name, better = _figure_name(run.name, s), "higher" if s.higher_is_better else "lower"
            if (s.weights == 1).all():
                figures.append(Figure.of(name, [[v] for v in s.values.tolist()], "mean", "", how, better=better))
            else:
                figures.append(Figure(name, s.mean, "", how, better=better))
        figures += [
            Figure(f"{run.name}: {name}", value, "", "by the harness; its cases do not add up, so it is not compared")
            for name, value in run.outcome.others.items()
        ]
        if run.outcome.num_cut:
            how = "they were too long for max_model_len; of those that no cache answered"
            figures.append(Figure(f"{run.name}: contexts that lost their beginning", run.outcome.num_cut, "", how))
    return figures


def _error_name(run: Run) -> str:
    return f"{run.name}: largest error against direct scoring"


def _others_name(run: Run) -> str:
    return f"{run.name}: answers other than direct scoring's"


def _direct_figures(run: Run) -> list[Figure]:
    figures = []
    if run.agreement is not None and (rows := run.agreement.likelihoods):
        how = f"|harness - plain float32 forward| of whole requests, largest of {len(rows)}"
        figures.append(Figure(_error_name(run), max(row.error for row in rows), "nats", how, better="lower"))
    if run.agreement is not None and (texts := run.agreement.texts):
        how = f"of {len(texts)}, against greedy decoding by a plain float32 forward"
        figures.append(Figure(_others_name(run), sum(row.tie > 0 for row in texts), "", how, better="lower"))
    return figures


def _score_table(runs: Sequence[Run], bad: set[tuple[str, str]]) -> Table:
    """A row for each metric, a column for each way of serving."""
    rows, failed = [], []
    for i, first in enumerate(runs[0].outcome.scores):
        scores = [run.outcome.scores[i] for run in runs]
        arrow = "↑" if first.higher_is_better else "↓"
        rows.append((f"{first.name} {arrow}", str(len(first.values)), *(_with_error(s.mean, s.stderr) for s in scores)))
        if any((run.name, first.name) in bad for run in runs):
            failed.append(i)
    return Table("Scores and standard errors", ("task and metric", "cases", *(run.name for run in runs)), rows, failed)


def _difference_table(
    comparisons: Sequence[tuple[str, Comparison]], bad: set[tuple[str, str]], most_lost: float
) -> list[Table]:
    """Where any case has another score."""
    rows, failed = [], []
    for name, c in comparisons:
        if count := int((c.base.values != c.other.values).sum()):
            failed += [len(rows)] if (name, c.base.name) in bad else []
            rows.append((c.base.name, name, str(count), _signed(c), f"{c.chance(most_lost):.2g}"))
    header = ("task and metric", "variant", "other cases", "difference", "p of the loss")
    return [Table("Against the baseline", header, rows, failed)] if rows else []


def _direct_table(runs: Sequence[Run]) -> list[Table]:
    """What does not agree, ties among it."""
    rows, failed = [], []
    for run in runs:
        if run.agreement is None:
            continue
        for row in run.agreement.likelihoods:
            if not row.right(run.agreement.allowed):
                failed.append(len(rows))
                rows.append((run.name, row.request.task, f"{row.served:.4f} nats", f"{row.exact.total:.4f} nats"))
        for row in run.agreement.texts:
            if row.tie > 0:
                failed += [] if row.right(run.agreement.allowed) else [len(rows)]
                rows.append((run.name, row.request.task, _short(row.request.answer), _short(row.exact)))
    return [Table("Other than by direct scoring", ("run", "task", "harness", "directly"), rows, failed)] if rows else []


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + "…"


def _samples(outcome: Outcome) -> dict[str, Any]:
    return {
        "scores": {s.name: {"values": s.values.tolist(), "weights": s.weights.tolist()} for s in outcome.scores},
        "answers": [{"task": r.task, "asked": r.arguments[0], "answer": r.answer} for r in outcome.requests],
    }


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(
    runs: Sequence[Run], comparisons: Sequence[tuple[str, Comparison]], bad: set[tuple[str, str]], most_lost: float
) -> list[Plot]:
    first = runs[0].outcome.scores
    shares = [i for i, s in enumerate(first) if s.metric != BITS]
    texts = [i for i, s in enumerate(first) if s.metric == BITS]

    def draw_scores(of: Sequence[int], label: str) -> Any:
        def draw(axes: Sequence[Any], theme: Theme) -> None:
            rows = {run.name: [_interval(run.outcome.scores[i]) for i in of] for run in runs}
            _points(axes[0], theme, [first[i].name for i in of], rows, bad)
            axes[0].set(xlabel=label)

        return draw

    def draw_differences(axes: Sequence[Any], theme: Theme) -> None:
        names = [first[i].name for i in shares]
        rows = {
            run.name: [
                (c.difference, NINETY_FIVE * c.stderr, NINETY_FIVE * c.stderr)
                for name, c in comparisons
                if name == run.name and c.base.name in names
            ]
            for run in runs[1:]
        }
        axes[0].axvline(0, color=theme.ink, linewidth=1)
        if most_lost:
            axes[0].axvline(-most_lost, color=theme.ink, linewidth=1, linestyle="--", label=f"{most_lost:g} lost")
        _points(axes[0], theme, names, rows, bad, first_colour=1)
        axes[0].set(xlabel="difference from the baseline")

    interval = (
        "Bars are 95 % intervals. A variant that lost more than is allowed is red: the same cases are compared one by "
        "one, which may be sure where the bars overlap."
    )
    plots = []
    height = len(shares) * (1 + len(runs)) // 2
    if shares:
        caption = f"Share of the cases that were right. {interval}"
        plots.append(Plot("accuracy", "Accuracy", caption, draw_scores(shares, "share of the cases"), rows=height))
    if shares and comparisons:
        caption = f"What a variant has more or less than the baseline, on the same cases. {interval}"
        plots.append(Plot("difference", "Against the baseline", caption, draw_differences, rows=height))
    if texts:
        caption = f"How many bits of information a byte of text has for the model: fewer is better. {interval}"
        plots.append(
            Plot(
                "text", "Text: bits per byte", caption, draw_scores(texts, "bits per byte"), rows=len(texts) * len(runs)
            )
        )
    return plots


def _interval(scores: Scores) -> tuple[float, float, float]:
    """The figure, and how far the interval reaches to each side; a share ends at 0 and 1."""
    value, reach = scores.mean, NINETY_FIVE * scores.stderr
    return (value, min(reach, value), min(reach, 1 - value)) if scores.is_share else (value, reach, reach)


def _points(
    axes: Any,
    theme: Theme,
    names: Sequence[str],
    rows: dict[str, list[tuple[float, float, float]]],
    bad: set[tuple[str, str]],
    first_colour: int = 0,
) -> None:
    """Values with their intervals, one name under the other; those of one name side by side."""
    for k, (run, values) in enumerate(rows.items()):
        shift = (k - (len(rows) - 1) / 2) * 0.7 / len(rows)
        for i, (value, below, above) in enumerate(values):
            colour = theme.bad if (run, names[i]) in bad else theme.series(k + first_colour)
            axes.errorbar(value, i + shift, xerr=[[below], [above]], fmt="o", ms=4, color=colour, capsize=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    handles = [_mark(theme.series(k + first_colour), run) for k, run in enumerate(rows)]
    if any(run in rows for run, name in bad if name in names):
        handles.append(_mark(theme.bad, "lost too much"))
    if len(handles) > 1 or first_colour:
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))


def _mark(colour: str, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o", ms=4, label=name)
