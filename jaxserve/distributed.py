"""The processes of one engine: how they meet, what they tell each other, and how they end together.

They meet at jax's coordination service, which process 0 runs. Its key-value store carries everything that goes from
host to host besides jax's own collectives: what each process was started with, the leader's journal, signs of life.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import jax
from jax._src.distributed import global_state  # nothing public leads to the key-value store

from jaxserve.beats import SILENCE_SECONDS, Beat, Observer, Outcome, Verdict
from jaxserve.placement import Placement

START_SECONDS = 300
"""So long may processes start one after the other: hosts boot, images are pulled."""
NOTICE_SECONDS = 10
"""After which a process says whom it waits for."""
HEARTBEAT_SECONDS = 28
"""After which jax itself ends everybody, where what is here could not: a process that died while it started."""
SHUTDOWN_SECONDS = 15
BEAT_SECONDS = 1.0
GRACE_SECONDS = 3.0
"""So long the main thread has to end by itself when the job cannot go on. It cannot if it waits for a device."""
WAIT_SECONDS = 2.0
"""How long a follower waits at a time, so that an interrupt gets through."""
PIECES_PER_FOLDER = 100
ROOT = "jaxserve"
USER_ERRORS = (ValueError, NotImplementedError, OSError, KeyboardInterrupt, SystemExit)
"""That need no traceback."""


class ProcessError(ConnectionError):
    """The job cannot go on: a process died, hangs, decided otherwise, or was started with something else."""


class Job:
    """This process among the others. ``connect`` makes it; after ``leave`` or ``failed`` it is over."""

    def __init__(self, num_processes: int, process_id: int, store: Store | None = None) -> None:
        self.num_processes, self.process_id = num_processes, process_id
        self.names = [f"process {i}" for i in range(num_processes)]
        self._store = store or Store()
        self._beat = Beat()  # written by the main thread
        self._num_beats, self._publishing = 0, threading.Lock()
        self._verdict: Verdict | None = None
        self._decided_at, self._end = 0.0, Verdict("")
        self._ending, self._over = False, threading.Event()
        self._threads: list[threading.Thread] = []
        self._is_computing: Callable[[], bool] = lambda: False
        self._observer = Observer(self.names, time.monotonic())
        self._exchanged = time.monotonic()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._num_sent = 0

    @property
    def is_leader(self) -> bool:
        return self.process_id == 0

    @property
    def name(self) -> str:
        return self.names[self.process_id]

    # -- start -------------------------------------------------------------------------------------------------------

    def meet(self, options: Mapping[str, Any]) -> None:
        """Learn who the others are; ProcessError if one was started with other options than process 0."""
        mine = {"host": socket.gethostname(), "options": dict(options)}
        if self.is_leader and self._store.has(f"{ROOT}/hello/0"):
            raise ProcessError("this job of several processes had its engine already: start the processes again")
        self._store.set(f"{ROOT}/hello/{self.process_id}", json.dumps(mine))
        hellos = [json.loads(self._store.wait(f"{ROOT}/hello/{i}", START_SECONDS)) for i in range(self.num_processes)]
        self.names[:] = [f"process {i} ({hello['host']})" for i, hello in enumerate(hellos)]
        for name, hello in zip(self.names, hellos, strict=True):
            different = sorted(
                k for k in options | hello["options"] if hello["options"].get(k) != hellos[0]["options"].get(k)
            )
            if different:
                theirs, first = (f"{different[0]}={h['options'].get(different[0])!r}" for h in (hello, hellos[0]))
                raise ProcessError(
                    f"{name} was started with {theirs}, {self.names[0]} with {first}: start every process with the "
                    "same options"
                )
        for run in (*((self._deliver,) if self.is_leader else ()), self._exchange, self._watch):
            self._threads.append(threading.Thread(target=run, name=f"jaxserve {run.__name__}", daemon=True))
            self._threads[-1].start()

    def least(self, what: str, value: int) -> int:
        """The least of all processes' values."""
        self._store.set(f"{ROOT}/{what}/{self.process_id}", str(value))
        return min(int(self._store.wait(f"{ROOT}/{what}/{i}", START_SECONDS)) for i in range(self.num_processes))

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """What is raised in here ends the job everywhere; a follower ends at once, before the leader is gone."""
        try:
            yield
        except BaseException as error:
            try:
                self.failed(error)
            finally:
                if not self.is_leader:
                    if not isinstance(error, USER_ERRORS):
                        traceback.print_exception(error)
                    self._exit(self._end)
            raise

    def serve(self, is_computing: Callable[[], bool]) -> None:
        """The engine is ready. ``is_computing``: whether this process's devices have something to do."""
        self._is_computing = is_computing
        self.least("ready", 1)

    # -- the journal -------------------------------------------------------------------------------------------------

    def send(self, lines: bytes, num_entries: int) -> None:
        """Hand a piece of the journal to the thread that sends it."""
        self.check()
        self._beat = replace(self._beat, entries=self._beat.entries + num_entries)
        self._outbox.put(lines)

    def _deliver(self) -> None:
        with self._reaching_store():
            while (piece := self._outbox.get()) is not None:
                self._store.set_bytes(_piece_key(self._num_sent), piece)
                self._num_sent += 1

    def receive(self) -> Iterator[bytes]:
        """Pieces of the journal, as they come."""
        for number in range(sys.maxsize):
            piece = None
            while piece is None:
                self.check()
                piece = self._store.wait_bytes(_piece_key(number), WAIT_SECONDS)
            yield piece
            self._beat = replace(self._beat, pieces=number + 1)

    def followed(self) -> None:
        """One more entry was followed."""
        self._beat = replace(self._beat, entries=self._beat.entries + 1)

    def decided(self, step: int, digest: str) -> None:
        self._beat = replace(self._beat, step=step, digest=digest)

    def working(self, is_working: bool) -> None:
        self._beat = replace(self._beat, working=is_working)

    # -- the end -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ProcessError if the job cannot go on, KeyboardInterrupt if somebody interrupted it."""
        if self._verdict is not None:
            raise (KeyboardInterrupt if self._verdict.outcome == "interrupted" else ProcessError)(self._verdict.reason)

    def leave(self) -> None:
        """End in good order, together with the others."""
        if self._ending:
            return
        self._ending = True
        self._outbox.put(None)
        if self.is_leader:
            self._threads[0].join(SHUTDOWN_SECONDS)
        self._say_end(f"{self.name} is done", "done")
        self._over.set()
        for thread in self._threads:
            thread.join(2 * BEAT_SECONDS)
        with suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()

    def failed(self, error: BaseException) -> None:
        """End because of ``error``, and the others too. Raises ProcessError where another process is the reason."""
        if self._ending:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):  # perhaps because another process is gone
            self._await_verdict()
        self._ending = True
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        own = Verdict(f"{self.name} was interrupted", "interrupted")
        if not interrupted:
            own = Verdict(error.args[0] if isinstance(error, ProcessError) else f"{self.name}: {_one_line(error)}")
        self._end = verdict = self._verdict or own
        self._say_end(verdict.reason, verdict.outcome)
        if self.is_leader:
            self._let_others_go()
        self._over.set()
        _forget_client()
        if verdict.reason != own.reason and not interrupted:
            raise ProcessError(verdict.reason) from error

    def _await_verdict(self) -> None:
        deadline = time.monotonic() + SILENCE_SECONDS + 2 * BEAT_SECONDS
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)

    def _say_end(self, reason: str, outcome: Outcome) -> None:
        self._beat = replace(self._beat, ended=reason, outcome=outcome)
        with suppress(jax.errors.JaxRuntimeError):
            self._publish()

    def _let_others_go(self) -> None:
        """The store ends with this process, and jax would then end the others with a less helpful word."""
        deadline = time.monotonic() + GRACE_SECONDS + 2 * BEAT_SECONDS
        while (now := time.monotonic()) < deadline and not self._observer.others_gone(now):
            time.sleep(BEAT_SECONDS / 10)

    # -- threads -----------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        with self._publishing:
            self._num_beats += 1
            beat = replace(self._beat, count=self._num_beats, computing=self._is_computing())
            self._store.set(f"{ROOT}/beat/{self.process_id}", beat.to_json(), overwrite=True)

    def _exchange(self) -> None:
        """Say that this process lives, and see whether the others do."""
        deleted = 0
        with self._reaching_store():
            while not self._over.is_set():
                self._publish()
                beats = {int(k.rsplit("/", 1)[1]): Beat.from_json(v) for k, v in self._store.list(f"{ROOT}/beat/")}
                self._exchanged = time.monotonic()
                self._decide(self._observer.observe(beats, self._exchanged))
                if self.is_leader:
                    deleted = self._delete_pieces(deleted)
                self._over.wait(BEAT_SECONDS)

    def _delete_pieces(self, deleted: int) -> int:
        while deleted < self._observer.pieces // PIECES_PER_FOLDER:
            self._store.delete(f"{ROOT}/journal/{deleted}/")
            deleted += 1
        return deleted

    def _watch(self) -> None:
        """End the process where its main thread cannot. Asks nobody, so that nothing can hold it up."""
        looked = time.monotonic()
        while not self._over.wait(BEAT_SECONDS / 4):
            now = time.monotonic()
            if now - looked > SILENCE_SECONDS / 2:  # this process slept
                self._exchanged = now
            looked = now
            if now - self._exchanged > SILENCE_SECONDS:
                reason = f"{self.names[0]} has not answered for {SILENCE_SECONDS:.0f} s: it died, or was stopped"
                self._decide(Verdict(reason))
            grace = GRACE_SECONDS + (2 * BEAT_SECONDS if self.is_leader else 0)
            if self._verdict is not None and not self._ending and now - self._decided_at > grace:
                self._exit(self._verdict)

    def _exit(self, verdict: Verdict) -> None:
        saying = threading.Thread(target=self._say_end, args=(verdict.reason, verdict.outcome), daemon=True)
        saying.start()
        saying.join(BEAT_SECONDS)  # no longer: the store may be what does not answer
        interrupted = verdict.outcome == "interrupted"
        sys.stderr.write(f"{verdict.reason}\n" if interrupted else f"error: {verdict.reason}\n")
        sys.stderr.flush()
        os._exit(130 if interrupted else 1)

    def _decide(self, verdict: Verdict | None) -> None:
        if verdict is not None and self._verdict is None and not self._ending:
            self._decided_at, self._verdict = time.monotonic(), verdict

    @contextmanager
    def _reaching_store(self) -> Iterator[None]:
        """A thread that does not reach it any more says so."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            self._decide(Verdict(f"{self.name} cannot reach {self.names[0]} any more: {_one_line(error)}"))


class Store:
    """The key-value store of jax's coordination service."""

    def __init__(self) -> None:
        self._client: Any = global_state.client

    def set(self, key: str, value: str, overwrite: bool = False) -> None:
        self._client.key_value_set(key, value, allow_overwrite=overwrite)

    def set_bytes(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value)

    def wait(self, key: str, seconds: float) -> str:
        return self._client.blocking_key_value_get(key, int(seconds * 1000))

    def wait_bytes(self, key: str, seconds: float) -> bytes | None:
        """None if it does not come in time."""
        try:
            return self._client.blocking_key_value_get_bytes(key, int(seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def has(self, key: str) -> bool:
        try:
            self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def list(self, folder: str) -> list[tuple[str, str]]:
        return self._client.key_value_dir_get(folder)

    def delete(self, folder: str) -> None:
        self._client.key_value_delete(folder)


def connect(placement: Placement | None) -> Job | None:
    """Meet the other processes, if there are any. Where the caller has called ``jax.distributed.initialize``, that
    counts. To be called before jax starts."""
    if jax.distributed.is_initialized():
        return Job(jax.process_count(), jax.process_index()) if jax.process_count() > 1 else None
    if placement is None:
        return None
    # Its handler for SIGTERM would keep a process from ending.
    jax.config.update("jax_enable_preemption_service", False)
    with _patience(placement):
        jax.distributed.initialize(
            placement.coordinator,
            placement.num_processes,
            placement.process_id,
            cluster_detection_method="deactivate",  # it would give each process one GPU
            initialization_timeout=2 * START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    return Job(placement.num_processes, placement.process_id)


@contextmanager
def _patience(placement: Placement) -> Iterator[None]:
    """Say what is waited for, and end the process if it does not come: jax would abort without saying so."""
    me = f"process {placement.process_id} of {placement.num_processes}"
    others = "the others" if placement.process_id == 0 else "process 0"

    def say() -> None:
        sys.stderr.write(f"{me} waits for {others} at {placement.coordinator}\n")

    def give_up() -> None:
        sys.stderr.write(f"error: {me}: {others} did not come to {placement.coordinator} in {START_SECONDS} s\n")
        sys.stderr.flush()
        os._exit(1)

    timers = threading.Timer(NOTICE_SECONDS, say), threading.Timer(START_SECONDS, give_up)
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:  # such as a port that is taken
        raise ProcessError(f"{me} cannot meet {others} at {placement.coordinator}: {_one_line(error)}") from None
    finally:
        for timer in timers:
            timer.cancel()


def _forget_client() -> None:
    """Keep jax from waiting, when the program ends, for processes that are gone: it would abort instead of ending."""
    for part in (global_state.client, global_state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # its destructor waits too
    global_state.client = global_state.service = global_state.preemption_sync_manager = None


def _piece_key(number: int) -> str:
    return f"{ROOT}/journal/{number // PIECES_PER_FOLDER}/{number}"


def _one_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if isinstance(error, ProcessError | ValueError | OSError) else f"{type(error).__name__}: {text}"
