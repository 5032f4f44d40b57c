"""Requests that are all there at once, through ``LLM``: how many tokens per second, and where the time goes. And one
request alone."""

from __future__ import annotations

import time
from typing import Any

from jaxserve import LLM
from jaxserve.cli.output import progress
from jaxserve.evaluation.datasets import Workload
from jaxserve.metrics import EngineMetrics


def throughput_runs(llm: LLM, workload: Workload, repeats: int) -> list[dict[str, float]]:
    """One dictionary per run; a run before them fills caches."""
    _generate(llm, workload)
    return [_throughput_run(llm, workload) for _ in progress("runs", range(repeats))]


def _throughput_run(llm: LLM, workload: Workload) -> dict[str, float]:
    llm.reset_prefix_cache()  # else the prompts of the run before are found, and nothing is computed
    before = llm.get_metrics().snapshot()
    start = time.perf_counter()
    _generate(llm, workload)
    seconds = time.perf_counter() - start
    after = llm.get_metrics()

    def grown(name: str) -> float:
        return getattr(after, name) - getattr(before, name)

    padding, read, written = (grown(f"num_{k}_tokens") for k in ("padding", "prompt", "generation"))
    host, wait, idle = (grown(f"{k}_seconds") for k in ("host", "wait", "device_idle"))
    # A request's first token comes out of its last prompt token, so it has no row of its own.
    rows = padding + read + written - len(workload.calls)
    prompt_tokens, output_tokens = workload.num_prompt_tokens, workload.num_output_tokens
    return {
        "seconds": seconds,
        "prompt_tokens_per_second": prompt_tokens / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "requests_per_second": len(workload.calls) / seconds,
        "steps": grown("num_steps"),
        "padding_share": padding / rows,
        "host_share": host / (host + wait),
        "device_idle_share": idle / (host + wait),
        "kv_efficiency": _share(before, after, "live_slots", "held_slots"),
        "prefix_hit_share": _share(before, after, "prefix_cache_hits", "prefix_cache_queries"),
        "preemptions": grown("num_preemptions"),
    }


def _generate(llm: LLM, workload: Workload) -> None:
    calls = workload.calls
    llm.generate(
        [call.prompt for call in calls],
        [call.params for call in calls],
        priority=[call.priority for call in calls],
        tenant=[call.tenant for call in calls],
        use_tqdm=False,
    )


def _share(before: EngineMetrics, after: EngineMetrics, part: str, whole: str) -> float:
    """Of two of the scheduler's counters, what they grew by; 0 of nothing."""
    grown = [getattr(after.scheduler, name) - getattr(before.scheduler, name) for name in (part, whole)]
    return grown[0] / grown[1] if grown[1] else 0.0


def single_stream(llm: LLM, workload: Workload, repeats: int) -> list[list[float]]:
    """Of each run of one request, seconds until each of its tokens, as a caller of ``LLM.stream`` sees them; a run
    before them fills caches."""
    _token_times(llm, workload)
    return [_token_times(llm, workload) for _ in progress("runs", range(repeats))]


def _token_times(llm: LLM, workload: Workload) -> list[float]:
    (call,) = workload.calls
    llm.reset_prefix_cache()
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in llm.stream(call.prompt, call.params)]


def compiled(llm: LLM) -> dict[str, Any]:
    """How many programs, and their seconds, as they add up."""
    records = llm.compiled_programs()
    return {"programs": len(records), "compile_seconds": sum(record.seconds for record in records)}
