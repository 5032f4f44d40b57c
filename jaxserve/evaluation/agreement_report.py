"""How far served log-probabilities and greedy tokens are from the plain forward's: figures, checks, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.evaluation.agreement import Choice, Logprobs
from jaxserve.evaluation.plots import Plot, Theme, limit_line
from jaxserve.evaluation.result import Check, Figure, Table

LARGEST, MEAN = "largest log-probability error", "mean log-probability error"
OTHER_TOKENS = "greedy tokens that differ"
SMALLEST_SHOWN = 1e-8
"""Of differences, on logarithmic scales."""


def agreement_figures(logprobs: Logprobs, choices: Sequence[Choice]) -> list[Figure]:
    by_request = [logprobs.error[logprobs.request == i].tolist() for i in range(int(logprobs.request.max()) + 1)]
    how = (
        f"|served - plain| of {len(logprobs.error):,} log-probabilities: the token there and the likeliest, each place"
    )
    dtype = "the plain forward in the served dtype against float32, on the same entries"
    return [
        Figure.of(LARGEST, by_request, "max", "nats", f"largest {how}", better="lower"),
        Figure.of(MEAN, by_request, "mean", "nats", f"mean {how}", better="lower"),
        Figure("largest rounding of log-probabilities", float(logprobs.rounding.max()), "nats", f"largest of {dtype}"),
        Figure("mean rounding of log-probabilities", float(logprobs.rounding.mean()), "nats", f"mean of {dtype}"),
        Figure(
            OTHER_TOKENS,
            len(choices),
            "",
            "tokens that are not the likeliest of the plain forward, given the same tokens before",
            better="lower",
        ),
    ]


def agreement_checks(logprobs: Logprobs, choices: Sequence[Choice]) -> list[Check]:
    worst, allowed = float(logprobs.error.max()), logprobs.tolerance
    at, mean = int(logprobs.error.argmax()), float(logprobs.error.mean())
    where = f"request {logprobs.request[at]}, position {logprobs.position[at]}"
    wrong = [c for c in choices if not c.margin <= 2 * allowed]
    ties = f", {len(choices) - len(wrong)} where it is as good as a tie" if len(choices) > len(wrong) else ""
    return [
        Check(
            "log-probabilities are the checkpoint's",
            worst <= allowed,
            f"off by up to {worst:.2g} nats ({where}), {allowed:.2g} allowed",
            (LARGEST,),
        ),
        Check(
            "log-probabilities are right on average",
            mean <= logprobs.mean_tolerance,
            f"off by {mean:.2g} nats on average, {logprobs.mean_tolerance:.2g} allowed",
            (MEAN,),
        ),
        Check(
            "greedy tokens are the checkpoint's",
            not wrong,
            f"{len(wrong)} of {_num_generated(logprobs)} others than the plain forward's{ties}",
            (OTHER_TOKENS,),
        ),
    ]


def _num_generated(logprobs: Logprobs) -> int:
    places = np.stack([logprobs.request, logprobs.position])[:, logprobs.generated]
    return np.unique(places, axis=1).shape[1]


def choice_table(choices: Sequence[Choice]) -> list[Table]:
    """None where there are none."""
    rows = [(str(c.request), str(c.position), str(c.served), str(c.plain), f"{c.margin:.2g} nats") for c in choices]
    header = ("request", "position", "served", "plain forward", "which it prefers by")
    return [Table("Greedy tokens that differ", header, rows)] if rows else []


def logprob_plot(logprobs: Logprobs) -> Plot:
    def draw(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        error, bad = np.maximum(logprobs.error, SMALLEST_SHOWN), ~(logprobs.error <= logprobs.tolerance)
        kinds = (("prompt", ~logprobs.generated), ("generated", logprobs.generated))
        for k, (name, of) in enumerate(kinds):
            panel.scatter(logprobs.position[of], error[of], s=9, color=theme.series(k), label=name, linewidths=0)
        if bad.any():
            panel.scatter(logprobs.position[bad], error[bad], s=12, color=theme.bad, label="too far off", linewidths=0)
        limit_line(panel, theme, logprobs.tolerance, "allowed")
        panel.set(yscale="log", xlabel="position in the sequence", ylabel="nats")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return Plot(
        "logprobs",
        "Log-probabilities, served against plain",
        "Every compared log-probability: how far the served one is from the plain float32 forward's. "
        f"Differences under {SMALLEST_SHOWN:g} are drawn there.",
        draw,
    )
