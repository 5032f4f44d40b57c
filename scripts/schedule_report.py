"""What a schedule did to its requests: watched step by step, summed up, and shown as a table.

Shared by simulate_scheduler.py and analyze_batches.py; schedule_plot.py draws the same figures. No jax here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NoReturn

import numpy as np
from schedule_log import RunLog, StepRow

from jaxserve.config import SchedulerConfig

PERCENTILES = (50, 90, 99)
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
PIPE_WIDTH = 160
"""Columns where nobody says how many there are."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


# -- summing up --------------------------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """The steps of a run as arrays, in seconds since its first arrival."""

    start: np.ndarray
    seconds: np.ndarray
    """Until the step's tokens were there; estimated where that is not known."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """The fields of ``StepRow``."""

    @classmethod
    def of(cls, log: RunLog) -> Timeline:
        table = np.array(log.steps, np.float64).reshape(-1, len(StepRow._fields))
        columns = dict(zip(StepRow._fields, table.T, strict=True))
        seconds = np.array(log.seconds)
        start = np.where(np.isnan(seconds), columns["scheduled"], np.array(log.ends) - seconds)
        usual = np.nanmedian(seconds) if np.isfinite(seconds).any() else 0.0
        return cls(start - first_arrival(log), np.where(np.isnan(seconds), usual, seconds), columns)


def first_arrival(log: RunLog) -> float:
    return min((r.arrival for r in log.requests), default=0.0)


def latencies(log: RunLog) -> dict[str, np.ndarray]:
    """Seconds: of every request (ttft, e2e, queue) or of every token after the first (itl)."""
    requests = log.requests
    ended = [r for r in requests if r.finished is not None and r.request.finish_reason != "abort"]
    return {
        "ttft": np.array([r.first_token - r.arrival for r in requests if r.first_token is not None]),
        "itl": np.array(log.gaps),
        "e2e": np.array([r.finished - r.arrival for r in ended if r.finished is not None]),
        "queue": np.array([r.first_scheduled - r.arrival for r in requests if r.first_scheduled is not None]),
    }


def percentiles(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float | None]:
    """mean, p50, p90, p99 and max; with ``weights``, the values below which that share of the weight lies."""
    names = ["mean", *(f"p{p}" for p in PERCENTILES), "max"]
    if not len(values):
        return dict.fromkeys(names)
    if weights is None or not weights.sum():
        found = [values.mean(), *np.percentile(values, PERCENTILES), values.max()]
    else:
        order = np.argsort(values, kind="stable")
        below = np.cumsum(weights[order]) / weights.sum()
        at = np.minimum(np.searchsorted(below, np.array(PERCENTILES) / 100), len(values) - 1)
        found = [np.average(values, weights=weights), *values[order][at], values.max()]
    return dict(zip(names, map(float, found), strict=True))


def summary(log: RunLog) -> dict[str, Any]:
    """Everything that the table shows, as plain numbers. Times in seconds, shares from 0 to 1."""
    timeline, times = Timeline.of(log), latencies(log)
    columns, config = timeline.columns, log.config
    reasons = Counter(r.request.finish_reason or "unfinished" for r in log.requests)
    tokens = columns["prefill"].sum() + columns["decode"].sum()
    budget = (config.max_num_batched_tokens * config.num_replicas) * (columns["num_steps"] == 1)
    ends = np.array(log.ends)
    seconds = float(np.nanmax(ends) - first_arrival(log)) if np.isfinite(ends).any() else 0.0
    prompts = sum(r.request.num_prompt_tokens for r in log.requests if r.first_token is not None)
    outputs = sum(len(r.request.output_token_ids) for r in log.requests)
    held = (columns["held"] * timeline.seconds).sum()
    return {
        "requests": {
            "arrived": len(log.requests) + log.rejected + log.refused,
            "finished": reasons["stop"] + reasons["length"],
            "aborted": reasons["abort"],
            "unfinished": reasons["unfinished"],
            "rejected": log.rejected,
            "refused": log.refused,
        },
        "seconds": seconds,
        "ttft_s": percentiles(times["ttft"]),
        "inter_token_s": percentiles(times["itl"]),
        "end_to_end_s": percentiles(times["e2e"]),
        "time_in_queue_s": percentiles(times["queue"]),
        "queue_length": percentiles(columns["waiting"], timeline.seconds),
        "running": percentiles(columns["running"], timeline.seconds),
        "throughput": {
            "requests_per_s": _share(reasons["stop"] + reasons["length"], seconds),
            "prompt_tokens_per_s": _share(prompts, seconds),
            "output_tokens_per_s": _share(outputs, seconds),
        },
        "tokens": {"prompt": prompts, "output": outputs},
        "batch": {
            "steps": len(log.steps),
            "step_s": percentiles(np.array(log.seconds)[np.isfinite(log.seconds)]),
            "tokens_per_step": _share(tokens, len(log.steps)),
            "prefill_share": _share(columns["prefill"].sum(), tokens),
            "decode_share": _share(columns["decode"].sum(), tokens),
            "computed_again_share": _share(columns["again"].sum(), tokens),
            "budget_use": _share(((columns["prefill"] + columns["decode"]) * (budget > 0)).sum(), budget.sum()),
            "padding_share": _share(columns["padding"].sum(), columns["padding"].sum() + tokens),
        },
        "preemptions": {
            "total": log.preempted,
            "swapped": log.swapped,
            "recomputed": log.preempted - log.swapped,
            "blocks_moved": int(columns["moved"].sum()),
        },
        "cache": {
            "prefix_hit_rate": _share(log.prefix_hits, log.prefix_queries),
            "kv_use_mean": _share(held, timeline.seconds.sum()),
            "kv_use_max": float(columns["held"].max(initial=0.0)),
            "kv_efficiency": _share((columns["live"] * timeline.seconds).sum(), held),
        },
        "tenants": tenants(log),
        "largest_service_gap": largest_gap(log),
        "host_us_per_step": _share(log.host_seconds * 1e6, len(log.steps)),
    }


def tenants(log: RunLog) -> dict[str, dict[str, Any]]:
    """Per tenant, in alphabetical order: what it asked for and what it got."""
    names = sorted({r.request.tenant for r in log.requests})
    service = Counter[str]()
    for of_step in log.service:
        service.update(of_step)
    whole, result = sum(service.values()), {}
    for name in names:
        own = [r for r in log.requests if r.request.tenant == name]
        first = np.array([r.first_token - r.arrival for r in own if r.first_token is not None])
        result[name] = {
            "weight": _weight(log.config, name),
            "requests": len(own),
            "prompt_tokens": sum(r.request.num_prompt_tokens for r in own if r.first_token is not None),
            "output_tokens": sum(len(r.request.output_token_ids) for r in own),
            "service": service[name],
            "share": _share(service[name], whole),
            "ttft_s": percentiles(first),
        }
    return result


def cumulative_service(log: RunLog) -> dict[str, np.ndarray]:
    """Per tenant, its service up to and with each step."""
    names = sorted({name for of_step in log.service for name in of_step})
    return {name: np.cumsum([of_step.get(name, 0.0) for of_step in log.service]) for name in names}


def largest_gap(log: RunLog) -> dict[str, Any] | None:
    """By how much one tenant's service per weight grew more than another's at most while both waited all the time;
    None if no two ever did."""
    served, largest = cumulative_service(log), None
    for a, b in combinations(served, 2):
        both = np.array([a in waiting and b in waiting for waiting in log.waiting])
        ahead = served[a] / _weight(log.config, a) - served[b] / _weight(log.config, b)
        starts = np.flatnonzero(both & ~np.r_[False, both[:-1]])
        ends = np.flatnonzero(both & ~np.r_[both[1:], False]) + 1
        for start, end in zip(starts, ends, strict=True):
            gap = float(np.ptp(ahead[start:end]))
            if largest is None or gap > largest["gap"]:
                largest = {"gap": gap, "tenants": [a, b]}
    return largest


def _weight(config: SchedulerConfig, tenant: str) -> float:
    known = config.fairness.tenants.get(tenant)
    return 1.0 if known is None else known.weight


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


# -- showing -----------------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return "–"
    for unit, factor in UNITS.items():
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}" if seconds < 1000 else f"{seconds:,.0f} s"
    return "0 s" if seconds == 0 else f"{seconds * 1e6:.2g} µs"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _three_times(values: Mapping[str, float | None]) -> str:
    """In the unit that suits the middle one."""
    found = [values[f"p{p}"] for p in PERCENTILES]
    middle = duration(found[1]).rpartition(" ")[2]
    factor = UNITS.get(middle, 1.0)
    return " / ".join(number(v if v is None else v / factor) for v in found) + f" {middle}".replace(" –", "")


def _three(values: Mapping[str, float | None]) -> str:
    return " / ".join(number(values[f"p{p}"]) for p in PERCENTILES)


def _rows(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values; a name without a value is a heading."""
    r, b, p, c, t = (s[name] for name in ("requests", "batch", "preemptions", "cache", "throughput"))
    left_out = [f"{r[name]:,} {name}" for name in ("aborted", "unfinished", "rejected", "refused") if r[name]]
    return [
        ("requests", ", ".join([f"{r['finished']:,} finished", *left_out])),
        ("time", duration(s["seconds"])),
        ("latency, p50 / p90 / p99", ""),
        ("first token", _three_times(s["ttft_s"])),
        ("between tokens", _three_times(s["inter_token_s"])),
        ("end to end", _three_times(s["end_to_end_s"])),
        ("until first scheduled", _three_times(s["time_in_queue_s"])),
        ("requests waiting", _three(s["queue_length"])),
        ("throughput", ""),
        ("requests/s", number(t["requests_per_s"])),
        ("prompt tokens/s", number(t["prompt_tokens_per_s"])),
        ("output tokens/s", number(t["output_tokens_per_s"])),
        ("batches", ""),
        ("steps", f"{b['steps']:,} of {duration(b['step_s']['p50'])} (median)"),
        ("requests running, mean", number(s["running"]["mean"])),
        ("tokens per step", number(b["tokens_per_step"])),
        ("prefill, decode", f"{percent(b['prefill_share'])}, {percent(b['decode_share'])}"),
        ("computed again", percent(b["computed_again_share"])),
        ("budget used", percent(b["budget_use"])),
        ("padding", percent(b["padding_share"])),
        ("memory", ""),
        ("preemptions", _preemptions(p)),
        ("prefix cache hits", percent(c["prefix_hit_rate"])),
        ("KV blocks held, mean, max", f"{percent(c['kv_use_mean'])}, {percent(c['kv_use_max'])}"),
        ("of these filled", percent(c["kv_efficiency"])),
        ("host", ""),
        ("scheduling, per step", duration(s["host_us_per_step"] and s["host_us_per_step"] / 1e6)),
    ]


def _preemptions(p: Mapping[str, int]) -> str:
    return f"{p['total']:,} ({p['swapped']:,} swapped)" if p["swapped"] else f"{p['total']:,}"


def print_report(summaries: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """One table with a column for each setting, and one of the tenants if there are several."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("")
    for name in summaries:
        table.add_column(name.replace(",", ",\n"), justify="right")
    for (name, first), *others in zip(*(_rows(s) for s in summaries.values()), strict=True):
        if not first:
            table.add_row()
            table.add_row(name, style="bold")
        else:
            table.add_row("  " + name, first, *(value for _, value in others))
    console.print(table)
    if any(len(s["tenants"]) > 1 for s in summaries.values()):
        console.print(_tenant_table(summaries))
        for name, s in summaries.items():
            of = f"{name}: " if len(summaries) > 1 else ""
            gap = _gap(s["largest_service_gap"])
            console.print(f"{of}largest gap of service per weight while both wait: {gap}")


def _gap(gap: Mapping[str, Any] | None) -> str:
    return "no two waited at once" if gap is None else f"{number(gap['gap'])} ({', '.join(gap['tenants'])})"


def _tenant_table(summaries: Mapping[str, Mapping[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="tenants", title_justify="left", title_style="bold", pad_edge=False)
    several = len(summaries) > 1
    for name in (*(["setting"] if several else []), "tenant"):
        table.add_column(name)
    for name in (
        "weight",
        "requests",
        "prompt\ntokens",
        "output\ntokens",
        "service",
        "share",
        "first token\np50 / p99",
    ):
        table.add_column(name, justify="right")
    for setting, s in summaries.items():
        for i, (name, t) in enumerate(s["tenants"].items()):
            counts = [number(t[k]) for k in ("weight", "requests", "prompt_tokens", "output_tokens", "service")]
            waits = f"{duration(t['ttft_s']['p50'])} / {duration(t['ttft_s']['p99'])}"
            first = [setting if i == 0 else ""] if several else []
            table.add_row(*first, name or "(none)", *counts, percent(t["share"]), waits)
    return table


def write_json(value: Any, target: str) -> None:
    """To a file, or with ``-`` to the terminal."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - writes them instead of the table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them (needs matplotlib)")


def show(logs: Mapping[str, RunLog], title: str, json_target: str | None, plot: str | None, **more: Any) -> None:
    """Table, JSON and plot of runs, by the names of their settings; ``more`` goes into the JSON."""
    summaries = {name: summary(log) for name, log in logs.items()}
    if json_target is not None:
        write_json({**more, "runs": summaries}, json_target)
    if plot is not None:
        from schedule_plot import draw

        draw(logs, plot, title)
    if json_target != "-":
        print_report(summaries, title)


def check_plot(parser: argparse.ArgumentParser, plot: str | None) -> None:
    """Before hours of work: whether there will be a plot."""
    if plot is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("--plot needs matplotlib: pip install 'jaxserve[plots]'")
