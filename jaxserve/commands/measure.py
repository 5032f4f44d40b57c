"""What ``jaxserve bench`` measures."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.build import ModelFiles
from jaxserve.config import GIB
from jaxserve.engine_args import EngineArgs
from jaxserve.llm import LLM
from jaxserve.metrics import EngineMetrics
from jaxserve.sampling_params import RequestOutputKind, SamplingParams

NOT_READ = ("embedding.weight", "position_embedding.weight")
"""Tables of which a step reads only the rows of its tokens."""


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens, each with the number of tokens to answer with."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @classmethod
    def random(cls, llm: LLM, count: int, inputs: tuple[int, int], outputs: tuple[int, int], seed: int) -> Workload:
        """Lengths are uniform in the given ranges, both ends included."""
        rng = np.random.default_rng(seed)
        vocab = llm.engine.runner.decoder.vocab_size
        lengths = rng.integers(*inputs, size=count, endpoint=True)
        prompts = [rng.integers(0, vocab, size=n).tolist() for n in lengths]
        answers = rng.integers(*outputs, size=count, endpoint=True)
        return cls(prompts, [_fixed_length(int(n)) for n in answers])

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(p.max_tokens or 0 for p in self.params)


def _fixed_length(count: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )


def open_engine(options: dict[str, Any], longest: int, show: bool) -> LLM:
    """The engine without a tokenizer; ValueError before anything is loaded if the requests are too long for it."""
    options = options | {"skip_tokenizer_init": True, "use_tqdm_on_load": show}
    args = EngineArgs.of(**options)
    limit = args.max_model_len or ModelFiles.find(args).decoder.max_position
    if longest > limit:
        raise ValueError(f"input and output are up to {longest} tokens, the longest sequence is {limit} tokens")
    return LLM(**options)


def measure_throughput(llm: LLM, workload: Workload, repeats: int) -> list[dict[str, float]]:
    """One dictionary per run; a run before them fills caches."""
    llm.generate(workload.prompts, workload.params, use_tqdm=False)
    return [_throughput_run(llm, workload) for _ in range(repeats)]


def _throughput_run(llm: LLM, workload: Workload) -> dict[str, float]:
    llm.reset_prefix_cache()  # else the prompts of the run before are found, and nothing is computed
    before = llm.get_metrics().snapshot()
    start = time.perf_counter()
    llm.generate(workload.prompts, workload.params, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = llm.get_metrics()

    def grown(name: str) -> float:
        return getattr(after, name) - getattr(before, name)

    padding, read, written = (grown(f"num_{k}_tokens") for k in ("padding", "prompt", "generation"))
    host, wait, idle = (grown(f"{k}_seconds") for k in ("host", "wait", "device_idle"))
    # A request's first token comes out of its last prompt token, so it has no row of its own.
    rows = padding + read + written - len(workload.prompts)
    prompt_tokens, output_tokens = workload.num_prompt_tokens, workload.num_output_tokens
    return {
        "seconds": seconds,
        "prompt_tokens_per_second": prompt_tokens / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "requests_per_second": len(workload.prompts) / seconds,
        "steps": grown("num_steps"),
        "padding_share": padding / rows,
        "host_share": host / (host + wait),
        "device_idle_share": idle / (host + wait),
        "kv_efficiency": _efficiency(before, after),
        "preemptions": grown("num_preemptions"),
    }


def _efficiency(before: EngineMetrics, after: EngineMetrics) -> float:
    """Share of the token slots of held KV blocks that held a token."""
    held = after.scheduler.held_slots - before.scheduler.held_slots
    return (after.scheduler.live_slots - before.scheduler.live_slots) / held if held else 0.0


def measure_latency(llm: LLM, workload: Workload, repeats: int) -> dict[str, Any]:
    """Time to the first token and between tokens, as a caller of ``LLM.stream`` sees them, in seconds."""
    _token_times(llm, workload)
    runs = [_token_times(llm, workload) for _ in range(repeats)]
    first = [times[0] for times in runs]
    between = [float(t) for times in runs for t in np.diff(times)]
    return {
        "ttft_median": median(first),
        "ttft_p90": float(np.percentile(first, 90)),
        "token_seconds_median": median(between),
        "token_seconds_p90": float(np.percentile(between, 90)),
        "ttft": first,
    }


def _token_times(llm: LLM, workload: Workload) -> list[float]:
    llm.reset_prefix_cache()
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in llm.stream(workload.prompts, workload.params)]


def floor(llm: LLM) -> dict[str, float]:
    """The least time that a token can take: every weight is read once from memory."""
    weight_bytes = weight_bytes_read(llm)
    bandwidth = read_bandwidth(llm.engine.runner.mesh.devices.flat[0])
    return {
        "weight_bytes_read": weight_bytes,
        "bandwidth": bandwidth,
        "floor_seconds": weight_bytes / bandwidth,
    }


def weight_bytes_read(llm: LLM) -> int:
    """Bytes of weights that share one memory and are read for every token."""
    runner = llm.engine.runner
    on_cpu = runner.mesh.devices.flat[0].platform == "cpu"
    read = [array.addressable_shards for name, array in runner.named_params.items() if name not in NOT_READ]
    return sum(shard.data.nbytes for shards in read for shard in (shards if on_cpu else shards[:1]))


def read_bandwidth(device: Any, num_bytes: int = GIB) -> float:
    """Bytes per second, the best of several reads of an array that no cache holds."""
    if device.platform != "cpu":
        return _device_bandwidth(device, num_bytes)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return num_bytes / min(_timed(lambda: list(pool.map(np.max, parts))) for _ in range(5))


def _device_bandwidth(device: Any, num_bytes: int) -> float:
    array = jax.device_put(jnp.ones((num_bytes // 4,), jnp.float32), device)
    largest = jax.jit(jnp.max)
    largest(array).block_until_ready()
    return num_bytes / min(_timed(lambda: largest(array).block_until_ready()) for _ in range(5))


def _timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
