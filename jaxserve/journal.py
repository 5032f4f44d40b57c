"""What the processes of one engine must all do, in order: written by the leader, followed by the others. No jax here.

Every process has the same scheduler and the same programs; only the leader knows requests and callers. So it tells the
others every call of its scheduler before they could matter, as JSON arrays, one per line:

``["add", request]``, ``["finish", id, reason, stop_reason, keep]``, ``["reset"]``: as ``recording`` writes them.
``["schedule", now, digest]``: decide and start the next step; ``digest`` is that of the decision before.
``["score", rows, targets, num_top]``: log-probabilities of the step that is read next.
``["update", step]``: the tokens of that step (schedules that were not empty, counted from 0) were read.
``["clear"]``: nobody waits for what is in the pipeline. ``["stop"]``: there is nothing more to do.

Lines are sent when followers have to act (schedule, score, stop); what happened in between goes with the next of these.
A request that the leader ends (an abort, a stop string) is thus ended everywhere before the next decision, and tokens
are counted everywhere in the same place between two decisions, whether steps overlap or not.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

from jaxserve.recording import RecordedScheduler, request_to_json
from jaxserve.request import Request
from jaxserve.scheduler import Advanced, Scheduler, SchedulerOutput

PIECE_BYTES = 1 << 20
"""Lines are sent at the latest when there are so many bytes of them."""


class Journal:
    """Of an engine that is one process: nobody reads it. As a context: a step is under way."""

    def write(self, *entry: Any) -> None:
        """Take down an entry, for when the next is sent."""

    def send(self, *entry: Any) -> None:
        """Take down an entry that followers must act on now."""

    def close(self) -> None:
        """There is nothing more to do."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


class Audience(Protocol):
    """Where a leader's lines go."""

    def send(self, lines: bytes, num_entries: int) -> None:
        """Start sending; raises if the job cannot go on."""
        ...

    def decided(self, step: int, digest: str) -> None:
        """The last decision, for the others to compare."""
        ...

    def working(self, is_working: bool) -> None: ...

    def failed(self, error: BaseException) -> None:
        """A step failed here: the job ends. May raise what was the reason, if it is known to be elsewhere."""
        ...

    def leave(self) -> None: ...


class LeaderJournal(Journal):
    """Sends what it is given to the followers."""

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._closed = False

    def write(self, *entry: Any) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        self._lines.append(line)
        self._num_bytes += len(line)
        if self._num_bytes > PIECE_BYTES:
            self._flush()

    def send(self, *entry: Any) -> None:
        self.write(*entry)
        self._flush()

    def _flush(self) -> None:
        if self._closed:
            raise RuntimeError("this engine was closed, and its other processes with it")
        lines, self._lines, self._num_bytes = self._lines, [], 0
        if lines:
            self.audience.send(b"".join(lines), len(lines))

    def close(self) -> None:
        if not self._closed:
            with self:
                self.send("stop")
            self._closed = True
            self.audience.leave()

    def __enter__(self) -> None:
        self.audience.working(True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.audience.working(False)
        if error is not None:
            self._closed = True
            self.audience.failed(error)


class LineReader:
    """Entries out of pieces that are cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def entries(self, piece: bytes) -> Iterator[list[Any]]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return map(json.loads, lines)


class Digest:
    """Of decisions, one after the other: the same 64 bits where the same was decided. Of a table only what is new
    since the slot's last row, because tables are long."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], list[int]] = {}

    def of(self, output: SchedulerOutput) -> str:
        rows, *rest = output.decision()
        for replica, replica_rows in enumerate(rows):
            for row in replica_rows:
                key, is_new, tables = (replica, row[4]), row[5], row[6]
                known = [0] * len(tables) if is_new else self._known.get(key, [0] * len(tables))
                row[6] = [table[n:] for table, n in zip(tables, known, strict=True)]
                self._known[key] = [len(table) for table in tables]
        return hashlib.blake2b(repr([rows, *rest]).encode(), digest_size=8).hexdigest()


class LeadingScheduler(Scheduler):
    """Does what its base does, and tells its journal."""

    journal: Journal = Journal()

    def lead(self, journal: LeaderJournal) -> None:
        """To be called before anything else."""
        self.journal, self._audience = journal, journal.audience
        self._digest, self._last = Digest(), ""
        self._num_decisions = self._num_sent = 0
        self._unread: deque[tuple[int, SchedulerOutput]] = deque()

    def add(self, request: Request) -> None:
        super().add(request)
        self.journal.write("add", request_to_json(request))

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, keep: int | None = None
    ) -> None:
        super().finish(request, reason, stop_reason, keep)
        self.journal.write("finish", request.request_id, reason, stop_reason, keep)

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        self.journal.write("reset")

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        now = round(now, 6)  # what is sent is what is decided on
        self.journal.send("schedule", now, self._last)
        output = super().schedule(now)
        self._last = self._digest.of(output)
        self._num_decisions += 1
        self._audience.decided(self._num_decisions, self._last)
        if not output.is_empty:
            self._unread.append((self._num_sent, output))
            self._num_sent += 1
        return output

    def update(self, output: SchedulerOutput, token_ids: list[list[list[int]]]) -> list[Advanced]:
        if not output.is_empty:
            while self._unread[0][1] is not output:  # nobody waited for it
                self._unread.popleft()
            self.journal.write("update", self._unread.popleft()[0])
        return super().update(output, token_ids)


class RecordedLeader(LeadingScheduler, RecordedScheduler):
    """Also keeps a recording."""
