"""One figure of what schedules did, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from schedule_log import RunLog
from schedule_report import Timeline, cumulative_service, latencies

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which nearly everybody can tell apart."""
GREY = "#BBBBBB"
LINES = ("-", "--", ":", "-.")
BINS = 150
MOST_TENANTS = 4

Runs = Mapping[str, tuple[RunLog, Timeline]]


def draw(logs: Mapping[str, RunLog], path: str, title: str) -> None:
    """Six panels, with one colour for each run."""
    runs = {name: (log, Timeline.of(log)) for name, log in logs.items()}
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E6E6E6",
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.5,
        "font.size": 9.5,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(16, 8.6), layout="constrained")
        (first, between, queue), (batch, memory, service) = axes
        _latency(first, runs, "ttft", "Time to first token", "requests")
        _latency(between, runs, "itl", "Time between tokens", "tokens")
        _queue(queue, runs)
        _batches(batch, runs)
        _memory(memory, runs)
        _service(service, runs)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        _key_of_runs(figure, runs)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _latency(axes: Axes, runs: Runs, kind: str, title: str, of: str) -> None:
    values = {name: np.sort(latencies(log)[kind]) for name, (log, _) in runs.items()}
    scale, unit = _unit(np.concatenate(list(values.values())))
    low = _show_as_log(axes, [v[v > 0] * scale for v in values.values() if (v > 0).any()])
    for i, (name, v) in enumerate(values.items()):
        if len(v):
            at = np.maximum(v, low / scale) * scale
            axes.step(*_thinned(at, np.arange(1, len(v) + 1) / len(v)), where="post", color=_colour(i), label=name)
    for p in (0.5, 0.9, 0.99):
        axes.axhline(p, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set(title=title, xlabel=unit, ylabel=f"share of {of}", ylim=(0, 1.01))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 0.99], ["0", "0.25", "0.5", "0.75", "0.9", "0.99"])


def _show_as_log(axes: Axes, values: list[np.ndarray]) -> float:
    """Where most values lie within less than a factor of 20 the axis stays linear; else it is logarithmic, from the
    returned value on."""
    if not values:
        return 0.0
    low = min(float(np.percentile(v, 0.5)) for v in values)
    high = max(float(np.percentile(v, 99.5)) for v in values)
    if high < 20 * low:
        axes.set_xlim(0, 1.05 * high)
        return 0.0
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(low / 1.2, max(v.max() for v in values) * 1.2)
    return low / 1.2


def _unit(values: np.ndarray) -> tuple[float, str]:
    return (1.0, "seconds") if len(values) and np.median(values) >= 1 else (1e3, "milliseconds")


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    keep = np.unique(np.linspace(0, len(x) - 1, most).astype(int))
    return x[keep], y[keep]


def _queue(axes: Axes, runs: Runs) -> None:
    quantities = ("running", "waiting")
    _over_time(axes, runs, _column, quantities)
    axes.set(title="Requests running and waiting", xlabel="seconds since the first arrival", ylabel="requests")
    axes.set_ylim(bottom=0)


def _batches(axes: Axes, runs: Runs) -> None:
    """Of one run, all rows of its steps, stacked; of several, their prompt and generated tokens as lines."""
    axes.set(title="Batch composition", xlabel="seconds since the first arrival", ylabel="token rows per step (mean)")
    if len(runs) > 1:
        _over_time(axes, runs, _column, ("prefill", "decode"))
    else:
        ((_, timeline),) = runs.values()
        names = ("decode", "prefill", "padding")
        binned = [_binned(timeline, timeline.columns[name]) for name in names]
        x, heights = binned[0][0], [np.nan_to_num(y) for _, y in binned]
        colours = (COLOURS[0], COLOURS[4], GREY)
        axes.stackplot(x, heights, labels=names, colors=colours, step="post", linewidth=0)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    axes.set_ylim(bottom=0)


def _column(timeline: Timeline, name: str) -> np.ndarray:
    return timeline.columns[name]


def _memory(axes: Axes, runs: Runs) -> None:
    """Of several runs only what is held: the rest is too close to it."""
    shown = ("held", "live (hold a token)") if len(runs) == 1 else ("held",)
    _over_time(axes, runs, lambda t, name: 100 * t.columns[name.split()[0]], shown)
    title = "KV cache" if len(runs) == 1 else "KV cache, blocks held"
    axes.set(title=title, xlabel="seconds since the first arrival", ylabel="% of the token slots")
    axes.set_ylim(0, 102)


def _service(axes: Axes, runs: Runs) -> None:
    """Lines of one run differ in colour by tenant, lines of several in dashes."""
    served = {name: cumulative_service(log) for name, (log, _) in runs.items()}
    last = {tenant: s[-1] for of_run in served.values() for tenant, s in of_run.items()}
    shown = sorted(sorted(last, key=lambda tenant: -last[tenant])[:MOST_TENANTS])
    for i, (name, (_, timeline)) in enumerate(runs.items()):
        ends = timeline.start + timeline.seconds
        for j, tenant in enumerate(shown):
            colour, line = (_colour(j), "-") if len(runs) == 1 else (_colour(i), LINES[j])
            if tenant in served[name]:
                axes.plot(*_thinned(ends, served[name][tenant] / 1e3), color=colour, linestyle=line)
    axes.set(title="Cumulative service", xlabel="seconds since the first arrival", ylabel="thousand weighted tokens")
    axes.set_ylim(bottom=0)
    more = f" (the {MOST_TENANTS} largest of {len(last)})" if len(last) > MOST_TENANTS else ""
    if len(last) > 1:
        _key(axes, shown, by_colour=len(runs) == 1, title="tenant" + more)


# -- time --------------------------------------------------------------------------------------------------------------


def _over_time(axes: Axes, runs: Runs, value: Callable[[Timeline, str], np.ndarray], quantities: Sequence[str]) -> None:
    """Colours are runs and dashes quantities; of a single run, colours are quantities."""
    for i, (_, timeline) in enumerate(runs.values()):
        for j, quantity in enumerate(quantities):
            single = len(runs) == 1
            x, y = _binned(timeline, value(timeline, quantity), BINS if single else BINS // 2)
            axes.plot(x, y, color=_colour(j if single else i), linestyle=LINES[0 if single else j], linewidth=1.3)
    if len(quantities) > 1:
        _key(axes, quantities, by_colour=len(runs) == 1)


def _binned(timeline: Timeline, values: np.ndarray, most: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Means over equal stretches of time, each step with the time it took; nan where there was no step."""
    if not len(values):
        return np.zeros(0), np.zeros(0)
    begin, end = timeline.start[0], (timeline.start + timeline.seconds).max()
    edges = np.linspace(begin, max(end, begin + 1e-9), min(most, max(2, len(values) // 2)) + 1)
    covered = np.diff(_integral(timeline, np.ones_like(values), edges))
    sums = np.diff(_integral(timeline, values, edges))
    with np.errstate(invalid="ignore", divide="ignore"):
        return edges[:-1], np.where(covered > 1e-12, sums / covered, np.nan)


def _integral(timeline: Timeline, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of the function that is ``values`` during the steps and zero between them, from the start to each of ``at``."""
    starts = timeline.start
    stops = np.minimum(starts + timeline.seconds, np.r_[starts[1:], np.inf])
    points = np.stack([starts, np.maximum(starts, stops)], axis=1).ravel()
    areas = np.stack([np.zeros_like(starts), values * np.maximum(0, stops - starts)], axis=1).ravel()
    return np.interp(at, points, np.cumsum(areas))


# -- keys --------------------------------------------------------------------------------------------------------------


def _key_of_runs(figure: Figure, runs: Runs) -> None:
    if len(runs) > 1:
        handles = [Line2D([], [], label=name, color=_colour(i)) for i, name in enumerate(runs)]
        figure.legend(handles=handles, loc="outside upper right", ncols=5, fontsize=9.5)


def _key(axes: Axes, quantities: Sequence[str], by_colour: bool, title: str | None = None) -> None:
    """What colours mean in the plot of one run, or dashes in that of several."""
    looks: list[tuple[str, Any]] = [
        (_colour(j), "-") if by_colour else ("#444444", LINES[j]) for j in range(len(quantities))
    ]
    handles = [
        Line2D([], [], label=name or "(none)", color=colour, linestyle=line)
        for name, (colour, line) in zip(quantities, looks, strict=True)
    ]
    axes.legend(handles=handles, loc="best", title=title, title_fontsize=8.5)
