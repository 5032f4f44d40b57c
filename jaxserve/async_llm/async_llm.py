"""The interface for asyncio: one request per call, outputs as they come."""

from __future__ import annotations

import asyncio
import atexit
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack
from uuid import uuid4

from jaxserve.async_llm.engine_thread import EngineThread
from jaxserve.async_llm.output_stream import OutputStream
from jaxserve.engine import Engine
from jaxserve.engine_args import EngineArgs, EngineOptions
from jaxserve.inputs import Prompt, need_tokenizer, only_one, refuse
from jaxserve.llm import open_engine
from jaxserve.metrics import EngineMetrics
from jaxserve.outputs import RequestOutput
from jaxserve.profiling import start_profile, stop_profile
from jaxserve.sampling_params import SamplingParams


class AsyncLLM:
    """A model, loaded and compiled, that answers many callers at once, each in its own coroutine.

    ``AsyncLLM("demo")`` takes the options of ``LLM`` (``EngineArgs`` lists them) and raises what ``LLM`` raises; the
    constructor blocks until the engine is ready. The engine then runs in a thread of its own until ``shutdown``, which
    is what ``async with`` ends with and what happens by itself at the end of the program. Methods may be called from
    any number of event loops, in any threads. Several processes that are one engine: as with ``LLM``.
    """

    def __init__(self, model: str | Path, **options: Unpack[EngineOptions]) -> None:
        self._drive(open_engine(EngineArgs.of(model, **options)), close_journal=True)

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """Of an engine that is there, such as ``LLM(...).engine``. Until ``shutdown`` nobody else may use it; then it
        is as it was, with nothing unfinished."""
        llm = cls.__new__(cls)
        llm._drive(engine, close_journal=False)
        return llm

    def _drive(self, engine: Engine, close_journal: bool) -> None:
        self.engine = engine
        if engine.tokenizer is not None:
            # Tokenizers are shared between threads, for which they must not change, and the first call changes those
            # that were saved with truncation or padding: it turns these off.
            engine.tokenizer.encode("")
        self._thread = EngineThread(engine, close_journal)
        atexit.register(self._close, 0.0)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: None = None,
        priority: int | None = None,
        tenant: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt: its outputs, of the kind that ``SamplingParams.output_kind`` asks for, until one that is
        ``finished``. What is not taken in time is merged with what follows: the latest, or the sum of the deltas.

        Arguments mean what they mean to ``LLM.generate``. ``request_id``: for ``abort`` and in outputs; one that no
        unfinished request has. Nothing happens before the first output is asked for; that raises ValueError for bad
        input, QueueFullError where too many wait, and EngineDeadError if the engine failed or was shut down, as later
        ones do if that happens meanwhile. Leaving the loop early, or being cancelled, aborts the request.
        """
        refuse(lora_request=lora_request)
        params = only_one("sampling_params", SamplingParams, sampling_params, SamplingParams())
        name = only_one("request_id", str, request_id, None) or uuid4().hex
        stream = OutputStream(name, params.output_kind)
        ranks = {"priority": only_one("priority", int, priority, 0), "tenant": only_one("tenant", str, tenant, "")}
        # In the loop's thread pool: a long prompt takes longer than a step, and must stall neither the engine, whose
        # other requests decode, nor this loop. Tokenizers let other threads run meanwhile.
        request = await asyncio.to_thread(self.engine.read_prompt, name, prompt)
        output = None
        try:
            await asyncio.wrap_future(self._thread.add(stream, params=params, **request, **ranks))
            while output is None or not output.finished:
                output = await stream.get()
                yield output
        finally:
            if output is None or not output.finished:
                self._thread.drop(stream)

    async def abort(self, request_id: str) -> None:
        """End a request: its consumer gets what there is, ``finished``, with the finish reason "abort". An id that is
        not known, be it that it has finished or that its prompt is still being tokenized, is no error."""
        await asyncio.shield(asyncio.wrap_future(self._thread.abort(request_id)))

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix, as after a change of weights. Always succeeds: running requests keep the blocks
        that they hold, and nobody finds them any more."""
        await asyncio.wrap_future(self._thread.call(self.engine.reset_prefix_cache))
        return True

    async def start_profile(self, directory: str | Path = "profile") -> None:
        """Record what every device does, operation by operation, until ``stop_profile``; a few steps are enough.
        RuntimeError if a profile is being recorded."""
        await asyncio.to_thread(start_profile, directory)

    async def stop_profile(self) -> None:
        """Write the profile: for TensorBoard or Perfetto, and ``scripts/trace_report.py``."""
        await asyncio.to_thread(stop_profile)

    def get_metrics(self) -> EngineMetrics:
        """Counters since the engine was made, as they are now; a step that is under way may be counted in part."""
        return self.engine.metrics.snapshot()

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer. Threads share it: call it without ``truncation`` and ``padding``, which change
        it for everybody."""
        return need_tokenizer(self.engine.tokenizer)

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine failed."""
        return self._thread.errored

    async def shutdown(self, drain: bool = False, timeout: float | None = None) -> None:
        """Take no more requests, end those there are, and then the engine's thread.

        drain: let them finish, for at most ``timeout`` seconds (None = however long it takes). Those that have not
        finished are aborted, and their consumers get an EngineDeadError. A step that is under way is waited for.
        """
        seconds = 0.0 if not drain else math.inf if timeout is None else timeout
        await asyncio.to_thread(self._close, seconds)

    def _close(self, drain_seconds: float) -> None:
        self._thread.stop(drain_seconds)
        self._thread.join()
        atexit.unregister(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.shutdown()
