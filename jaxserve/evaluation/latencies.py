"""What clients waited for, as figures and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.evaluation.clients import Answer
from jaxserve.evaluation.plots import Theme, cumulative
from jaxserve.evaluation.result import Figure
from jaxserve.evaluation.statistics import Groups

MEANING = {
    "first token": "from when a request was due to its first token",
    "between tokens": "from token to token; tokens that come at once: 0",
    "whole answer": "from when a request was due to its last token",
}


def latencies(answers: Sequence[Answer]) -> dict[str, Groups]:
    """Seconds by name (those of ``MEANING``), one group for each answer that has any."""
    return {
        "first token": [[a.first] for a in answers],
        "between tokens": [a.gaps for a in answers if a.gaps],
        "whole answer": [[a.whole] for a in answers],
    }


def latency_figures(
    name: str, answers: Sequence[Answer], statistics: Sequence[str], runs: int, simulated: bool
) -> list[Figure]:
    """Of answers of so many ``runs``, under "NAME: latency, statistic"."""
    seen = f"as its client saw it; {len(answers)} requests of {runs} runs"
    return [
        Figure.of(
            f"{name}: {kind}, {of}",
            groups,
            of,
            "s",
            f"{MEANING[kind]}, {seen}",
            better="lower",
            simulated=simulated,
        )
        for kind, groups in latencies(answers).items()
        if groups
        for of in statistics
    ]


def draw_latencies(axes: Sequence[Any], theme: Theme, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Cumulative curves, one of the axes for each latency. Gaps between tokens that came together are left out."""
    groups = {name: latencies(of) for name, of in answers.items()}
    for panel, kind in zip(axes, MEANING, strict=True):
        values = {
            name: np.array([1e3 * x for group in of[kind] for x in group if x > 0]) for name, of in groups.items()
        }
        cumulative(panel, theme, {name: v for name, v in values.items() if len(v)}, "milliseconds")
        panel.set_title(kind)
    axes[0].set_ylabel("share")
