"""A trace that an engine wrote (``trace=FILE``), read again: whether it is whole, and where the time went.

Times are in seconds since the trace began. What the host did while the devices worked costs nothing, so a bottleneck
is looked for in the time for which the host waited for the devices' steps, and in the rest, which is the host's.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxserve.evaluation.profile import covered
from jaxserve.trace import DEVICES, ENGINE_TRACK, HOST, REQUESTS, TOKENIZER_TRACK
from jaxserve.trace_file import FORMAT

WAIT = "wait for the devices"
ROUNDING = 2e-9
"""Seconds by which two times in a file may be off: it has whole nanoseconds."""


@dataclass(frozen=True)
class Event:
    """A span."""

    group: int
    track: int
    name: str
    start: float
    end: float
    args: dict[str, Any]

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Journey:
    """A sequence, from its arrival to its end."""

    number: int
    whole: Event
    phases: list[Event]

    @property
    def name(self) -> str:
        return str(self.whole.args["request"])

    def seconds(self, phase: str) -> float:
        return sum(p.seconds for p in self.phases if p.name == phase)


@dataclass(frozen=True)
class Cause:
    """Something that takes the engine's time."""

    name: str
    seconds: float
    evidence: str


class EngineTraceFile:
    """Raises ValueError for a file that is no trace of an engine."""

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            other = content["otherData"]
            if other["format"] != FORMAT:
                raise ValueError(f"{path}: a trace of format {other['format']}, not {FORMAT}")
            self.path, self.gpu, self.is_simulated = path, other["gpu"], other["simulated"]
            self.num_stages, self.programs = other["stages"], other["programs"]
            self.events = list(_spans(content["traceEvents"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}: not a trace that an engine wrote (trace=FILE, --trace FILE)") from None

    # -- tracks ------------------------------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> list[Event]:
        """The engine's thread."""
        return [e for e in self.events if (e.group, e.track) == (HOST, ENGINE_TRACK)]

    @cached_property
    def tokenized(self) -> list[Event]:
        return [e for e in self.events if e.group == HOST and e.track >= TOKENIZER_TRACK]

    @cached_property
    def steps(self) -> list[Event]:
        """Of all replicas and stages, but for what is predicted inside."""
        return [e for e in self.events if e.group == DEVICES and "step" in e.args]

    @cached_property
    def awaited(self) -> list[Event]:
        """Steps that the host waited for. A late one was done before the host asked: what it took longer than the
        usual one is not known, and the host's doing."""
        return [e for e in self.steps if not e.args["late"]]

    @cached_property
    def journeys(self) -> list[Journey]:
        """In the order of their arrival."""
        found: dict[int, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.group == REQUESTS:
                found[event.track].append(event)
        return [
            Journey(number, next(e for e in events if e.name == "request"), [e for e in events if e.name != "request"])
            for number, events in sorted(found.items())
        ]

    # -- sums --------------------------------------------------------------------------------------------------------

    @cached_property
    def host_seconds(self) -> dict[str, float]:
        """What the engine's thread did: parts of its steps, and what was between them."""
        found: dict[str, float] = defaultdict(float)
        for event in self.engine:
            if event.name != "step":
                found[event.name] += event.seconds
        if "add request" in found:
            found["outside"] -= found["add request"]  # in which requests are added
        return found

    @property
    def busy_seconds(self) -> float:
        """With something to do."""
        return sum(self.host_seconds.values()) - self.host_seconds.get("idle", 0.0)

    @property
    def wall_seconds(self) -> float:
        """From the first event of the engine's thread to the last."""
        return max(e.end for e in self.engine) - min(e.start for e in self.engine)

    @property
    def covered_share(self) -> float:
        """Of the wall time: what the parts of steps, and what is between steps, add up to."""
        return sum(self.host_seconds.values()) / self.wall_seconds

    @property
    def device_seconds(self) -> float:
        """In which a step was running that the host waited for."""
        return covered((e.start, e.end) for e in self.awaited)

    def device_seconds_by(self, name: str) -> float:
        """Of the tracks' average, in steps of a kind: decode, prompts, mixed, padding, bubble."""
        return sum(e.seconds for e in self.awaited if e.name == name) / self._num_tracks

    @property
    def _num_tracks(self) -> int:
        return max(len({e.track for e in self.steps}), 1)

    # -- what takes the time -----------------------------------------------------------------------------------------

    def causes(self, measured: float | None = None) -> list[Cause]:
        """That add up to the time in which there was something to do, the longest first. ``measured``: the share of
        their steps that devices are in collectives, where a profile knows; else it is the predicted one on a GPU, and
        part of the steps where devices are simulated."""
        device, bubbles = self.device_seconds, self.device_seconds_by("bubble")
        padding, links = self._padding_seconds(), self._collective_seconds(measured)
        source = "predicted" if measured is None else "measured in the profile"
        found = [
            self._host_cause(max(0.0, self.busy_seconds - device)),
            Cause("pipeline bubbles", bubbles, self._share("stages had no batch", bubbles)),
            Cause("padding", padding, self._share("rows of steps that held no token, by their share of each", padding)),
            Cause("collectives", links, self._share(f"{source}: devices sent data, or waited for others,", links)),
        ]
        own = max(0.0, device - bubbles - padding - links)
        kinds = {name: self.device_seconds_by(name) for name in ("decode", "prompts", "mixed")}
        whole = sum(kinds.values()) or 1.0
        for name, seconds in kinds.items():
            of_kind = [e for e in self.awaited if e.name == name]
            found.append(Cause(f"{name} steps", own * seconds / whole, _step_evidence(of_kind)))
        return sorted(found, key=lambda cause: -cause.seconds)

    def _host_cause(self, idle: float) -> Cause:
        own = {name: s for name, s in self.host_seconds.items() if name not in (WAIT, "idle")}
        most = max(own, key=lambda name: own[name], default="nothing")
        evidence = self._share("the devices had nothing to do, or were done before the host asked,", idle)
        return Cause(
            "the host", idle, f"{evidence}; most of the host's own time is in {most!r} ({own.get(most, 0):.3f} s)"
        )

    def _share(self, what: str, seconds: float) -> str:
        return f"{what} for {seconds / self.busy_seconds:.0%} of the time" if self.busy_seconds else what

    def _padding_seconds(self) -> float:
        full = [e for e in self.awaited if e.name != "bubble"]
        return sum(e.seconds * (1 - min(1.0, num_tokens(e) / _rows(e))) for e in full) / self._num_tracks

    def _collective_seconds(self, measured: float | None) -> float:
        """Of the steps' time outside of padding: the measured share, or the predicted seconds on real GPUs."""
        seconds = 0.0
        for e in self.awaited:
            cost, busy = self.programs.get(e.args["program"]), num_tokens(e) / _rows(e)
            if measured is not None:
                seconds += measured * e.seconds * busy
            elif cost is not None and not self.is_simulated:
                seconds += min(cost["collective_seconds"], e.seconds) * busy
        return seconds / self._num_tracks

    # -- whether it is whole -----------------------------------------------------------------------------------------

    def misnested(self) -> list[str]:
        """Spans that begin inside of another one and end outside of it."""
        wrong = []
        tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
        for event in self.events:
            tracks[event.group, event.track].append(event)
        for events in tracks.values():
            open_: list[Event] = []
            for event in sorted(events, key=lambda e: (e.start, -e.end)):
                while open_ and open_[-1].end <= event.start + ROUNDING:
                    open_.pop()
                if open_ and event.end > open_[-1].end + ROUNDING:
                    wrong.append(
                        f"{event.name!r} at {event.start:.6f} s ends after {open_[-1].name!r}, in which it began"
                    )
                open_.append(event)
        return wrong


def num_tokens(step: Event) -> int:
    """That a step computed, padding not counted."""
    return step.args["tokens"]


def _rows(step: Event) -> int:
    """Token rows of a step's program, or of several steps in one."""
    found = [int(n) for n in re.findall(r"(?:tokens|steps)=(\d+)", step.args["program"])]
    return max(math.prod(found), num_tokens(step), 1)


def _step_evidence(steps: Sequence[Event]) -> str:
    if not steps:
        return "there were none"
    tokens, seqs = sum(map(num_tokens, steps)), sum(len(e.args["decodes"]) + len(e.args["chunks"]) for e in steps)
    mean = sum(e.seconds for e in steps) / len(steps)
    return (
        f"{len(steps)} of {mean * 1e3:.2f} ms, of {tokens / len(steps):.1f} tokens of {seqs / len(steps):.1f} sequences"
    )


def _spans(events: Iterable[dict[str, Any]]) -> Iterable[Event]:
    """Times in seconds; of asynchronous pairs, the end belongs to the beginning of the same name before it."""
    begun: dict[tuple[Any, ...], dict[str, Any]] = {}
    for e in events:
        start = e["ts"] / 1e6
        if e["ph"] == "X":
            yield Event(e["pid"], e["tid"], e["name"], start, start + e["dur"] / 1e6, e["args"])
        elif e["ph"] == "b":
            begun[e["pid"], e["id"], e["name"]] = e
        elif e["ph"] == "e":
            begin = begun.pop((e["pid"], e["id"], e["name"]))
            yield Event(e["pid"], e["id"], e["name"], begin["ts"] / 1e6, start, begin["args"])
