"""One figure of how near kernels come to their limits, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from bench_kernels import Result

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which nearly everybody can tell apart."""
BAR = 0.22
"""Inches of a bar."""
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
"""So that a goal's line does not run through a figure."""


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """A panel for each op, a group of bars for each shape; a black line at each goal. What has no share of a limit (not
    measured on a GPU, or wrong) has no bar."""
    shown = [r for r in results if r.share is not None]
    if not shown:
        raise ValueError("nothing to draw: no kernel was held against a limit here (no GPU, or --small)")
    panels = {op: [r for r in shown if r.op == op] for op in dict.fromkeys(r.op for r in shown)}
    names = list(dict.fromkeys(r.implementation for r in shown))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    heights = [_height(panel) for panel in panels.values()]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(10, sum(heights) + 0.8),
            height_ratios=heights,
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, (op, panel) in zip(axes[:, 0], panels.items(), strict=True):
            _panel(axis, op, panel, colours)
        axes[-1, 0].set_xlabel("% of the limit in brackets, as measured in the same run")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
        goal = Line2D([], [], color="black", linewidth=2)
        figure.legend(
            [*handles, goal], [*names, "goal"], loc="outside lower center", ncols=len(names) + 1, frameon=False
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _height(panel: Sequence[Result]) -> float:
    """In inches."""
    return BAR * (len(panel) + 0.8 * len({r.case for r in panel})) + 0.45


def _panel(axis: Any, op: str, panel: Sequence[Result], colours: dict[str, str]) -> None:
    y, ticks, labels = 0.0, [], []
    for case in dict.fromkeys(r.case for r in panel):
        group = [r for r in panel if r.case == case]
        for i, result in enumerate(group):
            share = 100 * (result.share or 0.0)
            axis.barh(y + i, share, 0.85, color=colours[result.implementation])
            axis.text(min(share, 100) + 0.7, y + i, f"{share:.0f}", va="center", fontsize=7.5, bbox=BEHIND_TEXT)
        ends = y - 0.6, y + len(group) - 0.4
        if group[0].goal is not None:
            axis.vlines(100 * group[0].goal, *ends, color="black", linewidth=2)
        ticks.append(sum(ends) / 2)
        labels.append(f"{case} [{'copy' if group[0].goal_of == 'bandwidth' else 'product'}]")
        y += len(group) + 0.8
    axis.set_yticks(ticks, labels)
    axis.set_xlim(0, 105)
    axis.set_ylim(y - 0.6, -0.9)
    axis.set_title(op, loc="left", fontweight="bold", fontsize=9.5)
    axis.grid(axis="x", color="#E6E6E6")
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
