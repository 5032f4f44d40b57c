"""A timeline of requests, one lane each: when they waited, when their prompt was computed, when tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.evaluation.plots import Theme

STALLED = 1
"""Series whose colour stalls have; classes take the others."""


@dataclass(frozen=True)
class Lane:
    """A request; times in seconds."""

    name: str
    group: int
    """Its class: lanes of one have one colour."""
    due: float
    prefills: list[tuple[float, float]]
    """Begin and end of each step that computed some of the prompt."""
    tokens: list[float]
    stalls: list[tuple[float, float]]
    """Gaps between tokens that were too long."""


def group_colour(theme: Theme, group: int) -> str:
    return theme.series(group if group < STALLED else group + 1)


def draw_lanes(axes: Any, theme: Theme, lanes: Sequence[Lane]) -> None:
    """From top to bottom, over milliseconds."""
    for y, lane in enumerate(lanes):
        colour = group_colour(theme, lane.group)
        axes.hlines(y, 1e3 * lane.due, 1e3 * lane.prefills[0][0], color=theme.ink, linewidth=0.7)
        axes.broken_barh(
            [(1e3 * begin, 1e3 * (end - begin)) for begin, end in lane.prefills],
            (y - 0.38, 0.76),
            facecolor=colour,
            edgecolor=theme.background,
            linewidth=0.4,
        )
        axes.broken_barh(
            [(1e3 * begin, 1e3 * (end - begin)) for begin, end in lane.stalls],
            (y - 0.22, 0.44),
            facecolor=theme.series(STALLED),
        )
        axes.vlines([1e3 * at for at in lane.tokens], y - 0.22, y + 0.22, color=colour, linewidth=0.6)
    axes.set(xlabel="milliseconds", ylim=(len(lanes) - 0.4, -0.6))
    axes.set_yticks(range(len(lanes)), [lane.name for lane in lanes], fontsize=7.5)
    axes.grid(axis="y", visible=False)


def lanes_key(figure: Any, theme: Theme, groups: Sequence[str]) -> None:
    """What lines, boxes, ticks and colours mean, below all axes."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], color=theme.ink, linewidth=0.7, label="waits")]
    for group, name in enumerate(groups):
        colour = group_colour(theme, group)
        tick = Line2D([], [], color=colour, marker="|", markersize=8, linestyle="none", label=f"{name}: token")
        handles += [Patch(color=colour, label=f"{name}: prompt"), tick]
    handles.append(Patch(color=theme.series(STALLED), label="stall"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
