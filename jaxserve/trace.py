"""Where the time goes: what the engine does, step by step and request by request, as spans. No jax here.

``Trace`` is what an engine tells; ``EngineTrace`` makes spans of it, in three groups of tracks:

- *host*: the engine's thread. A ``step`` contains what was done in it, one after the other (schedule, build batch,
  dispatch, wait for the devices, update, detokenise); between two steps it is ``outside`` (the caller has the outputs)
  or ``idle`` (there was no request). So its spans add up to the whole time. Threads that tokenize have tracks too.
- *devices*: per replica and stage a span per step. It begins when the step was handed over and the one before it was
  done, and ends when the host saw it done: ``late`` if it was done before the host asked, so that part of the span is
  the host's doing. Inside, at its end: what the cost model predicts for collectives and for sampling.
- *requests*: per sequence its phases: queued, prefill, decode, preempted.

Spans are kept in memory and given to sinks (a file, telemetry) while the devices compute, or nobody asks for anything.
"""

from __future__ import annotations

import threading
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
"""Of the host; the second is that of the first thread that tokenizes, others follow."""
SPANS_IN_MEMORY = 4096
SECONDS_IN_MEMORY = 1.0
TOO_SHORT_SECONDS = 5e-6
"""What was done in less counts as part of what follows it: it would be half of all spans, and nothing of the time."""


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

    def rested(self) -> None:
        """The last request was aborted between two steps."""

    def tokenized(self, request_id: str, start: float, num_tokens: int) -> None:
        """A prompt became tokens; ``start`` as ``time.perf_counter`` has it. Any thread may call."""

    def added(self, requests: Sequence[Request], start: float) -> None:
        """The sequences of a request are queued, since ``start``."""

    def preempted(self, requests: Sequence[Request]) -> None:
        """They lost their blocks."""

    def started(self, schedules: Sequence[SchedulerOutput], program: str) -> None:
        """A step was handed to the devices; ``schedules``: that of each stage, the first stage's first."""

    def passed(self) -> None:
        """Of the steps that were started, the oldest one has no tokens that the host would wait for."""

    def landed(self, advanced: Sequence[Advanced], done: float, late: bool) -> None:
        """The host saw at ``done`` that the oldest one is; ``late``: it was before the host asked."""

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
    loads: list[tuple[int, str, dict[str, Any]]]
    """(track, name, what its replica and stage have to do)"""


class EngineTrace(Trace):
    """Makes spans of what one engine tells."""

    def __init__(self, sinks: Sequence[Sink], num_stages: int, costs: Mapping[str, StepCost]) -> None:
        """``costs``: of each program, where they are known."""
        self._sinks, self._num_stages, self._costs = tuple(sinks), num_stages, costs
        self._spans: list[Span] = []
        self._tokenized: deque[Span] = deque()  # other threads append to it
        self._lock = threading.Lock()
        self._tokenizers: dict[int, int] = {}  # thread -> track
        self._written = 0.0  # when
        self._is_closed = False
        self._last = time.perf_counter()
        self._parts: list[tuple[str, float, float]] = []
        self._gap = "idle"  # what the time until the next step is called
        self._num_steps = 0
        self._num_sequences = 0
        self._sequences: dict[str, _Sequence] = {}
        self._prefilling: dict[str, _Sequence] = {}
        self._in_flight: deque[_Started] = deque()
        self._passed: list[_Started] = []
        self._num_forgotten = 0  # steps that land although nobody waits for them
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
            self._close_steps(self._last, late=True)
            self._write()

    def rested(self) -> None:
        if self._gap == "outside":
            now = time.perf_counter()
            self._spans.append(Span(HOST, ENGINE_TRACK, "outside", self._last, now))
            self._gap, self._last = "idle", now
            # What is in flight is for nobody, and is read when somebody comes: the pause is not its time.
            self._num_forgotten += len(self._in_flight)
            self._passed.extend(self._in_flight)
            self._in_flight.clear()
            self._close_steps(now, late=True)
        self._write()

    def tokenized(self, request_id: str, start: float, num_tokens: int) -> None:
        args, thread = {"request": request_id, "tokens": num_tokens}, threading.get_ident()
        with self._lock:
            track = self._tokenizers.setdefault(thread, TOKENIZER_TRACK + len(self._tokenizers))
        self._tokenized.append(Span(HOST, track, "tokenize", start, time.perf_counter(), args))

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

    def preempted(self, requests: Sequence[Request]) -> None:
        now = time.perf_counter()
        for request in requests:
            sequence = self._sequences[request.request_id]
            self._prefilling.pop(request.request_id, None)
            sequence.num_preemptions += 1
            self._enter(sequence, "preempted", now)

    def started(self, schedules: Sequence[SchedulerOutput], program: str) -> None:
        now = time.perf_counter()
        for rows in schedules[0].replicas:
            for scheduled in rows:
                if scheduled.is_new:
                    sequence = self._sequences[scheduled.request.request_id]
                    self._prefilling[scheduled.request.request_id] = sequence
                    self._enter(sequence, "prefill", now)
        loads = [
            (1 + replica * self._num_stages + stage, *self._load(rows, schedule.is_empty))
            for stage, schedule in enumerate(schedules)
            for replica, rows in enumerate(schedule.replicas)
        ]
        self._num_steps += 1
        self._in_flight.append(_Started(self._num_steps, now, program, loads))

    def _load(self, rows: Sequence[Any], nobody: bool) -> tuple[str, dict[str, Any]]:
        """What to call it; numbers of the sequences that decode, and (number, start, tokens) of the chunks of prompts,
        or of what is computed again; 0 stands for a sequence that has ended since. ``nobody``: no replica has any."""
        decodes: list[int] = []
        chunks: list[tuple[int, int, int]] = []
        known = self._sequences
        for s in rows:
            sequence = known.get(s.request.request_id)
            number = 0 if sequence is None else sequence.number
            if s.start >= len(s.request.prompt_token_ids) and s.count <= max(s.samples, 1):
                decodes.append(number)
            else:
                chunks.append((number, s.start, s.count))
        name = "decode" if not chunks else "mixed" if decodes else "prompts"
        if not rows:
            name = "bubble" if nobody and self._num_stages > 1 else "padding"
        return name, {"tokens": sum(s.count for s in rows), "decodes": decodes, "chunks": chunks}

    def passed(self) -> None:
        if self._num_forgotten:
            self._num_forgotten -= 1
        elif self._in_flight:
            self._passed.append(self._in_flight.popleft())

    def landed(self, advanced: Sequence[Advanced], done: float, late: bool) -> None:
        if not self._num_forgotten:
            self.passed()
            self._close_steps(done, late)
        else:
            self._num_forgotten -= 1
        if self._prefilling:
            for request, _ in advanced:
                sequence = self._prefilling.pop(request.request_id, None)
                if sequence is not None:
                    self._enter(sequence, "decode", done)

    def _close_steps(self, done: float, late: bool) -> None:
        """Of several that nobody saw end, or begin, each gets the same share of the time."""
        steps, self._passed = self._passed, []
        start = max(steps[0].at, self._devices_free) if steps else done
        for i, step in enumerate(steps):
            begin, end = (start + (done - start) * k / len(steps) for k in (i, i + 1))
            for track, name, load in step.loads:
                self._device_spans(step, track, name, load, begin, end, late)
        self._devices_free = done

    def _device_spans(
        self, step: _Started, track: int, name: str, load: dict[str, Any], start: float, end: float, late: bool
    ) -> None:
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
        self._num_forgotten = 0
        self.mark("failed")
        self.end(is_busy=False)

    # -- sinks -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if len(self._spans) > SPANS_IN_MEMORY or time.perf_counter() - self._written > SECONDS_IN_MEMORY:
            self._write()
            self.mark("write trace")

    def _write(self) -> None:
        spans, self._spans = self._spans, []
        while self._tokenized:
            spans.append(self._tokenized.popleft())
        self._written = time.perf_counter()
        if self._is_closed:
            return
        spans.sort(key=lambda s: (s.group, s.track, s.start, -s.end))
        for sink in self._sinks:
            sink.write(spans)

    def close(self) -> None:
        self.rested()
        if not self._is_closed:
            self._is_closed = True
            for sink in self._sinks:
                sink.close()
