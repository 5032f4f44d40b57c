"""Clients of an ``AsyncLLM``: who asks when, and what each of them saw.

A closed loop has a number of clients who ask again when they have their answer; an open loop asks at given times,
however long answers take. Times count from when a request was due, not from when the client got around to sending it:
a stalled server would otherwise hide its own delay.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jaxserve import AsyncLLM, RequestOutputKind, SamplingParams
from jaxserve.evaluation.statistics import jain_index


@dataclass(frozen=True)
class Call:
    """A request to make."""

    prompt: list[int]
    num_tokens: int
    """Of the answer."""
    tenant: str
    size: str
    """Its class."""
    priority: int = 0

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=self.num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


@dataclass(frozen=True)
class Answer:
    """What a client saw of a call; times in seconds since the start of the run."""

    call: int
    due: float
    times: list[float]
    """When each token reached the client; several that come at once have the same."""
    tokens: list[int]

    @property
    def first(self) -> float:
        return self.times[0] - self.due

    @property
    def whole(self) -> float:
        return self.times[-1] - self.due

    @property
    def gaps(self) -> list[float]:
        """Between tokens."""
        return np.diff(self.times).tolist()


@dataclass(frozen=True)
class Load:
    """One run of all calls."""

    seconds: float
    """From the first call to the last token."""
    answers: list[Answer]
    """In the order of the calls."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def closed_loop(llm: AsyncLLM, calls: Sequence[Call], num_clients: int, note: Callable[[], Any]) -> Load:
    """``num_clients`` ask one call after the other, each those of one tenant. ``note``: called for every answer."""
    queues: dict[str, list[int]] = defaultdict(list)
    for i, call in enumerate(calls):
        queues[call.tenant].append(i)
    each = list(queues.values())
    return await _by_clients(llm, calls, [each[k % len(each)] for k in range(max(num_clients, len(each)))], note)


async def shared_queue(llm: AsyncLLM, calls: Sequence[Call], num_clients: int, note: Callable[[], Any]) -> Load:
    """``num_clients`` ask one call after the other, in their order, whoever's they are."""
    return await _by_clients(llm, calls, [list(range(len(calls)))] * num_clients, note)


async def _by_clients(
    llm: AsyncLLM, calls: Sequence[Call], queues: Sequence[list[int]], note: Callable[[], Any]
) -> Load:
    """One client for each of ``queues``, some of which may be the same."""
    start = time.perf_counter()

    async def client(mine: list[int]) -> list[Answer]:
        answers = []
        while mine:
            i = mine.pop(0)
            answers.append(await _ask(llm, i, calls[i], start, time.perf_counter() - start))
            note()
        return answers

    return await _gather([client(queue) for queue in queues])


async def open_loop(
    llm: AsyncLLM,
    calls: Sequence[Call],
    times: Sequence[float],
    note: Callable[[], Any],
    max_concurrency: int | None = None,
) -> Load:
    """Each call at its time, or as soon after it as fewer than ``max_concurrency`` are under way: its times count from
    when it was due all the same."""
    start, places = time.perf_counter(), asyncio.Semaphore(max_concurrency or len(calls))

    async def client(i: int) -> list[Answer]:
        await asyncio.sleep(start + times[i] - time.perf_counter())
        async with places:
            answer = await _ask(llm, i, calls[i], start, times[i])
        note()
        return [answer]

    return await _gather([client(i) for i in range(len(calls))])


async def alone(llm: AsyncLLM, call: Call, repeats: int) -> float:
    """Median seconds of a call that nobody else disturbs, with nothing in the prefix cache."""
    seen = []
    for _ in range(repeats):
        await llm.reset_prefix_cache()
        start = time.perf_counter()
        seen.append((await _ask(llm, 0, call, start, 0.0)).whole)
    return float(np.median(seen))


async def _ask(llm: AsyncLLM, index: int, call: Call, start: float, due: float) -> Answer:
    answer = Answer(index, due, [], [])
    async for output in llm.generate(call.prompt, call.params, tenant=call.tenant, priority=call.priority):
        tokens = output.outputs[0].token_ids
        answer.times.extend([time.perf_counter() - start] * len(tokens))
        answer.tokens.extend(tokens)
    return answer


async def _gather(clients: Sequence[Awaitable[list[Answer]]]) -> Load:
    answers = sorted((a for of_one in await asyncio.gather(*clients) for a in of_one), key=lambda a: a.call)
    begin = min(a.due for a in answers)
    return Load(max(a.times[-1] for a in answers) - begin, answers)


def speeds(
    loads: Sequence[Load], calls: Sequence[Call], alone_seconds: dict[str, float], by: Callable[[Call], str]
) -> dict[str, float]:
    """Per tenant or size, the mean share of the speed that its requests would have had alone: 1 = nobody is in their
    way. ``alone_seconds``: by size."""
    shares: dict[str, list[float]] = defaultdict(list)
    for load in loads:
        for answer in load.answers:
            call = calls[answer.call]
            shares[by(call)].append(alone_seconds[call.size] / answer.whole)
    return {name: float(np.mean(values)) for name, values in sorted(shares.items())}


def fairness(shares: dict[str, float]) -> float:
    """Jain's index of the shares."""
    return jain_index(list(shares.values()))
