"""A scheduler watched step by step: what it did, and when. No jax here."""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

from tqdm import tqdm

from jaxserve.config import SchedulerConfig
from jaxserve.recording import Recording, replay
from jaxserve.request import Request, Status
from jaxserve.scheduler import Advanced, Scheduler, SchedulerOutput

QUEUED = (Status.WAITING, Status.SWAPPED)


@dataclass(slots=True)
class RequestLog:
    """When things happened to a request, in seconds; None = has not happened."""

    request: Request
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    charged: int = 0
    """Tokens that were computed or found before: computing them again is no service."""

    @property
    def arrival(self) -> float:
        return self.request.metrics.arrival_time


class StepRow(NamedTuple):
    """One step. Token counts are of all replicas together; ``kv_read`` is of the replica that reads most."""

    scheduled: float
    num_steps: int
    rows: int
    """Token rows of one replica, padding included."""
    prefill: int
    decode: int
    again: int
    """Tokens that had been computed before, among ``prefill``."""
    padding: int
    kv_read: int
    """Keys that the tokens look back on, each sequence's once."""
    moved: int
    """Blocks moved to host memory or back."""
    running: int
    waiting: int
    held: float
    """Share of the KV token slots whose blocks somebody holds."""
    live: float
    """Share of the KV token slots that hold a token."""


class RunLog:
    """What a ``WatchedScheduler`` saw. Times are seconds on the clock of the arrivals."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.requests: list[RequestLog] = []
        self.gaps = array("d")
        """Seconds between tokens of a request; those that arrive together share their gap evenly."""
        self.steps: list[StepRow] = []
        self.ends = array("d")
        """When each step's tokens reached the host; nan = never."""
        self.seconds = array("d")
        """How long each step took; nan = not known (an idle time follows, or it never ended)."""
        self.service: list[dict[str, float]] = []
        """Per step, service by tenant, as the fair policy counts it."""
        self.waiting: list[frozenset[str]] = []
        """Per step, tenants with requests that it left waiting."""
        self.preempted, self.swapped = 0, 0
        self.prefix_queries, self.prefix_hits = 0, 0
        self.rejected, self.refused = 0, 0
        self.refusal: str | None = None
        """Why the first of the refused could never run."""
        self.host_seconds = 0.0
        """In ``schedule`` and ``update``."""
        self._logs: dict[str, RequestLog] = {}
        self._num_waiting = Counter[str]()
        self._in_flight: deque[tuple[int, SchedulerOutput]] = deque()
        self._landed: list[tuple[int, list[tuple[RequestLog, int]]]] = []
        self._ended: list[RequestLog] = []
        self._idle = False
        self._busy_until = -math.inf
        self._typical: dict[tuple[int, int], deque[float]] = {}

    def note_added(self, request: Request) -> None:
        log = self._logs[request.request_id] = RequestLog(request)
        self.requests.append(log)
        self._num_waiting[request.tenant] += 1

    def note_finished(self, request: Request, was_queued: bool, idle: bool) -> None:
        log = self._logs[request.request_id]
        if log.finished is None:
            self._num_waiting[request.tenant] -= was_queued
            log.finished = math.nan
            self._ended.append(log)
        self._idle = idle

    def note_updated(self, output: SchedulerOutput, advanced: Iterable[Advanced], idle: bool) -> None:
        while self._in_flight[0][1] is not output:
            self._in_flight.popleft()
        step, _ = self._in_flight.popleft()
        tokens = [(self._logs[request.request_id], len(ids)) for request, ids in advanced]
        self._landed.append((step, tokens))
        for log, _ in tokens:
            if log.request.finish_reason is not None and log.finished is None:
                log.finished = math.nan
                self._ended.append(log)
        self._idle = idle

    # -- when --------------------------------------------------------------------------------------------------------

    def stamp(self, now: float, exact: bool = False) -> None:
        """What has landed since the last call was there at ``now``; unless that is ``exact`` or steps went on, it is
        taken to have been there after as long as such steps usually take."""
        estimated = self._idle and not exact
        for step, tokens in self._landed:
            row = self.steps[step]
            start = max(row.scheduled, self._busy_until)
            end = min(now, start + self._usual(row)) if estimated else now
            self.ends[step] = self._busy_until = end
            if not estimated:
                self.seconds[step] = end - start
                self._typical.setdefault((row.num_steps, row.rows), deque(maxlen=64)).append(end - start)
            for log, count in tokens:
                self._stamp_tokens(log, count, end)
        last = min(now, self._busy_until) if estimated else now
        for log in self._ended:
            log.finished = max(last, log.arrival)
        self._landed, self._ended, self._idle = [], [], False

    def close(self) -> None:
        """Nothing more comes."""
        self._idle = True
        self.stamp(math.inf)

    def _usual(self, row: StepRow) -> float:
        alike = self._typical.get((row.num_steps, row.rows)) or [s for known in self._typical.values() for s in known]
        return median(alike) if alike else 0.0

    def _stamp_tokens(self, log: RequestLog, count: int, end: float) -> None:
        if log.last_token is None:
            log.first_token = end
            self.gaps.extend([0.0] * (count - 1))
        else:
            self.gaps.extend([(end - log.last_token) / count] * count)
        log.last_token = end

    # -- what --------------------------------------------------------------------------------------------------------

    def note_scheduled(
        self, output: SchedulerOutput, now: float, scheduler: Scheduler, before: tuple[int, int]
    ) -> None:
        """``before``: the scheduler's counts of held and live token slots before it decided."""
        self.preempted += len(output.preempted)
        self.swapped += len(output.swap_outs)
        for request in output.preempted:
            self._num_waiting[request.tenant] += 1
        if output.is_empty:
            return
        self._in_flight.append((len(self.steps), output))
        service, again, kv_read = self._note_rows(output, now)
        tokens = sum(s.count for rows in output.replicas for s in rows)
        decode = sum(s.samples for rows in output.replicas for s in rows if _decodes(output, s.start, s.request))
        counters, slots = scheduler.counters, _token_slots(self.config)
        self.prefix_queries, self.prefix_hits = counters.prefix_cache_queries, counters.prefix_cache_hits
        self.steps.append(
            StepRow(
                scheduled=now,
                num_steps=output.num_steps,
                rows=output.bucket * output.num_steps,
                prefill=tokens - decode,
                decode=decode,
                again=again,
                padding=output.bucket * output.num_steps * len(output.replicas) - tokens,
                kv_read=kv_read,
                moved=sum(len(b) for m in (*output.swap_outs, *output.swap_ins) for b in m.blocks),
                running=scheduler.num_running,
                waiting=scheduler.num_waiting + scheduler.num_swapped,
                held=(counters.held_slots - before[0]) / slots,
                live=(counters.live_slots - before[1]) / slots,
            )
        )
        self.ends.append(math.nan)
        self.seconds.append(math.nan)
        self.service.append(service)
        self.waiting.append(frozenset(name for name, count in self._num_waiting.items() if count))

    def _note_rows(self, output: SchedulerOutput, now: float) -> tuple[dict[str, float], int, int]:
        """Service by tenant, tokens computed again, keys read."""
        fairness, several = self.config.fairness, output.num_steps > 1
        service: dict[str, float] = {}
        again = most_read = 0
        for rows in output.replicas:
            read = 0
            for s in rows:
                request, end = s.request, s.start + s.count
                log = self._logs[request.request_id]
                if s.is_new:
                    self._num_waiting[request.tenant] -= 1
                    log.charged = max(log.charged, s.start)
                    if log.first_scheduled is None:
                        log.first_scheduled = now
                known = log.charged
                if end > known:
                    prompt = max(0, min(end, request.num_prompt_tokens) - max(s.start, known))
                    worth = prompt * fairness.prompt_token_weight + s.samples * fairness.output_token_weight
                    service[request.tenant] = service.get(request.tenant, 0.0) + worth
                    log.charged = end
                again += max(0, min(known, end) - s.start)
                read += s.count * s.start + s.count * (s.count + 1) // 2 if several else end
            most_read = max(most_read, read)
        return service, again, most_read


def _decodes(output: SchedulerOutput, start: int, request: Request) -> bool:
    """Whether a row computes generated tokens."""
    return output.num_steps > 1 or start >= request.num_prompt_tokens


def _token_slots(config: SchedulerConfig) -> int:
    blocks = sum(config.blocks_of(window) - 1 for window in config.windows)
    return blocks * config.block_size * config.num_replicas


class WatchedScheduler(Scheduler):
    """Does what its base does, and keeps a log."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.log = RunLog(config)

    def add(self, request: Request) -> None:
        super().add(request)
        self.log.note_added(request)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, keep: int | None = None
    ) -> None:
        was_queued = request.status in QUEUED
        super().finish(request, reason, stop_reason, keep)
        self.log.note_finished(request, was_queued, not self.has_unfinished)

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        self.log.stamp(now)
        before = (self.counters.held_slots, self.counters.live_slots)
        start = time.perf_counter()
        output = super().schedule(now)
        self.log.host_seconds += time.perf_counter() - start
        self.log.note_scheduled(output, now, self, before)
        return output

    def update(self, output: SchedulerOutput, token_ids: list[list[list[int]]]) -> list[Advanced]:
        start = time.perf_counter()
        advanced = super().update(output, token_ids)
        self.log.host_seconds += time.perf_counter() - start
        self.log.note_updated(output, advanced, not self.has_unfinished)
        return advanced


def recorded_run(recording: Recording) -> tuple[RunLog, str | None]:
    """What happened, up to the first step that this scheduler decides otherwise, if there is one."""
    scheduler = WatchedScheduler(recording.config)
    bar = partial(tqdm, desc="reading", unit=" entries", delay=2, disable=None, leave=False)
    result = replay(recording, scheduler=scheduler, progress=bar)
    scheduler.log.close()
    return scheduler.log, result.difference
