"""Throughput and latency on one fixed workload, as JSON: 32 requests together, then one alone.

The workload is that of the comparison in docs/benchmarks.md: 32 prompts of 32 to 256 random tokens (seeded; 4,206 in
all), 64 greedy tokens each, EOS ignored; and one request of 128 + 64 tokens. ``--mixed`` lets the output lengths vary
from 16 to 256 instead. What other processes used of the machine during each run is recorded beside it
(``other_cores``): a run that was not alone is not worth quoting.

    python scripts/bench_workload.py --model DIR --dtype float32 --json out.json
    python scripts/bench_workload.py --model DIR --dtype bfloat16 --mixed --repeats 3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from jaxserve import LLM, SamplingParams
from jaxserve.metrics import EngineMetrics

SEED, REQUESTS, PROMPT, NEW, MIXED = 20261120, 32, (32, 256), 64, (16, 256)
LATENCY_PROMPT, LATENCY_NEW = 128, 64
TOKEN_IDS = (16, 16000)


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts of the throughput run, and the one of the latency run."""
    rng = random.Random(SEED)
    lengths = [rng.randint(*PROMPT) for _ in range(REQUESTS)]
    prompts = [[rng.randrange(*TOKEN_IDS) for _ in range(n)] for n in lengths]
    return prompts, [rng.randrange(*TOKEN_IDS) for _ in range(LATENCY_PROMPT)]


def output_lengths(mixed: bool) -> list[int]:
    rng = random.Random(SEED + 1)
    return [rng.randint(*MIXED) if mixed else NEW for _ in range(REQUESTS)]


class Machine:
    """Busy core-seconds of this process and of all others since it was made."""

    def __init__(self) -> None:
        self.start, self.own, self.busy = time.perf_counter(), self._own(), self._busy()

    @staticmethod
    def _own() -> float:
        times = psutil.Process().cpu_times()
        return times.user + times.system

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        return sum(times[:4]) - times.idle if hasattr(times, "idle") else 0.0

    def other_cores(self) -> float:
        others = (self._busy() - self.busy) - (self._own() - self.own)
        return round(max(0.0, others) / (time.perf_counter() - self.start), 2)


def read_bandwidth() -> float:
    """GB/s that the cores read together from memory: the best of several maxima over 1 GiB."""
    array = np.ones(1 << 28, np.float32)
    cores = os.cpu_count() or 1
    best = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(np.max, np.array_split(array, cores)))
            best = min(best, time.perf_counter() - start)
    return array.nbytes / best / 1e9


def generate(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens of each request."""
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    llm.reset_prefix_cache()  # the same prompts again: nothing may be found
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - start
    tokens = [o.outputs[0].token_ids for o in outputs]
    assert [len(t) for t in tokens] == lengths
    return seconds, tokens


def throughput(llm: LLM, repeats: int, mixed: bool) -> dict[str, Any]:
    prompts, _ = workload()
    lengths = output_lengths(mixed)
    walls, others, runs, tokens = [], [], [], []
    for _ in range(repeats):
        before = llm.get_metrics().snapshot()
        machine = Machine()
        seconds, tokens = generate(llm, prompts, lengths)
        walls.append(seconds)
        others.append(machine.other_cores())
        runs.append(difference(before, llm.get_metrics()))
    best = walls.index(min(walls))
    return {
        "wall_s": round(walls[best], 3),
        "walls_s": [round(w, 3) for w in walls],
        "other_cores": others,
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": sum(lengths),
        "output_tok_s": round(sum(lengths) / walls[best], 2),
        "total_tok_s": round((sum(lengths) + sum(map(len, prompts))) / walls[best], 2),
        **runs[best],
        "tokens": tokens,
    }


def difference(before: EngineMetrics, after: EngineMetrics) -> dict[str, Any]:
    """What one run added to the engine's counters."""

    def grown(name: str) -> float:
        return getattr(after, name) - getattr(before, name)

    seconds, padding = grown("host_seconds") + grown("wait_seconds"), grown("num_padding_tokens")
    computed = grown("num_prompt_tokens") + grown("num_generation_tokens")
    held = after.scheduler.held_slots - before.scheduler.held_slots
    return {
        "steps": grown("num_steps"),
        "host_share": round(grown("host_seconds") / seconds, 4),
        "host_ms_per_step": round(grown("host_seconds") / grown("num_steps") * 1e3, 3),
        "device_idle_share": round(grown("device_idle_seconds") / seconds, 4),
        "padding_share": round(padding / (padding + computed), 3),
        "kv_efficiency": round((after.scheduler.live_slots - before.scheduler.live_slots) / held, 4),
    }


def latency(llm: LLM, repeats: int, weight_bytes: int) -> dict[str, Any]:
    """Time to the first token and per token after it, beside the time that reading the weights once takes."""
    _, prompt = workload()
    machine = Machine()
    first = min(generate(llm, [prompt], [1])[0] for _ in range(repeats))
    whole = min(generate(llm, [prompt], [LATENCY_NEW])[0] for _ in range(repeats))
    bandwidth = read_bandwidth()
    per_token = (whole - first) / (LATENCY_NEW - 1) * 1e3
    floor = weight_bytes / bandwidth / 1e6
    return {
        "ttft_ms": round(first * 1e3, 2),
        "ms_per_token": round(per_token, 3),
        "bandwidth_gb_s": round(bandwidth, 1),
        "floor_ms_per_token": round(floor, 2),
        "over_floor": round(per_token / floor, 3),
        "other_cores": machine.other_cores(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, config.json is enough")
    parser.add_argument("--attention-backend", help="instead of the best that runs here")
    parser.add_argument("--matmul-backend", help="instead of the best that runs here")
    parser.add_argument("--mixed", action="store_true", help="output lengths from 16 to 256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=512, help="token budget of one step")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--cache", help="directory that keeps compiled programs")
    parser.add_argument("--json", type=Path, help="write everything here, tokens included")
    args = parser.parse_args()
    start = time.perf_counter()
    llm = LLM(
        args.model,
        dtype=args.dtype,
        load_format=args.load_format,
        attention_backend=args.attention_backend,
        matmul_backend=args.matmul_backend,
        max_model_len=512,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=args.batch_tokens,
        block_size=args.block_size,
        compilation_cache_dir=args.cache,
        skip_tokenizer_init=True,
    )
    load = time.perf_counter() - start
    compiled = llm.compiled_programs()
    read = [x for name, x in llm.engine.runner.named_params.items() if name != "embedding.weight"]
    result = {
        "peer": "jaxserve",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "mixed": args.mixed,
        "load_s": round(load, 1),
        "programs": len(compiled),
        "compile_s": round(math.fsum(c.seconds for c in compiled), 1),
        "throughput": throughput(llm, args.repeats, args.mixed),
        "latency": latency(llm, args.repeats + 1, sum(x.nbytes for x in read)),
        "rss_mib": round(psutil.Process().memory_info().rss / 2**20),
    }
    if args.json:
        args.json.write_text(json.dumps(result))
    result["throughput"] = {k: v for k, v in result["throughput"].items() if k != "tokens"}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
