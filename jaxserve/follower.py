"""What every process but the first does: follow the leader's journal until it ends."""

from __future__ import annotations

from collections import deque
from typing import Any

from jaxserve.beats import astray
from jaxserve.distributed import Job, ProcessError
from jaxserve.engine import Engine
from jaxserve.journal import Digest, LineReader
from jaxserve.recording import request_from_json
from jaxserve.replay_device import ModelDevice
from jaxserve.request import Request, Status
from jaxserve.scheduler import SchedulerOutput


class Follower:
    """Decides and computes what the leader does; nobody reads its tokens but its scheduler."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.scheduler, self.runner, self.job = engine.scheduler, engine.runner, job
        self.device = ModelDevice(engine)
        self._requests: dict[str, Request] = {}
        self._digest, self._last = Digest(), ""
        self._num_decisions = self._num_started = 0
        self._started: deque[tuple[int, SchedulerOutput]] = deque()
        self._ended: list[str] = []  # a stop string may yet be found in its last tokens
        self._stopped = False

    def run(self) -> None:
        """Until the leader stops. Raises ProcessError if the job cannot go on."""
        with self.job.reporting():
            reader = LineReader()
            for piece in self.job.receive():
                for kind, *entry in reader.entries(piece):
                    getattr(self, f"_{kind}")(*entry)
                    self.job.followed()
                if self._stopped:
                    break
        self.job.leave()

    # -- entries -----------------------------------------------------------------------------------------------------

    def _add(self, entry: dict[str, Any]) -> None:
        request = request_from_json(entry)
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self.device.add(request)

    def _finish(self, request_id: str, *how: Any) -> None:
        self.scheduler.finish(self._requests[request_id], *how)
        self._ended.append(request_id)

    def _reset(self) -> None:
        self.scheduler.reset_prefix_cache()

    def _schedule(self, now: float, digest: str) -> None:
        if digest != self._last:
            raise ProcessError(astray(self.job.name, self.job.names[0], self._num_decisions, self._last, digest))
        self._forget_ended()
        output = self.scheduler.schedule(now)
        self._last = self._digest.of(output)
        self._num_decisions += 1
        self.job.decided(self._num_decisions, self._last)
        self.device.start(output)
        if not output.is_empty:
            self._started.append((self._num_started, output))
            self._num_started += 1

    def _score(self, rows: list[list[int]], targets: list[int], num_top: int) -> None:
        self.device.score(self._started[0][1], rows, targets, num_top)

    def _update(self, step: int) -> None:
        while self._started[0][0] < step:  # nobody waited for it
            self._started.popleft()
        _, output = self._started.popleft()
        advanced = self.scheduler.update(output, self.device.tokens(output))
        self._ended += [a.request.request_id for a in advanced if a.request.status is Status.FINISHED]

    def _clear(self) -> None:
        self._started.clear()
        self.device.clear()

    def _stop(self) -> None:
        self._stopped = True

    def _forget_ended(self) -> None:
        for request_id in self._ended:
            self._requests.pop(request_id, None)
        self._ended.clear()
