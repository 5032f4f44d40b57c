"""Where the time goes: what the engine does, step by step and request by request, as spans. No jax here.

``Trace`` is what an engine tells; ``EngineTrace`` makes spans of it, in three groups of tracks:

- *host*: the engine's thread. A ``step`` contains what was done in it, one after the other (schedule, build batch,
  dispatch, wait for the devices, update, detokenise); between two steps it is ``outside`` (the caller has the outputs)
  or ``idle`` (there was no request). So its spans add up to the whole time. Tokenizing has a track of its own.
- *devices*: per replica and stage a span per step. It begins when the step was handed over and the one before it was
  done, and ends when the host saw it done, which is later than it was where the host had not waited (``late``). Inside,
  at its end: what the cost model predicts for collectives and for sampling.
- *requests*: per sequence its phases: queued, prefill, decode, preempted.

Spans are kept in memory and given to sinks (a file, telemetry) while the devices compute, or nobody asks for anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jaxserve.request import Request
from jaxserve.scheduler import Advanced, SchedulerOutput

HOST, DEVICES, REQUESTS = 1, 2, 3
"""Groups of tracks."""
ENGINE_TRACK, TOKENIZER_TRACK = 1, 2
"""Of the host."""
SPANS_IN_MEMORY = 4096
TOO_SHORT_SECONDS = 5e-6
"""What was done in less counts as part of what follows it: it would be half of all spans, and nothing of the time."""
ON_TIME_SECONDS = 50e-6
"""A wait for the devices that took less had nothing to wait for: they were done before."""


class Span(NamedTuple):
    """Seconds as ``time.perf_counter`` counts them."""

    group: int
    track: int
    """Of a request: the number of its sequence. Of devices: 1 + replica x stages + stage."""
    name: str
    start: float
    end: float
    args: Mapping[str, Any] = {}


class Sink(Protocol):
    """Where spans go: of a track, in order of their starts, and each after the one that it lies in."""

    def write(self, spans: Sequence[Span]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class StepCost:
    """What the cost model says of a program on the GPU that it would run on, all rows filled."""

    collective_bytes: Mapping[str, int]
    """By mesh axes, of one device."""
    seconds: float
    collective_seconds: float
    sampling_seconds: float
    """Of the unembedding, which reads the vocabulary's weights, and of sampling."""


class Trace:
    """Told by an engine what it does. This one forgets it."""

    def begin(self) -> None:
        """A step of the engine begins."""

    def mark(self, what: str) -> None:
        """What was done since the last mark, or the step's beginning, was ``what``."""

    def end(self, is_busy: bool) -> None:
        """It is over; ``is_busy``: there will be another."""

    def tokenized(self, request_id: str, start: float, num_tokens: int) -> None:
        """A prompt became tokens; ``start`` as ``time.perf_counter`` has it. Any thread may call."""

    def added(self, requests: Sequence[Request], start: float) -> None:
        """The sequences of a request are queued, since ``start``."""

    def started(self, schedules: Sequence[SchedulerOutput], program: str) -> None:
        """A step was handed to the devices; ``schedules``: that of each stage, the first stage's first."""

    def passed(self) -> None:
        """Of the steps that were started, the oldest one has no tokens that the host would wait for."""

    def landed(self, advanced: Sequence[Advanced], waited: float, done: float) -> None:
        """The oldest one is done: the host waited for it from ``waited`` to ``done``."""

    def ended(self, request: Request) -> None:
        """A sequence has finished or was aborted."""

    def failed(self) -> None:
        """A step raised; nobody reads what is in flight."""

    def flush(self) -> None:
        """There is time for it."""

    def close(self) -> None:
        """Nothing more will come."""


@dataclass
class _Sequence:
    """A request on its track."""

    number: int
    arrived: float
    phase: str
    since: float
    phases: list[Span]
    """That are over."""
    num_preemptions: int = 0


class _Started(NamedTuple):
    """A step that the devices work on."""

    number: int
    at: float
    program: str
    loads: list[tuple[int, dict[str, Any]]]
    """(track, what its replica and stage have to do)"""


class EngineTrace(Trace):
    """Makes spans of what one engine tells."""

    def __init__(self, sinks: Sequence[Sink], num_stages: int, costs: Mapping[str, StepCost]) -> None:
        """``costs``: of each program, where they are known."""
        self._sinks, self._num_stages, self._costs = tuple(sinks), num_stages, costs
        self._spans: list[Span] = []
        self._last = time.perf_counter()
        self._parts: list[tuple[str, float, float]] = []
        self._gap = "idle"  # what the time until the next step is called
        self._num_steps = 0
        self._num_sequences = 0
        self._sequences: dict[str, _Sequence] = {}
        self._prefilling: dict[str, _Sequence] = {}
        self._in_flight: deque[_Started] = deque()
        self._passed: list[_Started] = []
        self._devices_free = 0.0  # since when

    # -- the host ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        now = time.perf_counter()
        self._spans.append(Span(HOST, ENGINE_TRACK, self._gap, self._last, now))
        self._last = now

    def mark(self, what: str) -> None:
        now = time.perf_counter()
        if now - self._last > TOO_SHORT_SECONDS:
            self._parts.append((what, self._last, now))
            self._last = now

    def end(self, is_busy: bool) -> None:
        if self._parts:
            self._spans.append(Span(HOST, ENGINE_TRACK, "step", self._parts[0][1], self._last))
            self._spans.extend(Span(HOST, ENGINE_TRACK, *part) for part in self._parts)
            self._parts.clear()
        self._gap = "outside" if is_busy else "idle"
        if not is_busy:
            self._write()

    def tokenized(self, request_id: str, start: float, num_tokens: int) -> None:
        args = {"request": request_id, "tokens": num_tokens}
        self._spans.append(Span(HOST, TOKENIZER_TRACK, "tokenize", start, time.perf_counter(), args))

    # -- requests ----------------------------------------------------------------------------------------------------

    def added(self, requests: Sequence[Request], start: float) -> None:
        now = time.perf_counter()
        if self._gap == "idle":
            self._spans.append(Span(HOST, ENGINE_TRACK, "idle", self._last, start))
            self._gap, self._last = "outside", start
        args = {"request": requests[0].request_id}
        self._spans.append(Span(HOST, ENGINE_TRACK, "add request", start, now, args))
        for request in requests:
            self._num_sequences += 1
            self._sequences[request.request_id] = _Sequence(self._num_sequences, start, "queued", start, [])

    def _enter(self, sequence: _Sequence, phase: str, now: float) -> None:
        """The next phase; the one before it is over."""
        sequence.phases.append(Span(REQUESTS, sequence.number, sequence.phase, sequence.since, now))
        sequence.phase, sequence.since = phase, now

    def ended(self, request: Request) -> None:
        sequence, now = self._sequences.pop(request.request_id), time.perf_counter()
        self._prefilling.pop(request.request_id, None)
        self._enter(sequence, "ended", now)
        args = {
            "request": request.request_id,
            "prompt_tokens": request.num_prompt_tokens,
            "cached_tokens": request.num_cached_tokens,
            "output_tokens": len(request.output_token_ids),
            "finish_reason": request.finish_reason,
            "preemptions": sequence.num_preemptions,
            "tenant": request.tenant,
            "replica": request.replica,
        }
        self._spans.append(Span(REQUESTS, sequence.number, "request", sequence.arrived, now, args))
        self._spans.extend(sequence.phases)

    # -- steps -------------------------------------------------------------------------------------------------------

    def started(self, schedules: Sequence[SchedulerOutput], program: str) -> None:
        now = time.perf_counter()
        entering = schedules[0]
        for request in entering.preempted:
            sequence = self._sequences[request.request_id]
            self._prefilling.pop(request.request_id, None)
            sequence.num_preemptions += 1
            self._enter(sequence, "preempted", now)
        for rows in entering.replicas:
            for scheduled in rows:
                if scheduled.is_new:
                    sequence = self._sequences[scheduled.request.request_id]
                    self._prefilling[scheduled.request.request_id] = sequence
                    self._enter(sequence, "prefill", now)
        loads = [
            (1 + replica * self._num_stages + stage, self._load(rows))
            for stage, schedule in enumerate(schedules)
            for replica, rows in enumerate(schedule.replicas)
        ]
        self._num_steps += 1
        self._in_flight.append(_Started(self._num_steps, now, program, loads))

    def _load(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Numbers of the sequences that decode, and (number, start, tokens) of the chunks of prompts; 0 stands for a
        sequence that has ended since."""
        decodes: list[int] = []
        chunks: list[tuple[int, int, int]] = []
        known = self._sequences
        for s in rows:
            sequence = known.get(s.request.request_id)
            number = 0 if sequence is None else sequence.number
            if s.start >= len(s.request.prompt_token_ids):
                decodes.append(number)
            else:
                chunks.append((number, s.start, s.count))
        return {"decodes": decodes, "chunks": chunks}

    def passed(self) -> None:
        self._passed.append(self._in_flight.popleft())

    def landed(self, advanced: Sequence[Advanced], waited: float, done: float) -> None:
        steps = [*self._passed, self._in_flight.popleft()]
        self._passed.clear()
        start, late = max(steps[0].at, self._devices_free), done - waited < ON_TIME_SECONDS
        for i, step in enumerate(steps):  # where one ended and the next began nobody saw: they share the time
            begin, end = (start + (done - start) * k / len(steps) for k in (i, i + 1))
            for track, load in step.loads:
                self._device_spans(step, track, load, begin, end, late)
        self._devices_free = done
        if self._prefilling:
            for request, _ in advanced:
                sequence = self._prefilling.pop(request.request_id, None)
                if sequence is not None:
                    self._enter(sequence, "decode", done)

    def _device_spans(
        self, step: _Started, track: int, load: dict[str, Any], start: float, end: float, late: bool
    ) -> None:
        name = _kind(load, self._num_stages)
        args = {"step": step.number, "program": step.program, "late": late, **load}
        self._spans.append(Span(DEVICES, track, name, start, end, args))
        cost = self._costs.get(step.program)
        if cost is None:
            return
        sampling = max(start, end - cost.sampling_seconds)
        args = {"seconds": cost.sampling_seconds}
        self._spans.append(Span(DEVICES, track, "sampling (predicted)", sampling, end, args))
        if cost.collective_bytes:
            begin = max(start, sampling - cost.collective_seconds)
            args = {"seconds": cost.collective_seconds, "bytes": cost.collective_bytes}
            self._spans.append(Span(DEVICES, track, "collectives (predicted)", begin, sampling, args))

    def failed(self) -> None:
        self._in_flight.clear()
        self._passed.clear()
        self.end(is_busy=False)

    # -- sinks -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if len(self._spans) > SPANS_IN_MEMORY:
            self._write()

    def _write(self) -> None:
        spans, self._spans = self._spans, []
        spans.sort(key=lambda s: (s.group, s.track, s.start, -s.end))
        for sink in self._sinks:
            sink.write(spans)

    def close(self) -> None:
        self._write()
        for sink in self._sinks:
            sink.close()


def _kind(load: Mapping[str, Any], num_stages: int) -> str:
    if load["chunks"]:
        return "mixed" if load["decodes"] else "prompts"
    if load["decodes"]:
        return "decode"
    return "bubble" if num_stages > 1 else "padding"
