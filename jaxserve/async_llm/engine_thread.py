"""The thread that runs an engine. Nobody else touches it: what others want done is done between two steps."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from jaxserve.async_llm.output_stream import OutputStream
from jaxserve.engine import Engine
from jaxserve.outputs import RequestOutput
from jaxserve.scheduler import QueueFullError


class EngineDeadError(RuntimeError):
    """The engine failed (``__cause__`` says how) or was shut down: it takes no more requests."""


class EngineThread:
    """Steps while there is something to do, and sleeps until somebody calls otherwise."""

    def __init__(self, engine: Engine, close_journal: bool) -> None:
        """``close_journal``: let the other processes of the job go at the end, if there are any."""
        if engine.has_unfinished:
            raise RuntimeError("this engine has unfinished requests: finish or abort them first")
        self.engine, self._close_journal = engine, close_journal
        self._changed = threading.Condition()
        # Guarded by it: what to do between two steps, when to stop, and whether and why that has happened.
        self._commands: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stop_at: float | None = None
        self._ended = False
        self._failure: BaseException | None = None
        # The thread's own: streams by the id that their request has in the engine, and these ids by the callers' ids.
        # They differ, because an engine's ids are never used twice, so that what is left of a finished request (a row
        # in flight, an entry in another process) cannot be taken for another's.
        self._streams: dict[str, OutputStream] = {}
        self._engine_ids: dict[str, str] = {}
        self._num_requests = 0
        # A daemon, because the interpreter waits for other threads before it calls what was registered with atexit.
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    # -- for any thread ----------------------------------------------------------------------------------------------

    def add(self, stream: OutputStream, **request: Any) -> Future[None]:
        """Queue a request (arguments of ``Engine.add_request``), whose outputs go to ``stream``. The future fails with
        ValueError or QueueFullError if it was not queued; raises EngineDeadError if none are taken any more."""
        if self._stop_at is not None:
            raise self._dead()
        return self.call(partial(self._add, stream, request))

    def abort(self, request_id: str) -> Future[None]:
        """End the request of this id, if there is one: its output so far is its last."""
        return self.call(partial(self._abort, request_id))

    def drop(self, stream: OutputStream) -> None:
        """Nobody reads this stream any more: end its request, if it is unfinished."""
        with suppress(EngineDeadError):
            self.call(partial(self._drop, stream))

    def call[T](self, action: Callable[[], T]) -> Future[T]:
        """Do something with the engine, between two steps. A future that is cancelled before is not done."""
        future: Future[T] = Future()
        with self._changed:
            if self._ended:
                raise self._dead()
            self._commands.append((future, action))
            self._changed.notify()
        return future

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, and end when there are none, after so many seconds at the latest."""
        with self._changed:
            self._stop_at = min(time.monotonic() + drain_seconds, math.inf if self._stop_at is None else self._stop_at)
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._stop_at is None and not self._ended

    @property
    def errored(self) -> bool:
        return self._failure is not None

    def _dead(self) -> EngineDeadError:
        """A new one for every caller, because a traceback is added wherever it is raised."""
        if self._failure is None:
            return EngineDeadError("the engine was shut down")
        reason = f"{type(self._failure).__name__}: {self._failure}".splitlines()[0]
        error = EngineDeadError(f"the engine failed and takes no more requests: {reason}")
        error.__cause__ = self._failure
        return error

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._finish()
        except BaseException as error:
            self._failure = error
        self._end()

    def _turn(self) -> bool:
        """What was asked for since the last turn, and a step; sleeps if there is nothing to do. False: stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._stop_at is not None or self.engine.is_busy)
        for _ in range(len(self._commands)):
            self._execute(*self._commands.popleft())
        if self._stop_at is not None and (not self._streams or time.monotonic() >= self._stop_at):
            return False
        if self.engine.is_busy:
            self._hand_out(self.engine.step())
        return True

    def _execute(self, future: Future[Any], action: Callable[[], Any]) -> None:
        """Bad input is its caller's business; whatever else goes wrong leaves an engine that nobody can trust."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = action()
        except (ValueError, QueueFullError) as error:
            future.set_exception(error)
        except BaseException as error:
            self._failure = error
            future.set_exception(self._dead())
            raise
        else:
            future.set_result(result)

    def _finish(self) -> None:
        """End what is unfinished, and read what is in flight for it."""
        for engine_id in self._streams:
            self.engine.abort(engine_id)
        while self.engine.is_busy:
            self.engine.step()

    def _end(self) -> None:
        """Let go of everything, and tell everybody who waits."""
        for engine_id in self._streams:
            with suppress(Exception):  # of a failed engine: what can be let go is
                self.engine.abort(engine_id)
        with self._changed:
            self._ended = True
            commands, self._commands = self._commands, deque()
        for future, _ in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._dead())
        for stream in self._streams.values():
            stream.fail(self._dead())
        _wake(self._streams.values())
        if self._close_journal:
            with suppress(Exception):  # the others are gone already, or will see that this process is
                self.engine.journal.close()

    # -- what is done between two steps ------------------------------------------------------------------------------

    def _add(self, stream: OutputStream, request: dict[str, Any]) -> None:
        if stream.request_id in self._engine_ids:
            raise ValueError(f"request id {stream.request_id!r} is in use: give every unfinished request its own")
        engine_id = f"{stream.request_id}#{self._num_requests}"
        self.engine.add_request(engine_id, **request)
        self._num_requests += 1
        self._streams[engine_id] = stream
        self._engine_ids[stream.request_id] = engine_id

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(self._engine_ids.get(request_id, ""))
        if output is not None:
            self._hand_out([output])

    def _drop(self, stream: OutputStream) -> None:
        engine_id = self._engine_ids.get(stream.request_id, "")
        if self._streams.get(engine_id) is stream:  # the id may be another's by now
            self._forget(engine_id)
            self.engine.abort(engine_id)

    def _forget(self, engine_id: str) -> None:
        del self._engine_ids[self._streams.pop(engine_id).request_id]

    def _hand_out(self, outputs: Iterable[RequestOutput]) -> None:
        filled = []
        for output in outputs:
            engine_id = output.request_id
            stream = self._streams[engine_id]
            if output.finished:
                self._forget(engine_id)
            if stream.loop.is_closed():
                self._drop(stream)
            elif stream.put(output):
                filled.append(stream)
        _wake(filled)


def _wake(streams: Iterable[OutputStream]) -> None:
    """One call into each event loop, for all of its streams."""
    by_loop: dict[Any, list[OutputStream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, ready in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed just now: its requests are dropped at their next output
            loop.call_soon_threadsafe(_wake_here, ready)


def _wake_here(streams: list[OutputStream]) -> None:
    for stream in streams:
        stream.wake()
