"""Where does the time go? Reads a trace that an engine wrote (``trace=FILE``, ``--trace FILE`` of every command).

Prints what the engine's thread did, what the devices did, how long requests waited for what, what was communicated,
and names the bottleneck with its evidence; ``--request`` adds the way of one request through it all. With a profile
(``LLM.start_profile``), each device's own time and collectives are measured: an uneven pipeline is found.

    jaxserve generate "Q: 12+5=" --trace trace.json
    python scripts/trace_report.py trace.json --request 0
    python scripts/trace_report.py trace.json --profile profile --out report
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median_low
from typing import Annotated, Any

import numpy as np
import typer

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.output import bytes_text, seconds_text
from jaxserve.evaluation.command import begin, finish
from jaxserve.evaluation.engine_trace import WAIT, Cause, EngineTraceFile, Event, Journey, num_tokens
from jaxserve.evaluation.flags import ReportFlags
from jaxserve.evaluation.plots import Plot, Theme
from jaxserve.evaluation.profile import (
    Operation,
    collective_seconds,
    collective_share,
    read_operations,
    typical_seconds,
)
from jaxserve.evaluation.result import Check, Figure, Result, Table

QUESTION = "Where does the time go, and what would have to change?"
LEAST_COVERED = 0.95
UNEVEN = 1.5
PHASES = ("queued", "prefill", "decode", "preempted")
MOST_LANES = 60
MOST_ROWS = 40


@epilog(
    "python scripts/trace_report.py trace.json",
    "python scripts/trace_report.py trace.json --request 3 --profile profile --out report --json",
)
def trace_report(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What an engine wrote.")],
    report: ReportFlags,
    request: Annotated[
        str | None, typer.Option(metavar="ID", help="Show this request's way; none = the slowest one's.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of the same devices, by start_profile and stop_profile.")
    ] = None,
    uneven: Annotated[
        float, typer.Option(min=1, help="Times the median that a device may compute; more fails.")
    ] = UNEVEN,
) -> None:
    """Time per component, one request's timeline, communication, and the bottleneck with its evidence.

    Exit code 1 if the trace is not whole (spans that do not nest, or do not add up to 95 % of the time), or if a
    device of the profile computes for longer than the others.
    """
    found = EngineTraceFile(trace)
    if not found.journeys or not found.busy_seconds:
        raise ValueError(f"{trace}: no request has been computed in it")
    chosen = _choose(found, request)
    result = begin("trace_report", QUESTION, {"trace": trace, "profile": profile}, 0, None)
    operations = None if profile is None else read_operations(profile)
    causes = found.causes(None if operations is None else collective_share(operations))
    result.checks += _checks(found)
    result.figures += _figures(found, causes)
    result.tables += [_causes(causes), _host(found), _phases(found), _communication(found), _way(found, chosen)]
    if operations is not None:
        _add_profile(result, operations, uneven)
    result.samples = {"bottleneck": causes[0].name, "evidence": causes[0].evidence, "request": chosen.name}
    result.tables.append(Table("Bottleneck", ("", "evidence"), [(causes[0].name, causes[0].evidence)]))
    finish(result, _plots(found, causes, chosen), report)


def _choose(found: EngineTraceFile, request: str | None) -> Journey:
    if request is None:
        return max(found.journeys, key=lambda j: j.whole.seconds)
    names = [j.name for j in found.journeys]
    names = names if request in names else [name.rpartition("#")[0] or name for name in names]  # an AsyncLLM's number
    if request not in names:
        listed = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
        raise ValueError(f"--request {request}: not in {found.path}; there are {listed}")
    return found.journeys[names.index(request)]


# -- checks and figures ------------------------------------------------------------------------------------------------


def _checks(found: EngineTraceFile) -> list[Check]:
    wrong, share = found.misnested(), found.covered_share
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [
        Check("spans nest", not wrong, wrong[0] + more if wrong else f"all {len(found.events)} of them"),
        Check(
            "spans add up to the whole time",
            share >= LEAST_COVERED,
            f"{share:.1%} of {seconds_text(found.wall_seconds)}, at least {LEAST_COVERED:.0%}",
            ("covered by spans",),
        ),
    ]


def _figures(found: EngineTraceFile, causes: Sequence[Cause]) -> list[Figure]:
    journeys, busy = found.journeys, found.busy_seconds
    first = [[sum(j.seconds(p) for p in ("queued", "prefill"))] for j in journeys]
    tokens = sum(j.whole.args["output_tokens"] for j in journeys)
    spans = "from the spans of the engine's thread"
    return [
        Figure("time with something to do", busy, "s", f"{spans}, without idle", better="lower"),
        Figure("covered by spans", found.covered_share, "", f"{spans}; the rest is between them", better="higher"),
        Figure("devices at work", found.device_seconds / busy, "", "union of the steps that the host waited for"),
        Figure("output", tokens / busy, "tok/s", f"{tokens} tokens of {len(journeys)} sequences", better="higher"),
        Figure("requests' time in the queue", _queued(journeys), "", "of all their time", better="lower"),
        Figure.of("queued and prefill", first, "median", "s", "from arrival to the first token", better="lower"),
        Figure("the bottleneck's share", causes[0].seconds / busy, "", causes[0].name),
    ]


def _queued(journeys: Sequence[Journey]) -> float:
    return sum(j.seconds("queued") for j in journeys) / sum(j.whole.seconds for j in journeys)


# -- tables ------------------------------------------------------------------------------------------------------------


def _causes(causes: Sequence[Cause]) -> Table:
    rows = [(c.name, seconds_text(c.seconds), c.evidence) for c in causes if c.seconds > 0]
    return Table("What takes the time", ("", "seconds", "evidence"), rows)


def _host(found: EngineTraceFile) -> Table:
    counts = {name: sum(e.name == name for e in found.engine) for name in found.host_seconds}
    tokenizing = sum(e.seconds for e in found.tokenized)
    rows = [
        (
            name,
            seconds_text(s),
            f"{s / found.wall_seconds:.1%}",
            str(counts[name]),
            seconds_text(s / max(1, counts[name])),
        )
        for name, s in sorted(found.host_seconds.items(), key=lambda item: -item[1])
    ]
    if found.tokenized:
        each = tokenizing / len(found.tokenized)
        share = f"{tokenizing / found.wall_seconds:.1%}"
        rows.append(("tokenizer", seconds_text(tokenizing), share, str(len(found.tokenized)), seconds_text(each)))
    return Table("Components on the host", ("component", "in all", "of the time", "times", "each"), rows)


def _phases(found: EngineTraceFile) -> Table:
    rows = []
    for phase in PHASES:
        seconds = [j.seconds(phase) for j in found.journeys]
        if any(seconds):
            middle, high = np.percentile(seconds, [50, 90])
            share = sum(seconds) / sum(j.whole.seconds for j in found.journeys)
            rows.append((phase, seconds_text(middle), seconds_text(high), seconds_text(max(seconds)), f"{share:.0%}"))
    return Table("What requests spend their time on", ("phase", "median", "p90", "longest", "of all"), rows)


def _communication(found: EngineTraceFile) -> Table:
    rows = []
    for name in dict.fromkeys(e.args["program"] for e in found.steps):
        steps = {e.args["step"]: e for e in found.steps if e.args["program"] == name}
        cost = found.programs.get(name)
        if cost is None:
            rows.append((name, str(len(steps)), "unknown", ""))
            continue
        carried = ", ".join(f"{bytes_text(size)} over {axes}" for axes, size in cost["collective_bytes"].items())
        predicted = seconds_text(cost["collective_seconds"]) if carried else ""
        rows.append((name, str(len(steps)), carried or "nothing", predicted))
    on = f"predicted on {found.gpu}"
    return Table("Communication of a step", ("program", "steps", "each device sends", on), rows)


def _way(found: EngineTraceFile, journey: Journey) -> Table:
    """Of one request, in order."""
    start = journey.whole.start
    whole = journey.name, journey.name.rpartition("/")[0]  # of several completions
    callers = {*whole, *(name.rpartition("#")[0] for name in whole)}
    tokenized = [e for e in found.tokenized if e.args["request"] in callers]
    events = [(e.start, e, f"{e.args['tokens']} tokens") for e in tokenized]
    events += [(p.start, p, _phase_text(found, journey, p)) for p in journey.phases]
    for step in found.steps:
        chunks = [c for c in step.args["chunks"] if c[0] == journey.number]
        stage = f", stage {(step.track - 1) % found.num_stages}" if found.num_stages > 1 else ""
        events += [
            (step.start, step, f"{step.args['program']}{stage}: its tokens {b} to {b + n}") for _, b, n in chunks
        ]
    rows = [
        (f"{(at - start) * 1e3:+.2f} ms", e.name, seconds_text(e.seconds), text)
        for at, e, text in sorted(events, key=lambda item: (item[0], -item[1].end))
    ]
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS - 1], ("", f"and {len(rows) - MOST_ROWS + 1} more", "", "")]
    args = journey.whole.args
    facts = (
        f"{args['prompt_tokens']} prompt tokens ({args['cached_tokens']} cached), "
        f"{args['output_tokens']} output tokens; ended: {args['finish_reason']}"
    )
    rows = [("arrival", "request", seconds_text(journey.whole.seconds), facts), *rows]
    return Table(f"Request {journey.name}", ("since its arrival", "what", "took", ""), rows)


def _phase_text(found: EngineTraceFile, journey: Journey, phase: Event) -> str:
    if phase.name != "decode":
        return ""
    last = found.num_stages - 1
    steps = {
        e.args["step"]: e
        for e in found.steps
        if journey.number in e.args["decodes"] and (e.track - 1) % found.num_stages == last
        if e.start < phase.end and e.end > phase.start
    }
    if not steps:
        return "its only token came with the prompt"
    beside = sum(num_tokens(e) for e in steps.values()) / len(steps)
    longest = max(e.seconds for e in steps.values())
    return f"{len(steps)} steps, of {beside:.1f} tokens on average, the longest {seconds_text(longest)}"


# -- profile -----------------------------------------------------------------------------------------------------------


def _add_profile(result: Result, operations: Sequence[Operation], uneven: float) -> None:
    busy, links = typical_seconds(operations), collective_seconds(operations)
    middle = median_low(busy.values())  # of two, the quicker one
    slow = [device for device, seconds in busy.items() if seconds > uneven * middle]
    how = "operations in the profile but for collectives, each as quick as in a quarter of its runs"
    result.figures += [Figure(_device(device), seconds, "s", how, better="lower") for device, seconds in busy.items()]
    waits = "union of its collectives in the profile: data, and waiting for other ranks"
    result.figures += [Figure(f"device {d}: collectives", s, "s", waits, better="lower") for d, s in links.items()]
    seen = ", ".join(f"device {d} {seconds_text(s)}" for d, s in busy.items())
    result.checks.append(
        Check(
            "devices compute alike",
            not slow,
            f"{seen}; at most {uneven:g} times the median",
            tuple(_device(device) for device in slow),
        )
    )


def _device(device: int) -> str:
    return f"device {device}: computing"


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(found: EngineTraceFile, causes: Sequence[Cause], chosen: Journey) -> list[Plot]:
    shown = [c for c in causes if c.seconds > 0]
    host = sorted(((n, s) for n, s in found.host_seconds.items() if n != "idle"), key=lambda item: -item[1])
    journeys = found.journeys[:MOST_LANES]

    def draw_time(axes: Sequence[Any], theme: Theme) -> None:
        for panel, title, pairs in (
            (axes[0], "What takes the time", [(c.name, c.seconds) for c in shown]),
            (axes[1], "The engine's thread", host),
        ):
            names = [name for name, _ in pairs]
            waits = [theme.series(4) if name == WAIT else theme.series(0) for name in names]
            panel.barh(names, [seconds for _, seconds in pairs], color=waits)
            panel.invert_yaxis()
            panel.set(title=title, xlabel="seconds")

    def draw_requests(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        origin = min(j.whole.start for j in journeys)
        for number, phase in enumerate(PHASES):
            spans = [(p, row) for row, j in enumerate(journeys) for p in j.phases if p.name == phase]
            if spans:
                starts = [p.start - origin for p, _ in spans]
                widths, rows = [p.seconds for p, _ in spans], [row for _, row in spans]
                colour = theme.series((4, 1, 0, 3)[number])
                panel.barh(rows, widths, left=starts, height=0.8, color=colour, label=phase)
        if chosen in journeys:
            panel.annotate("◂", (1, journeys.index(chosen)), xycoords=("axes fraction", "data"), va="center")
        panel.set(xlabel="seconds", ylabel="request, in order of arrival")
        panel.invert_yaxis()
        panel.legend(loc="upper left", bbox_to_anchor=(0, -0.15), ncols=len(PHASES), frameon=False)

    first = f" The first {MOST_LANES} of {len(found.journeys)}." if len(found.journeys) > MOST_LANES else ""
    return [
        Plot(
            "time",
            "Where the time goes",
            "Left: what the time with something to do was spent on; the host counts where the devices waited for it. "
            "Right: what the engine's thread did; grey: it waited for the devices.",
            draw_time,
            panels=2,
            rows=max(len(shown), len(host)),
        ),
        Plot(
            "requests",
            "What requests wait for",
            f"Each request's phases, from its arrival to its end; ◂ marks the one in the table.{first}",
            draw_requests,
            rows=len(journeys),
        ),
    ]


def main() -> None:
    run_script(trace_report)


if __name__ == "__main__":
    main()
