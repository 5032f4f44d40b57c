"""Requests that come over time, through ``AsyncLLM``: how long each waits, and how many are served well enough.

The four latencies have the names that serving benchmarks use: TTFT (time to first token), TPOT (time per output token
after the first, one number per request), ITL (inter-token latency: each gap) and E2EL (end to end).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve import LLM, AsyncLLM
from jaxserve.cli.output import watched
from jaxserve.evaluation.clients import Answer, Load, open_loop, shared_queue
from jaxserve.evaluation.datasets import Workload
from jaxserve.evaluation.latencies import latencies, latency_figures
from jaxserve.evaluation.result import Figure
from jaxserve.evaluation.statistics import Groups, statistic
from jaxserve.evaluation.traces import arrival_times

WARM_UP = 8
"""Requests before the measured ones: every program has then run once, or nearly so."""
SHOWN = ("mean", "median", "p90", "p99")
ALL_AT_ONCE = "all"
PER_TOKEN = "from a request's first token to its last, over the tokens after the first"


def time_per_token(answer: Answer) -> float | None:
    """Mean seconds of the tokens after the first; None where there are none."""
    return (answer.times[-1] - answer.times[0]) / (len(answer.times) - 1) if len(answer.times) > 1 else None


TARGETS: dict[str, Callable[[Answer], float | None]] = {
    "ttft": lambda answer: answer.first,
    "tpot": time_per_token,
    "e2el": lambda answer: answer.whole,
}
"""Latencies of which a request has one, so that it can meet a target or not."""


# -- when requests come ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """When requests come."""

    process: str | None
    """What ``traces.arrival_times`` reads; None = as the data says, and all at once where it says nothing."""
    max_concurrency: int | None = None
    """Most requests under way; the others wait for a place."""

    @classmethod
    def of(cls, request_rate: str | None, arrivals: str | None, max_concurrency: int | None) -> Pace:
        """ValueError for what is no rate, no arrival process, or both."""
        if request_rate is not None and arrivals is not None:
            raise ValueError("--request-rate and --arrivals both say when requests come: use one of them")
        process = arrivals if request_rate is None else _process(request_rate)
        if process is not None:
            arrival_times(process)
        return cls(process, max_concurrency)

    def times(self, workload: Workload, seed: int) -> list[float] | None:
        """Seconds at which each request is due; None = as soon as there is a place for it."""
        count, process = len(workload.calls), self.process
        if process is None and workload.arrivals is not None:
            return workload.arrivals
        if self.max_concurrency is not None and process in (None, ALL_AT_ONCE):
            return None
        return arrival_times(process or ALL_AT_ONCE)(np.random.default_rng([2, seed]), count).tolist()

    def text(self, workload: Workload) -> str:
        """For a headline."""
        if self.process is None and workload.arrivals is not None:
            arrivals = "arrivals of the trace"
        else:
            arrivals = "all at once" if self.process in (None, ALL_AT_ONCE) else f"arrivals {self.process}"
        return arrivals if self.max_concurrency is None else f"{arrivals}, at most {self.max_concurrency} under way"


def _process(request_rate: str) -> str:
    try:
        rate = float(request_rate)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise ValueError(f"--request-rate {request_rate}: it is requests per second, above 0, or inf (all at once)")
    return ALL_AT_ONCE if math.isinf(rate) else f"poisson:{np.format_float_positional(rate, trim='-')}"


def serving_runs(llm: LLM, workload: Workload, pace: Pace, repeats: int, seed: int) -> list[Load]:
    """Each run draws its own arrivals; the prefix cache is empty at its start."""
    calls = workload.calls

    async def serve(run: int, clients: AsyncLLM, note: Callable[[], Any]) -> Load:
        await clients.reset_prefix_cache()
        times = pace.times(workload, seed + run)
        if times is None:
            return await shared_queue(clients, calls, pace.max_concurrency or len(calls), note)
        return await open_loop(clients, calls, times, note, pace.max_concurrency)

    async def serve_all() -> list[Load]:
        async with AsyncLLM.from_engine(llm.engine) as clients:
            with tqdm(total=repeats * len(calls), desc="requests", disable=not watched(), leave=False) as bar:
                return [await serve(run, clients, bar.update) for run in range(repeats)]

    few = calls[:WARM_UP]
    llm.generate([call.prompt for call in few], [call.params for call in few], use_tqdm=False)
    return asyncio.run(serve_all())


# -- goodput -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goodput:
    """Requests that met every target."""

    share: float
    per_second: float
    """Median over the runs."""


def parse_targets(texts: Sequence[str]) -> dict[str, float]:
    """["ttft:200 tpot:50"] (milliseconds) -> {"ttft": 0.2, "tpot": 0.05} (seconds)."""
    targets: dict[str, float] = {}
    for part in re.split(r"[\s,]+", " ".join(texts).strip()):
        name, _, limit = part.partition(":")
        if name not in TARGETS or not re.fullmatch(r"\d+\.?\d*|\.\d+", limit) or not float(limit):
            known = ", ".join(f"{target}:MS" for target in TARGETS)
            raise ValueError(f"--goodput {part!r}: it is one or several of {known}, in milliseconds above 0")
        targets[name] = float(limit) / 1e3
    return targets


def meets(answer: Answer, targets: dict[str, float]) -> bool:
    """Whether a request met every target; one of a single token has no TPOT, and meets that."""
    return all((TARGETS[name](answer) or 0.0) <= limit for name, limit in targets.items())


def goodput(loads: Sequence[Load], targets: dict[str, float]) -> Goodput:
    good = [[meets(answer, targets) for answer in load.answers] for load in loads]
    rates = [sum(of_run) / load.seconds for of_run, load in zip(good, loads, strict=True)]
    return Goodput(sum(map(sum, good)) / sum(map(len, good)), float(np.median(rates)))


def targets_text(targets: dict[str, float]) -> str:
    return ", ".join(f"{name.upper()} ≤ {1e3 * limit:g} ms" for name, limit in targets.items())


# -- latencies ---------------------------------------------------------------------------------------------------------


def answers_of(loads: Sequence[Load]) -> list[Answer]:
    """Of all runs."""
    return [answer for load in loads for answer in load.answers]


def latency_groups(loads: Sequence[Load]) -> dict[str, Groups]:
    """Seconds by abbreviation, those of a request together."""
    answers = answers_of(loads)
    first, between, whole = latencies(answers).values()
    per_token = [[seconds] for answer in answers if (seconds := time_per_token(answer)) is not None]
    return {"ttft": first, "tpot": per_token, "itl": between, "e2el": whole}


def latency_statistics(loads: Sequence[Load]) -> dict[str, dict[str, float]]:
    """By abbreviation and statistic, in seconds; latencies that no request has are not there."""
    return {
        name: {of: statistic(of, groups) for of in SHOWN} for name, groups in latency_groups(loads).items() if groups
    }


def serving_figures(name: str, loads: Sequence[Load], simulated: bool) -> list[Figure]:
    """Median, p90 and p99 of each latency, under "NAME: latency, statistic"."""
    groups, how = latency_groups(loads)["tpot"], f"{PER_TOKEN}; requests of {len(loads)} runs"
    per_token = [
        Figure.of(f"{name}: per token, {of}", groups, of, "s", how, better="lower", simulated=simulated)
        for of in SHOWN[1:]
        if groups
    ]
    return [*latency_figures(name, answers_of(loads), SHOWN[1:], len(loads), simulated), *per_token]
