"""What the scheduler's features are worth: each one on and off, side by side, in one process on one set of programs.

    prefix      32 requests that begin with the same 1,000 tokens, prefix caching on and off
    whale       a long prompt arrives among 32 decoding requests: in chunks, and in one piece
    continuous  output lengths 16 to 256: continuous batching, and batches that wait for their longest request
    overlap     64 decoding requests: asynchronous scheduling, and one step after the other
    steps       8 decoding requests: eight decode steps in a call, and one
    memory      how full KV blocks are on a mixed workload; what naming blocks costs
    preemption  too few blocks: recomputed, swapped, and the cost rule

The demo model is too small to be a fair stand-in for the others' step times; with --load-format dummy any config.json
will do. Times on a machine that does other things are not worth quoting: other_cores says how busy it was.

    python scripts/bench_scheduling.py
    python scripts/bench_scheduling.py --model DIR --load-format dummy --only prefix,whale --json out.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_workload import Machine

from jaxserve import LLM, RequestOutput, RequestOutputKind, SamplingParams
from jaxserve.config import SchedulerConfig, token_buckets
from jaxserve.engine import Engine
from jaxserve.kv_cache.prefix_cache import BlockHasher
from jaxserve.metrics import EngineMetrics
from jaxserve.outputs import RequestMetrics
from jaxserve.request import Request
from jaxserve.scheduler import Scheduler

SEED = 7


class Bench:
    """One runner, and as many engines over it as there are settings to compare."""

    def __init__(self, llm: LLM, tokens: int) -> None:
        self.llm, self.runner = llm, llm.engine.runner
        self.config: SchedulerConfig = llm.engine.scheduler.config
        self.tokens = tokens
        self.rng = np.random.default_rng(SEED)

    def engine(self, async_scheduling: bool = True, **changes: Any) -> Engine:
        """An engine with these fields of SchedulerConfig changed; one decode step a call unless said otherwise."""
        if "max_num_batched_tokens" in changes:
            changes["token_buckets"] = token_buckets(changes["max_num_batched_tokens"])
        config = replace(self.config, **{"num_scheduler_steps": 1, "max_num_batched_tokens": self.tokens} | changes)
        if config.token_buckets[-1] != config.max_num_batched_tokens:
            config = replace(config, token_buckets=token_buckets(config.max_num_batched_tokens))
        return Engine(Scheduler(config), self.runner, None, (), async_scheduling=async_scheduling)

    def prompt(self, length: int) -> list[int]:
        return self.rng.integers(0, self.runner.decoder.vocab_size, length).tolist()


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )


def run(
    engine: Engine, prompts: Sequence[list[int]], lengths: Sequence[int], late: dict[int, list[int]] | None = None
) -> dict[str, Any]:
    """Everything at once, but ``late`` prompts when the first of the others has had so many tokens.

    Returns seconds, per request the times of its tokens, and what the engine counted.
    """
    machine, start, late = Machine(), time.perf_counter(), dict(late or {})
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add_request(str(i), prompt, params(length))
    times: dict[str, list[float]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_unfinished:
        for output in engine.step():
            note(times, output, time.perf_counter() - start)
        for count in [c for c in late if len(times["0"]) >= c]:
            engine.add_request(f"late{count}", late.pop(count), params(2))
            times[f"late{count}"] = []
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "times": times, "metrics": engine.metrics, "other_cores": machine.other_cores()}


def note(times: dict[str, list[float]], output: RequestOutput, now: float) -> None:
    times[output.request_id] += [now] * sum(len(c.token_ids) for c in output.outputs)


def first(result: dict[str, Any]) -> np.ndarray:
    """Seconds to the first token of each request."""
    return np.array([t[0] for name, t in result["times"].items() if not name.startswith("late")])


def between(result: dict[str, Any]) -> np.ndarray:
    """Seconds between the tokens of a request, of all requests but the late ones."""
    return np.concatenate([np.diff(t) for name, t in result["times"].items() if not name.startswith("late")])


def prefix(bench: Bench) -> dict[str, Any]:
    shared_length = min(1000, bench.config.max_model_len - 24)
    shared = bench.prompt(shared_length)
    prompts = [shared + bench.prompt(12) for _ in range(32)]
    rows = {}
    for name, caching in (("off", False), ("on", True)):
        result = run(bench.engine(enable_prefix_caching=caching), prompts, [8] * 32)
        rows[name] = {
            "ttft_mean_s": float(first(result).mean()),
            "ttft_max_s": float(first(result).max()),
            "seconds": result["seconds"],
            "prompt_tokens_computed": result["metrics"].num_prompt_tokens,
            "hit_rate": result["metrics"].prefix_cache_hit_rate,
            "other_cores": result["other_cores"],
        }
    names = ("ttft_mean_s", "ttft_max_s", "seconds", "prompt_tokens_computed")
    return {**rows, "off/on": {name: rows["off"][name] / rows["on"][name] for name in names}}


def whale(bench: Bench) -> dict[str, Any]:
    length = bench.config.max_model_len - 8
    prompts, long = [bench.prompt(16) for _ in range(32)], bench.prompt(length)
    rows = {}
    settings: tuple[tuple[str, dict[str, Any]], ...] = (
        ("whole", {"max_num_batched_tokens": bench.config.max_num_batched_tokens, "enable_chunked_prefill": False}),
        ("chunks", {"max_num_batched_tokens": 128}),
        ("chunks, threshold 64", {"max_num_batched_tokens": 512, "long_prefill_token_threshold": 64}),
    )
    for name, changes in settings:
        result = run(bench.engine(enable_prefix_caching=False, **changes), prompts, [64] * 32, {8: long})
        gaps = between(result)
        rows[name] = {
            "whale_tokens": length,
            "itl_p50_s": float(np.percentile(gaps, 50)),
            "itl_p99_s": float(np.percentile(gaps, 99)),
            "itl_max_s": float(gaps.max()),
            "whale_ttft_s": result["times"]["late8"][0] - result["times"]["0"][7],
            "seconds": result["seconds"],
            "other_cores": result["other_cores"],
        }
    return {**rows, "whole/chunks": {"itl_p99": rows["whole"]["itl_p99_s"] / rows["chunks"]["itl_p99_s"]}}


def continuous(bench: Bench) -> dict[str, Any]:
    """A static batch computes every row until its longest request is done, as a padded batch does."""
    slots, count = 32, 256
    prompts = [bench.prompt(int(n)) for n in bench.rng.integers(8, 33, count)]
    draws = {
        "uniform": bench.rng.integers(16, 257, count),
        "log-uniform": np.round(16 * 16 ** bench.rng.random(count)).astype(int),
    }
    report = {}
    for name, lengths in draws.items():
        together = run(bench.engine(max_num_seqs=slots), prompts, lengths.tolist())
        engine, seconds = bench.engine(max_num_seqs=slots), 0.0
        for at in range(0, count, slots):
            batch = lengths[at : at + slots]
            seconds += run(engine, prompts[at : at + slots], [int(batch.max())] * len(batch))["seconds"]
        tokens = int(lengths.sum())
        report[name] = {
            "output_tokens": tokens,
            "continuous_tok_s": tokens / together["seconds"],
            "static_tok_s": tokens / seconds,
            "continuous/static": seconds / together["seconds"],
            "padding_share": padding_share(together["metrics"]),
            "other_cores": together["other_cores"],
        }
    return report


def padding_share(metrics: EngineMetrics) -> float:
    """Share of the rows of all steps that held no token."""
    real = metrics.num_prompt_tokens + metrics.num_generation_tokens
    return metrics.num_padding_tokens / (metrics.num_padding_tokens + real)


def overlap(bench: Bench) -> dict[str, Any]:
    prompts = [bench.prompt(16) for _ in range(64)]
    rows = {}
    for name, asynchronous in (("one after the other", False), ("overlapped", True)):
        engine = bench.engine(asynchronous, enable_prefix_caching=True)
        run(engine, prompts, [4] * 64)
        before = engine.metrics.snapshot()
        result = run(engine, prompts, [128] * 64)
        steps = result["metrics"].num_steps - before.num_steps
        host = result["metrics"].host_seconds - before.host_seconds
        idle = result["metrics"].device_idle_seconds - before.device_idle_seconds
        rows[name] = {
            "steps": steps,
            "step_ms": result["seconds"] / steps * 1e3,
            "host_ms_per_step": host / steps * 1e3,
            "device_idle_share_at_most": idle / result["seconds"],
            "output_tok_s": 64 * 128 / result["seconds"],
            "other_cores": result["other_cores"],
        }
    return rows


def steps(bench: Bench) -> dict[str, Any]:
    prompts = [bench.prompt(16) for _ in range(8)]
    rows = {}
    for k in sorted({1, bench.config.num_scheduler_steps}):
        engine = bench.engine(num_scheduler_steps=k)
        run(engine, prompts, [16] * 8)
        result = run(engine, prompts, [193] * 8)
        rows[f"{k} a call"] = {"output_tok_s": 8 * 193 / result["seconds"], "other_cores": result["other_cores"]}
    return rows


def memory(bench: Bench) -> dict[str, Any]:
    count = 96
    prompts = [bench.prompt(int(n)) for n in bench.rng.integers(32, 257, count)]
    lengths = bench.rng.integers(16, 257, count).tolist()
    metrics = run(bench.engine(max_num_seqs=32), prompts, lengths)["metrics"]
    state = bench.runner.state
    assert state is not None
    block_bytes = sum(x.nbytes // x.shape[0] for x in [*state.keys, *state.values])
    return {
        "mixed workload": {
            "block_size": bench.config.block_size,
            "efficiency": metrics.kv_efficiency,
            "internal_fragmentation": metrics.kv_internal_fragmentation,
            "external_fragmentation": metrics.kv_external_fragmentation,
            "padding_share": padding_share(metrics),
        },
        "naming a block": hashing(bench, block_bytes),
    }


def hashing(bench: Bench, block_bytes: int) -> dict[str, Any]:
    """Time and memory per block, beside the block's own memory and the time that computing its tokens takes."""
    size, blocks = bench.config.block_size, 4096
    request = Request(
        "r", bench.prompt(size * blocks), SamplingParams(), 0, frozenset(), 1, RequestMetrics(arrival_time=0.0)
    )
    start = time.perf_counter()
    BlockHasher(size).hashes(request)
    seconds = (time.perf_counter() - start) / blocks
    tracemalloc.start()
    request.block_hashes = []
    BlockHasher(size).hashes(request)
    names = {h: i for i, h in enumerate(request.block_hashes)}
    used = tracemalloc.get_traced_memory()[0] / len(names)
    tracemalloc.stop()
    engine = bench.engine(enable_prefix_caching=False)
    length = min(512, bench.config.max_model_len - 2)
    whole = min(run(engine, [bench.prompt(length)], [1])["seconds"] for _ in range(3))
    return {
        "microseconds": seconds * 1e6,
        "share_of_computing_it": seconds / (whole / length * size),
        "bytes": used,
        "block_bytes": block_bytes,
        "share_of_memory": used / block_bytes,
    }


def preemption(bench: Bench) -> dict[str, Any]:
    swap = bench.config.swap
    if not swap.num_blocks:
        return {}
    prompts, blocks = [bench.prompt(64) for _ in range(32)], 32 * 64 // bench.config.block_size + 40
    rows: dict[str, Any] = {
        "measured": {
            "prefill_tokens_per_s": swap.prefill_tokens_per_second,
            "moved_gb_per_s": swap.bytes_per_second / 1e9,
            "block_bytes": swap.block_bytes,
        }
    }
    for mode in ("recompute", "swap", "auto"):
        engine = bench.engine(
            num_blocks=blocks, swap=replace(swap, mode=mode), enable_prefix_caching=False, max_num_seqs=32
        )
        result = run(engine, prompts, [128] * 32)
        counters = result["metrics"].scheduler
        rows[mode] = {
            "seconds": result["seconds"],
            "preemptions": counters.num_preemptions,
            "swapped": counters.num_swapped_out,
            "prompt_tokens_computed": result["metrics"].num_prompt_tokens,
            "other_cores": result["other_cores"],
        }
    return rows


EXPERIMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    f.__name__: f for f in (prefix, whale, continuous, overlap, steps, memory, preemption)
}


def show(name: str, report: dict[str, Any]) -> None:
    print(f"\n{name}")
    for row, values in report.items():
        cells = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        ]
        print(f"  {row:22}{', '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="checkpoint directory")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments, separated by commas")
    parser.add_argument("--cache", help="directory that keeps compiled programs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = sorted(set(args.only.split(",")) - set(EXPERIMENTS))
    if unknown:
        parser.error(f"--only {unknown[0]}: it is one of {', '.join(EXPERIMENTS)}")
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=64,
        max_num_batched_tokens=args.max_model_len + 64,  # room for a whole prompt beside everybody's decode
        num_scheduler_steps=8,
        swap_space=1.0,
        compilation_cache_dir=args.cache,
        skip_tokenizer_init=True,
    )
    bench, reports = Bench(llm, min(512, args.max_model_len)), {}
    for name in args.only.split(","):
        warm = bench.engine()
        run(warm, [bench.prompt(40) for _ in range(4)], [4] * 4)
        reports[name] = EXPERIMENTS[name](bench)
        show(name, reports[name])
        sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "dtype": args.dtype, **reports}, indent=1))


if __name__ == "__main__":
    main()
