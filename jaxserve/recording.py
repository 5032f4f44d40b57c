"""A scheduler that writes down what it is told and what it decides, and the way back.

A recording is gzipped JSON, one array per line, in the order of the calls: first ``["start", version, options,
config]``, then ``["add", request]``, ``["finish", id, reason, stop_reason, keep]``, ``["reset"]``, ``["schedule", now,
decision]`` and ``["update", step, tokens]``. Steps are the schedules that were not empty, counted from 0. With
asynchronous scheduling the next schedule comes before the update, and that is how it is replayed; a step that failed
has no update.
"""

from __future__ import annotations

import gzip
import json
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from jaxserve.config import FairnessConfig, SchedulerConfig, SwapConfig
from jaxserve.outputs import RequestMetrics
from jaxserve.request import Request
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.scheduler import Advanced, Scheduler, SchedulerOutput

VERSION = 1
PLAIN_FIELDS = (
    *("request_id", "prompt_token_ids", "seed", "max_tokens", "priority", "tenant", "cache_salt", "adapter"),
    *("waits_for_tokens", "single_steps", "reads_prefix_cache"),
)


class DecisionWriter:
    """Decisions as JSON has them. Of a table only what is new since the request's last row: blocks are only ever
    added, until the request leaves."""

    def __init__(self) -> None:
        self._written: dict[str, list[int]] = {}

    def write(self, output: SchedulerOutput) -> list[Any]:
        """[rows, bucket, num_steps, preempted, swap-outs, swap-ins, dropped]; of each replica, rows [id, start, count,
        samples, slot, is_new, new blocks per group]."""
        rows, *rest = output.decision()
        for row in (row for replica in rows for row in replica):
            name, is_new, tables = row[0], row[5], row[6]
            known = [0] * len(tables) if is_new else self._written.get(name, [0] * len(tables))
            row[6] = [table[n:] for table, n in zip(tables, known, strict=True)]
            self._written[name] = [len(table) for table in tables]
        return json.loads(json.dumps([rows, *rest]))


class RecordedScheduler(Scheduler):
    """Does what its base does, and keeps a recording in ``path``."""

    def __init__(self, config: SchedulerConfig, path: Path, options: dict[str, Any] | None = None) -> None:
        """``options``: of the engine, to build the same one again."""
        super().__init__(config)
        self._decisions = DecisionWriter()
        self._num_steps = 0
        self._started: deque[tuple[int, SchedulerOutput]] = deque()
        self._file = gzip.open(path, "wt", encoding="utf-8", compresslevel=3)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._write("start", VERSION, options or {}, asdict(config))

    def _write(self, *entry: Any) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
        if not self.has_unfinished:
            self._file.flush()  # an idle engine's recording can be read

    def add(self, request: Request) -> None:
        super().add(request)
        self._write("add", request_to_json(request))

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, keep: int | None = None
    ) -> None:
        super().finish(request, reason, stop_reason, keep)
        self._write("finish", request.request_id, reason, stop_reason, keep)

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        self._write("reset")

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        now = round(now, 6)  # what is written is what was decided on
        output = super().schedule(now)
        self._write("schedule", now, self._decisions.write(output))
        if not output.is_empty:
            self._started.append((self._num_steps, output))
            self._num_steps += 1
        return output

    def update(self, output: SchedulerOutput, token_ids: list[list[list[int]]]) -> list[Advanced]:
        advanced = super().update(output, token_ids)
        if not output.is_empty:
            while self._started[0][1] is not output:  # it failed
                self._started.popleft()
            self._write("update", self._started.popleft()[0], token_ids)
        return advanced

    def close(self) -> None:
        """Complete the file. Without this, what was written before the engine was idle can be read."""
        self._file.close()


class Recording:
    """A file that a RecordedScheduler wrote. Raises ValueError if it is none, OSError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            kind, version, self.options, config = next(self._lines())
        except (StopIteration, ValueError, TypeError):
            raise ValueError(f"{path}: not a recorded schedule") from None
        if (kind, version) != ("start", VERSION):
            raise ValueError(f"{path}: not a recorded schedule of version {VERSION}")
        try:
            self.config = config_from_json(config)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: recorded by another version of the scheduler ({error})") from None

    def _lines(self) -> Iterator[list[Any]]:
        """Entries up to the end, or up to where the writer was interrupted."""
        with gzip.open(self.path, "rt", encoding="utf-8") as file:
            try:
                for line in file:
                    if line.endswith("\n"):
                        yield json.loads(line)
            except EOFError:
                return
            except (gzip.BadGzipFile, zlib.error, ValueError) as error:
                raise ValueError(f"{self.path}: damaged ({error})") from None

    def entries(self) -> Iterator[list[Any]]:
        """All but the first. Raises ValueError where the file is damaged."""
        lines = self._lines()
        next(lines)
        return lines


class Device(Protocol):
    """What computes a replayed schedule's tokens."""

    def add(self, request: Request) -> None: ...

    def start(self, output: SchedulerOutput) -> None: ...

    def tokens(self, output: SchedulerOutput) -> list[list[list[int]]]: ...


@dataclass
class Replay:
    """What came of replaying a recording."""

    num_steps: int = 0
    num_requests: int = 0
    difference: str | None = None
    """The first step that differs and how, or None."""


Entries = Iterable[list[Any]]


def replay(
    recording: Recording,
    device: Device | None = None,
    scheduler: Scheduler | None = None,
    progress: Callable[[Entries], Entries] = iter,
) -> Replay:
    """Give a new scheduler the recorded events and compare its decisions, up to the first difference; with a
    ``device``, compute the tokens again and compare them too.

    ``scheduler``: another one than a plain ``Scheduler`` of the recorded config; ``progress`` wraps the entries.
    Raises ValueError where the recording cannot be followed.
    """
    replayer = _Replayer(scheduler or Scheduler(recording.config), device)
    for number, (kind, *entry) in enumerate(progress(recording.entries())):
        try:
            replayer.follow(kind, entry)
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ValueError(f"{recording.path}: entry {number + 1} ({kind}) cannot be followed: {reason}") from error
        if replayer.result.difference is not None:
            break
    return replayer.result


class _Replayer:
    def __init__(self, scheduler: Scheduler, device: Device | None) -> None:
        self.scheduler, self.device, self.result = scheduler, device, Replay()
        self._decisions = DecisionWriter()
        self._requests: dict[str, Request] = {}
        self._started: deque[tuple[int, SchedulerOutput]] = deque()

    def follow(self, kind: str, entry: list[Any]) -> None:
        if kind == "add":
            self._add(request_from_json(entry[0]))
        elif kind == "finish":
            self.scheduler.finish(self._requests[entry[0]], *entry[1:])
        elif kind == "reset":
            self.scheduler.reset_prefix_cache()
        elif kind == "schedule":
            self._schedule(*entry)
        elif kind == "update":
            self._update(*entry)
        else:
            raise ValueError(f"there is no such entry as {kind!r}")

    def _add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self.result.num_requests += 1
        if self.device is not None:
            self.device.add(request)

    def _schedule(self, now: float, expected: list[Any]) -> None:
        output = self.scheduler.schedule(now)
        difference = _difference(expected, self._decisions.write(output))
        if difference is not None:
            self.result.difference = f"step {self.result.num_steps}: {difference}"
            return
        if self.device is not None:
            self.device.start(output)
        if not output.is_empty:
            self._started.append((self.result.num_steps, output))
            self.result.num_steps += 1

    def _update(self, step: int, tokens: list[list[list[int]]]) -> None:
        while self._started and self._started[0][0] < step:  # it failed
            self._started.popleft()
        started, output = self._started.popleft()
        if started != step:
            raise ValueError(f"tokens of step {step}, which did not run")
        _check_shape(output, tokens)
        if self.device is not None:
            difference = _token_difference(output, tokens, self.device.tokens(output))
            if difference is not None:
                self.result.difference = f"step {step}: {difference}"
                return
        self.scheduler.update(output, tokens)


def _check_shape(output: SchedulerOutput, tokens: list[list[list[int]]]) -> None:
    for rows, sampled in zip(output.replicas, tokens, strict=True):
        for row, ids in zip(rows, sampled, strict=True):
            if len(ids) < row.samples:
                raise ValueError(f"{len(ids)} tokens of {row.request.request_id}, which sampled {row.samples}")


PARTS = ("rows", "bucket", "number of steps", "preempted", "swapped out", "swapped in", "dropped")


def _difference(expected: list[Any], got: list[Any]) -> str | None:
    for name, a, b in zip(PARTS, expected, got, strict=True):
        if a == b:
            continue
        if name != "rows":
            return f"{name}: recorded {a}, replayed {b}"
        for replica, (rows, others) in enumerate(zip(a, b, strict=True)):
            for i in range(max(len(rows), len(others))):
                x, y = (r[i] if i < len(r) else None for r in (rows, others))
                if x != y:
                    return f"replica {replica}, row {i}: recorded {_row(x)}, replayed {_row(y)}"
    return None


def _row(row: list[Any] | None) -> str:
    if row is None:
        return "nothing"
    name, start, count, samples, slot, is_new, blocks = row
    new = ", new" if is_new else ""
    return f"[{name}: tokens {start} to {start + count}, samples {samples}, slot {slot}{new}, blocks +{blocks}]"


def _token_difference(output: SchedulerOutput, expected: list[Any], got: list[Any]) -> str | None:
    for replica, rows in enumerate(output.replicas):
        for i, row in enumerate(rows):
            a, b = expected[replica][i][: row.samples], got[replica][i][: row.samples]
            if a != b:
                return f"replica {replica}, row {i} ({row.request.request_id}): recorded tokens {a}, replayed {b}"
    return None


# -- what is written of a request and a config -------------------------------------------------------------------------


def request_to_json(request: Request) -> dict[str, Any]:
    default = SamplingParams()
    params = {f.name: getattr(request.params, f.name) for f in fields(SamplingParams) if f.name != "output_kind"}
    return {
        **{name: getattr(request, name) for name in PLAIN_FIELDS},
        "stop_token_ids": sorted(request.stop_token_ids),
        "arrival_time": request.metrics.arrival_time,
        "params": {name: value for name, value in params.items() if value != getattr(default, name)},
    }


def request_from_json(entry: dict[str, Any]) -> Request:
    return Request(
        **{name: entry[name] for name in PLAIN_FIELDS},
        stop_token_ids=frozenset(entry["stop_token_ids"]),
        metrics=RequestMetrics(arrival_time=entry["arrival_time"]),
        params=SamplingParams(**entry["params"], output_kind=RequestOutputKind.FINAL_ONLY),
    )


def config_from_json(entry: dict[str, Any]) -> SchedulerConfig:
    options = dict(entry)
    for name in ("windows", "decode_buckets", "token_buckets"):
        options[name] = tuple(entry[name])
    options |= {"fairness": FairnessConfig.of(entry["fairness"]), "swap": SwapConfig(**entry["swap"])}
    return SchedulerConfig(**options)
