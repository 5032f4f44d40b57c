"""Short and long requests together, under several ways to get prompts into steps.

All settings run on one engine's model and compiled programs, each with a scheduler of its own that keeps every step:
a large checkpoint is loaded once, and what differs is what the scheduler decides.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve import LLM, AsyncLLM
from jaxserve.cli.output import watched
from jaxserve.config import SchedulerConfig, token_buckets
from jaxserve.evaluation.clients import Answer, Call, Load, alone, open_loop
from jaxserve.evaluation.engines import random_prompts
from jaxserve.evaluation.lanes import Lane
from jaxserve.evaluation.same_tokens import Difference, differences, offline_batch
from jaxserve.evaluation.statistics import statistic
from jaxserve.evaluation.timeline import Gap, Timeline, TimelineScheduler, engine_of
from jaxserve.scheduler.scheduler import make_policy

SHORT, LONG = CLASSES = ("short", "long")
SHORT_ALONE = "short alone"
STALL = 4.0
"""Times the median gap of short requests alone: a longer one beside a prompt is a stall."""
SPAN = 3.0
"""Arrivals take this many times as long as a short answer alone: about a third of the short ones decode at a time."""
LONG_SHARE = 0.5
"""Of the arrivals' time that the long requests may take by themselves, so that no queue builds up."""


@dataclass(frozen=True)
class Setting:
    """How prompts get into steps."""

    name: str
    budget: int
    """Tokens of one step and replica."""
    chunked: bool
    threshold: int = 0
    """Most tokens of one prompt in a step while others decode; 0 = as many as the step has room for."""

    @classmethod
    def parse(cls, text: str, room: int) -> Setting:
        """``room``: tokens of a step into which any whole prompt fits, beside those who decode."""
        found = re.fullmatch(r"chunked:(\d+)(?:/(\d+))?", text)
        if text == "whole":
            return cls(text, room, chunked=False)
        if found is None:
            raise ValueError(
                f"--setting {text}: it is whole, chunked:TOKENS (of one step), or chunked:TOKENS/PROMPT (at most so "
                "many of one prompt while others decode)"
            )
        return cls(text, int(found[1]), chunked=True, threshold=int(found[2] or 0))

    @property
    def limits(self) -> dict[str, Any]:
        """Of a ``SchedulerConfig``."""
        return {
            "max_num_batched_tokens": self.budget,
            "enable_chunked_prefill": self.chunked,
            "long_prefill_token_threshold": self.threshold,
        }


def room_for(settings: Sequence[Setting]) -> dict[str, Any]:
    """Options of an engine that has the programs of all settings."""
    buckets = sorted({bucket for setting in settings for bucket in token_buckets(setting.budget)})
    return {"max_num_batched_tokens": buckets[-1], "token_buckets": tuple(buckets)}


@dataclass(frozen=True)
class Mix:
    """How many requests of each class, and how many tokens they have."""

    shorts: int
    short_prompt: int
    short_answer: int
    longs: int
    long_prompt: int
    long_answer: int

    @property
    def longest(self) -> int:
        return max(self.short_prompt + self.short_answer, self.long_prompt + self.long_answer)

    def calls(self, vocab_size: int, seed: int) -> list[Call]:
        """Random prompts, the short ones first; each class is a tenant. ValueError where two would be alike."""
        kinds = [(SHORT, self.short_prompt, self.short_answer)] * self.shorts
        kinds += [(LONG, self.long_prompt, self.long_answer)] * self.longs
        prompts = random_prompts(vocab_size, [length for _, length, _ in kinds], seed)
        if len({tuple(prompt) for prompt in prompts}) < len(prompts):
            raise ValueError(f"prompts of {min(map(len, prompts))} tokens cannot all differ: make them longer")
        return [Call(prompt, answer, size, size) for prompt, (size, _, answer) in zip(prompts, kinds, strict=True)]


@dataclass(frozen=True)
class Run:
    """One setting, once."""

    load: Load
    timeline: Timeline
    zero: float
    """When it began, on the timeline's clock."""


@dataclass(frozen=True)
class Measured:
    """Everything that ran."""

    calls: list[Call]
    """Short ones first."""
    tokens: list[list[int]]
    """Of an offline batch."""
    every_step: bool
    """Whether everybody who decodes has a token in each step."""
    typical: float
    """Seconds: the median gap of short requests alone."""
    alone: list[Load]
    """Short requests with no long one beside them, as often."""
    runs: dict[Setting, list[Run]]
    differences: list[Difference] = field(default_factory=list)

    def of(self, size: str) -> list[int]:
        """The calls of a class."""
        return [i for i, call in enumerate(self.calls) if call.size == size]

    def answers(self, setting: Setting, size: str) -> list[Answer]:
        return [run.load.answers[i] for run in self.runs[setting] for i in self.of(size)]

    @property
    def alone_answers(self) -> list[Answer]:
        return [answer for load in self.alone for answer in load.answers]

    def gaps(self, setting: Setting) -> list[list[Gap]]:
        """Of every short request."""
        shorts = [(run.timeline, i) for run in self.runs[setting] for i in self.of(SHORT)]
        return [timeline.gaps(i, self.calls[i].num_tokens) for timeline, i in shorts]

    def worst_gaps(self, setting: Setting) -> list[list[float]]:
        """Seconds: of each short request that decoded beside a long prompt, the longest gap meanwhile."""
        long = {run.timeline.names[i] for run in self.runs[setting] for i in self.of(LONG)}
        beside = [[gap.seconds for gap in gaps if gap.prompts & long] for gaps in self.gaps(setting)]
        return [[max(seconds)] for seconds in beside if seconds]

    def is_stall(self, gap: Gap) -> bool:
        return bool(gap.prompts) and gap.seconds > STALL * self.typical

    def splits(self, setting: Setting) -> int:
        """Prompts of which a step computed only a part."""
        return sum(
            any(tokens < len(call.prompt) for _, _, tokens in run.timeline.prefills(i))
            for run in self.runs[setting]
            for i, call in enumerate(self.calls)
        )

    def lanes(self, run: Run) -> list[Lane]:
        """In the order in which requests were due; seconds since the run began."""
        lanes = []
        for i in sorted(range(len(self.calls)), key=lambda i: run.load.answers[i].due):
            call = self.calls[i]
            stalls = [gap for gap in run.timeline.gaps(i, call.num_tokens) if self.is_stall(gap)]
            lanes.append(
                Lane(
                    f"{call.size} {self.of(call.size).index(i) + 1}",
                    CLASSES.index(call.size),
                    run.load.answers[i].due,
                    [(begin - run.zero, end - run.zero) for begin, end, _ in run.timeline.prefills(i)],
                    [at - run.zero for at in run.timeline.tokens(i, call.num_tokens)],
                    [(gap.begin - run.zero, gap.end - run.zero) for gap in stalls],
                )
            )
        return lanes


def measure(llm: LLM, calls: list[Call], settings: Sequence[Setting], repeats: int, seed: int) -> Measured:
    """Settings take turns, so that a change of the machine's speed meets all of them; the first turn warms up."""
    tokens, base = offline_batch(llm, calls)[1], llm.engine.scheduler.config
    span = asyncio.run(_span(llm, calls))
    shorts = [call for call in calls if call.size == SHORT]
    loads, runs = list[Load](), {setting: list[Run]() for setting in settings}
    turn = len(shorts) + len(settings) * len(calls)
    with tqdm(total=(1 + repeats) * turn, desc="requests", disable=not watched(), leave=False) as bar:
        for i in (0, *range(repeats)):
            times = _arrivals(calls, span, np.random.default_rng([seed, 3, i]))
            loads.append(asyncio.run(_run(llm, settings[0], shorts, times[: len(shorts)], bar.update)).load)
            for setting in settings:
                runs[setting].append(asyncio.run(_run(llm, setting, calls, times, bar.update)))
    loads, runs = loads[1:], {setting: of[1:] for setting, of in runs.items()}
    typical = statistic("median", [a.gaps for load in loads for a in load.answers])
    seen = {s.name: [run.load for run in of] for s, of in runs.items()} | {SHORT_ALONE: loads}
    found = differences(llm, calls, tokens, seen)
    return Measured(calls, tokens, _every_step(base), typical, loads, runs, found)


def _every_step(config: SchedulerConfig) -> bool:
    """Pipeline stages take turns, and a policy that shares steps out may let somebody wait."""
    return config.num_stages == 1 and not make_policy(config).shares_steps


async def _span(llm: LLM, calls: Sequence[Call]) -> float:
    """Seconds over which requests arrive."""
    async with AsyncLLM.from_engine(llm.engine) as clients:
        short, long = [await alone(clients, next(c for c in calls if c.size == size), 3) for size in CLASSES]
    return max(SPAN * short, sum(c.size == LONG for c in calls) * long / LONG_SHARE)


def _arrivals(calls: Sequence[Call], span: float, rng: np.random.Generator) -> list[float]:
    """Seconds of each call: a class in equal intervals, each request at a random moment of its own."""
    times = list[float]()
    for size in CLASSES:
        count = sum(call.size == size for call in calls)
        times += (span * (np.arange(count) + rng.random(count)) / count).tolist()
    return times


async def _run(
    llm: LLM, setting: Setting, calls: Sequence[Call], times: Sequence[float], note: Callable[[], Any]
) -> Run:
    scheduler = TimelineScheduler(replace(llm.engine.scheduler.config, **setting.limits))
    async with AsyncLLM.from_engine(engine_of(llm, scheduler)) as clients:
        zero = time.perf_counter()
        load = await open_loop(clients, calls, times, note)
    return Run(load, Timeline.of(scheduler, [call.prompt for call in calls]), zero)
