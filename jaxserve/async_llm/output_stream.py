"""From the engine's thread to one coroutine: room for one output, however slowly it is taken."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import RequestOutputKind


class OutputStream:
    """A request's outputs that nobody has taken yet, merged into one: of cumulative ones the latest, of deltas their
    sum. So a slow consumer holds no more than its request's tokens once, and nobody waits for it.

    ``put`` and ``fail`` are for the engine's thread, everything else for the event loop that made it.
    """

    def __init__(self, request_id: str, kind: RequestOutputKind) -> None:
        self.request_id, self.kind = request_id, kind
        self.loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, output: RequestOutput) -> bool:
        """Leave an output. Returns whether the loop is to be told: not while it has not taken the one before, so that
        a loop that hangs does not gather calls either."""
        output.request_id = self.request_id
        with self._lock:
            older, self._output = self._output, output
            if older is not None and self.kind is RequestOutputKind.DELTA:
                _prepend(older, output)
        return older is None

    def fail(self, error: Exception) -> None:
        """Nothing more will come; ``error`` says why. What is there can still be taken."""
        with self._lock:
            self._error = error

    def wake(self) -> None:
        """Let the consumer look."""
        self._filled.set()

    async def get(self) -> RequestOutput:
        """What is new since the last call, as soon as there is something; it is the caller's own."""
        while True:
            self._filled.clear()  # first: what is left from here on wakes again
            with self._lock:
                output, self._output = self._output, None
                error = self._error
            if output is not None:
                return _own(output)
            if error is not None:
                raise error
            await self._filled.wait()


def _prepend(older: RequestOutput, newer: RequestOutput) -> None:
    """Make the delta ``newer`` one since the output before ``older``, whose lists it takes over: appending to them
    costs no more, however many steps nobody looks."""
    for before, after in zip(older.outputs, newer.outputs, strict=True):
        after.text = before.text + after.text
        before.token_ids += after.token_ids
        after.token_ids = before.token_ids
        if before.logprobs is not None and after.logprobs is not None:
            before.logprobs += after.logprobs
            after.logprobs = before.logprobs
    if older.prompt_logprobs is not None and newer.prompt_logprobs is not None:
        older.prompt_logprobs += newer.prompt_logprobs
        newer.prompt_logprobs = older.prompt_logprobs


def _own(output: RequestOutput) -> RequestOutput:
    """With copies of what the engine goes on writing to."""
    if output.metrics is not None:
        output.metrics = replace(output.metrics)
    if output.prompt_logprobs is not None:
        output.prompt_logprobs = list(output.prompt_logprobs)
    return output
