"""Recordings of a tiny model under pressure, and how to change them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve import LLM, SamplingParams
from jaxserve.config import SwapConfig
from jaxserve.engine import Engine
from jaxserve.recording import RecordedScheduler

Call = Callable[..., tuple[int, str, str]]
"""(script, *arguments) -> exit code, stdout, stderr"""
TIGHT: dict[str, Any] = {
    "num_gpu_blocks_override": 21,
    "swap_space": 0.01,
    "preemption_mode": "swap",
    "enable_prefix_caching": False,
}
"""Engine options of other tests, too, whose compiled programs are there already."""

Entries = list[list[Any]]


class Recorded(NamedTuple):
    """A recording, and an engine whose model can replay it."""

    path: Path
    engine: Engine

    def entries(self) -> Entries:
        with gzip.open(self.path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def write_entries(path: Path, entries: Entries) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    return path


def record(llm: LLM, path: Path, async_scheduling: bool, swap: SwapConfig | None = None) -> Recorded:
    """Twenty requests that arrive while others run, some of them aborted, on the model of an engine that is there."""
    config = replace(llm.engine.scheduler.config, enable_prefix_caching=True, swap=swap or SwapConfig())
    options = llm.args.as_json() | {"enable_prefix_caching": True, "async_scheduling": async_scheduling}
    if swap is None:
        options |= {"swap_space": 0, "preemption_mode": "auto"}
    scheduler = RecordedScheduler(config, path, options)
    engine = Engine(scheduler, llm.engine.runner, None, (), async_scheduling=async_scheduling)
    rng = np.random.default_rng(7)
    for i in range(20):
        prompt = rng.integers(0, 100, int(rng.integers(3, 40))).tolist()
        penalty = 1.2 if i % 3 == 0 else 1.0
        length = int(rng.integers(5, 30))
        params = SamplingParams(
            temperature=i % 2, max_tokens=length, min_tokens=2 * (i % 4), repetition_penalty=penalty
        )
        engine.add_request(str(i), prompt, params, tenant="ab"[i % 2])
        for _ in range(4):
            engine.step()
        if i % 6 == 5:
            engine.abort(str(i - 1))
            engine.abort(str(i))
    while engine.has_unfinished:
        engine.step()
    engine.step()
    scheduler.check_integrity()
    assert engine.metrics.num_preemptions > 3 and engine.metrics.num_finished["abort"] > 1
    assert (scheduler.counters.num_swapped_out > 3) == (swap is not None)
    scheduler.close()
    return Recorded(path, engine)


SWAP = SwapConfig(num_blocks=200, mode="swap", block_bytes=1 << 14, bytes_per_second=1e9, prefill_tokens_per_second=1e4)
