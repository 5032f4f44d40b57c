"""Plots as PNG, each drawn once for light pages and once for dark ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np

DPI = 130


@dataclass(frozen=True)
class Theme:
    background: str
    ink: str
    grid: str
    bad: str
    """Of what a check failed on; no series has it."""
    colours: tuple[str, ...]

    def series(self, number: int) -> str:
        """They begin again after the last."""
        return self.colours[number % len(self.colours)]


LIGHT = Theme("#ffffff", "#1f2328", "#e3e6ea", "#d1242f", ("#0072b2", "#e69f00", "#009e73", "#a05195", "#6b7280"))
DARK = Theme("#16191d", "#e6e9ed", "#31363d", "#ff6b6b", ("#56b4e9", "#f0b840", "#2fc79b", "#d08fc4", "#9aa3ae"))
"""After Okabe and Ito, whose colours nearly everybody can tell apart; lighter on dark."""


@dataclass(frozen=True)
class Plot:
    """``draw(axes, theme)`` draws one panel for each of the axes."""

    name: str
    """Of its files: NAME.png and NAME-dark.png."""
    title: str
    caption: str
    draw: Callable[[Sequence[Any], Theme], None]
    panels: int = 1
    rows: int = 0
    """Names one under the other that it has to have room for."""


def require_matplotlib() -> None:
    """NotImplementedError where it is missing: to be asked before hours of work."""
    if find_spec("matplotlib") is None:
        raise NotImplementedError("reports need matplotlib: pip install 'jaxserve[plots]'")


def render(plot: Plot, theme: Theme) -> bytes:
    """PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(theme)):
        size = 4.6 * plot.panels if plot.panels > 1 else 7.6, max(3.6, 1.2 + 0.24 * plot.rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, plot.panels, squeeze=False)[0]
        plot.draw(axes, theme)
        figure.suptitle(plot.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        image = BytesIO()
        figure.savefig(image, format="png", dpi=DPI)
    return image.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    faces = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(ink, theme.ink),
        **dict.fromkeys(faces, theme.background),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": theme.grid,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "font.size": 9,
    }


def bars(
    axes: Any,
    theme: Theme,
    labels: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    bad: Callable[[str, int], bool] = lambda group, i: False,
    stacked: bool = False,
) -> None:
    """Bars of each group over ``labels``, side by side or stacked; red where ``bad(group, i)``."""
    at = np.arange(len(labels), dtype=np.float64)
    width = 0.7 if stacked else 0.8 / len(groups)
    below = np.zeros(len(labels))
    for k, (name, values) in enumerate(groups.items()):
        colours = [theme.bad if bad(name, i) else theme.series(k) for i in range(len(labels))]
        shift = 0.0 if stacked else (k - (len(groups) - 1) / 2) * width
        axes.bar(at + shift, values, width * 0.94, bottom=below if stacked else 0.0, color=colours)
        below = below + np.asarray(values, np.float64)
    axes.set_xticks(at, labels)
    axes.grid(axis="x", visible=False)
    key(axes, theme, list(groups))


def key(axes: Any, theme: Theme, names: Sequence[str]) -> None:
    """What the colours mean, in their order, right of the axes; nothing where there is one."""
    from matplotlib.patches import Patch

    if len(names) > 1:
        handles = [Patch(color=theme.series(k), label=name) for k, name in enumerate(names)]
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))


def cumulative(axes: Any, theme: Theme, series: Mapping[str, np.ndarray], label: str) -> None:
    """Share of the values up to x, x from small to large in powers of ten."""
    from matplotlib.ticker import LogLocator

    for k, (name, values) in enumerate(series.items()):
        x = np.sort(values)
        axes.step(x, np.arange(1, len(x) + 1) / len(x), where="post", color=theme.series(k), label=name)
    axes.set(xscale="log", xlabel=label, ylim=(0, 1.02))
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend(loc="lower right")


def limit_line(axes: Any, theme: Theme, value: float, text: str) -> None:
    """A dashed line that nothing should cross."""
    axes.axhline(value, color=theme.ink, linewidth=1, linestyle="--", label=text)
