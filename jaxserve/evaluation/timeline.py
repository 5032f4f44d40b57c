"""What every step computed for whom, and when: a scheduler that writes it down, and what stood between two tokens.

Prompt tokens and steps are counted, not timed: how long somebody has to wait for them depends on the machine, how many
there are does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxserve import LLM
from jaxserve.config import SchedulerConfig
from jaxserve.engine import Engine
from jaxserve.request import Request
from jaxserve.scheduler import Advanced, Scheduled, Scheduler, SchedulerOutput


@dataclass(frozen=True)
class Chunk:
    """A request's part of a step."""

    request: str
    start: int
    count: int
    samples: int
    is_prompt: bool
    """Whether it computes a prompt, or what a preempted request has to compute again; else it decodes."""
    enters: bool

    @classmethod
    def of(cls, s: Scheduled) -> Chunk:
        decodes = s.start >= s.request.num_prompt_tokens and s.count == s.samples
        return cls(s.request.request_id, s.start, s.count, s.samples, not decodes, s.is_new)


@dataclass
class Step:
    """One step of all replicas; times in seconds on the clock of ``time.perf_counter``."""

    replicas: list[list[Chunk]]
    num_steps: int
    """Decode steps in one."""
    scheduled: float
    landed: float = math.nan
    """When its tokens reached the host; nan = never."""

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for chunks in self.replicas for chunk in chunks]

    @property
    def num_tokens(self) -> int:
        """Of the replica that computes most; of several decode steps in one, each has one of every request."""
        several = self.num_steps > 1
        return max(len(chunks) if several else sum(c.count for c in chunks) for chunks in self.replicas)

    @property
    def largest_piece(self) -> int:
        """Tokens of a prompt, of one in whose replica others decode; 0 if there is none."""
        beside = [chunks for chunks in self.replicas if not all(c.is_prompt for c in chunks)]
        return max((c.count for chunks in beside for c in chunks if c.is_prompt), default=0)

    def prompt_tokens(self, besides: str) -> int:
        """Of everybody but one request, on the replica that computes most: replicas step together."""
        return max(sum(c.count for c in chunks if c.is_prompt and c.request != besides) for chunks in self.replicas)


@dataclass(frozen=True)
class Gap:
    """Between two tokens of a request."""

    begin: float
    end: float
    steps: int
    """From the token's to the next one's; 0 where a step samples several."""
    prompt_tokens: int
    """Of others, computed meanwhile."""
    prompts: frozenset[str]
    """Whose."""
    preempted: bool
    """Whether the request had to leave meanwhile."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class TimelineScheduler(Scheduler):
    """Does what its base does, and keeps every step."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.requests: dict[str, Request] = {}
        self.steps: list[Step] = []
        self._running: dict[int, Step] = {}

    def add(self, request: Request) -> None:
        super().add(request)
        self.requests[request.request_id] = request

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        output = super().schedule(now)
        if not output.is_empty:
            chunks = [[Chunk.of(s) for s in rows] for rows in output.replicas]
            step = Step(chunks, output.num_steps, time.perf_counter())
            self.steps.append(step)
            self._running[id(output)] = step
        return output

    def update(self, output: SchedulerOutput, token_ids: list[list[list[int]]]) -> list[Advanced]:
        self._running.pop(id(output)).landed = time.perf_counter()
        return super().update(output, token_ids)


@dataclass(frozen=True)
class Timeline:
    """The steps of a run, and which of its calls the requests are."""

    steps: list[Step]
    """Those whose tokens reached the host."""
    names: list[str]
    """Of each call's request."""

    @classmethod
    def of(cls, scheduler: TimelineScheduler, prompts: Sequence[list[int]]) -> Timeline:
        """``prompts``: of the calls, no two alike, by which their requests are known."""
        by_prompt = {tuple(request.prompt_token_ids): name for name, request in scheduler.requests.items()}
        landed = [step for step in scheduler.steps if not math.isnan(step.landed)]
        return cls(landed, [by_prompt[tuple(prompt)] for prompt in prompts])

    def begin(self, step: int) -> float:
        """When the devices could begin with a step: it may be scheduled while the one before it runs."""
        before = self.steps[step - 1].landed if step else -math.inf
        return max(self.steps[step].scheduled, before)

    def prefills(self, call: int) -> list[tuple[float, float, int]]:
        """(begin, end, tokens) of every step that computed the call's prompt."""
        return [
            (self.begin(i), step.landed, chunk.count)
            for i, step in enumerate(self.steps)
            for chunk in step.chunks
            if chunk.request == self.names[call] and chunk.is_prompt
        ]

    def tokens(self, call: int, count: int) -> list[float]:
        """When each of the call's ``count`` tokens was there."""
        return [self.steps[i].landed for i in self._token_steps(call, count)]

    def gaps(self, call: int, count: int) -> list[Gap]:
        """Between the ``count`` tokens of a call."""
        steps = self._token_steps(call, count)
        return [self._gap(self.names[call], a, b) for a, b in pairwise(steps)]

    def _token_steps(self, call: int, count: int) -> list[int]:
        """The step of each token; a step in flight may have sampled more after the last one."""
        name, found = self.names[call], list[int]()
        for i, step in enumerate(self.steps):
            for chunk in step.chunks:
                found += [i] * (chunk.samples if chunk.request == name else 0)
        return found[:count]

    def _gap(self, name: str, first: int, second: int) -> Gap:
        between = self.steps[first + 1 : second + 1]
        return Gap(
            self.steps[first].landed,
            self.steps[second].landed,
            second - first,
            sum(step.prompt_tokens(name) for step in between),
            frozenset(c.request for step in between for c in step.chunks if c.is_prompt and c.request != name),
            any(c.enters for step in between for c in step.chunks if c.request == name),
        )

    def to_json(self) -> dict[str, Any]:
        """Chunks as [call, start, count, samples, is_prompt]; seconds from the first step on."""
        calls, zero = {name: i for i, name in enumerate(self.names)}, self.begin(0) if self.steps else 0.0
        return {
            "steps": [
                {
                    "begin": self.begin(i) - zero,
                    "landed": step.landed - zero,
                    "chunks": [[calls[c.request], c.start, c.count, c.samples, c.is_prompt] for c in step.chunks],
                }
                for i, step in enumerate(self.steps)
            ]
        }


def engine_of(llm: LLM, scheduler: Scheduler) -> Engine:
    """An engine with the model and the compiled programs of one that is there, and with another scheduler, whose
    limits and buckets are among its own. Its KV blocks are taken over: one of them at a time. It knows no tokenizer.
    NotImplementedError where several processes are one engine: the others would go on with the scheduler they have."""
    import jax

    if jax.process_count() > 1:
        raise NotImplementedError("several processes cannot change their scheduler: run it in one (--num-processes 1)")
    llm.reset_prefix_cache()
    known = llm.engine
    ending, overlapped = known.eos_token_ids, known.async_scheduling
    return Engine(scheduler, known.runner, None, ending, async_scheduling=overlapped, trace=known.trace)
