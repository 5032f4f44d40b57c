"""The whole engine on one GPU, with random weights: decoding and prefill, each beside the least time that it can take.

The floor of a step is the bytes of weights and KV that it reads by the bandwidth of a large copy, or its FLOP by the
speed of a large product, whichever is longer; both are measured in the same run (``scripts/gpu_timing.py``). Hugging
Face transformers runs on the same shapes where PyTorch sees a GPU, first of all, because jax then takes the memory.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from bench_kernels import print_rows

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.output import jsonable, progress, seconds_text, watched

if TYPE_CHECKING:
    from gpu_timing import Limits

    from jaxserve import LLM
    from sharding.cost_model import Step

WARM_STEPS = 4
TTFT_REPEATS = 5
PREFILL_BATCH = 4
"""Prompts that are read together where throughput is measured; the time to the first token is that of one alone."""


@dataclass(frozen=True)
class Plan:
    """What is measured of a model. ``decode``: (sequences, context); ``prefill``: lengths of prompts."""

    model: str
    dtype: str
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]
    steps: int
    budget: int
    """Tokens of the largest step."""

    def new_tokens(self, batch: int, context: int) -> int:
        """That the first sequence generates before the last one is measured: prompts are read while others decode."""
        return math.ceil(batch * context / max(1, self.budget - batch)) + batch // 8 + self.steps + WARM_STEPS + 8

    @property
    def longest(self) -> int:
        return max(*(c + self.new_tokens(b, c) for b, c in self.decode), *(n + 2 for n in self.prefill))

    def options(self) -> dict[str, Any]:
        """Of the engine: no prompt is found in the prefix cache, and few programs are compiled."""
        seqs = max(b for b, _ in self.decode)
        buckets = sorted({b for b, _ in self.decode} | {PREFILL_BATCH})
        tokens = sorted({max(64, self.budget // 16), max(64, self.budget // 4), self.budget})
        return {
            "model": self.model,
            "load_format": "dummy",
            "dtype": self.dtype,
            "max_model_len": self.longest,
            "max_num_seqs": max(seqs, PREFILL_BATCH),
            "max_num_batched_tokens": self.budget,
            "decode_buckets": tuple(buckets),
            "token_buckets": tuple(tokens),
            "enable_prefix_caching": False,
            "swap_space": 0.0,
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": watched(),
        }


POINTS = tuple((batch, context) for context in (1024, 8192) for batch in (1, 16, 64, 256))
PLANS = tuple(
    Plan(model, "bfloat16", POINTS, (2048, 8192), steps=64, budget=8192) for model in ("llama-3.1-8b", "qwen2.5-0.5b")
)
SMALL = (Plan("demo", "float32", ((1, 16), (4, 16)), (32,), steps=8, budget=64),)


@dataclass(frozen=True)
class Row:
    """One figure: tokens per second and the seconds of a step (decode) or of a prompt (prefill, ttft). Or, as
    ``reason``, why there is none."""

    model: str
    what: str
    batch: int
    context: int
    tokens_per_second: float | None = None
    seconds: float | None = None
    floor_seconds: float | None = None
    times_floor: float | None = None
    host_share: float | None = None
    """Of the time in steps, in which Python worked; the devices need not have waited for it."""
    device_idle_share: float | None = None
    reason: str | None = None
    hf_static: float | str | None = None
    hf_continuous: float | str | None = None


# -- this engine -------------------------------------------------------------------------------------------------------


@contextmanager
def requests(llm: LLM, batch: int, length: int, new: int) -> Iterator[dict[str, int]]:
    """That many random prompts, queued; how many tokens each has got. Nothing of them stays behind."""
    import numpy as np

    from jaxserve.sampling_params import RequestOutputKind, SamplingParams

    kind = RequestOutputKind.DELTA
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=kind)
    rng = np.random.default_rng(0)
    counts = {f"bench-{i}": 0 for i in range(batch)}
    try:
        for name in counts:
            prompt = rng.integers(0, llm.engine.runner.decoder.vocab_size, size=length).tolist()
            llm.engine.add_request(name, prompt, params)
        yield counts
    finally:
        for name in counts:
            llm.engine.abort(name)
        while llm.engine.is_busy:
            llm.engine.step()


def step(llm: LLM, counts: dict[str, int]) -> None:
    for output in llm.engine.step():
        counts[output.request_id] += len(output.outputs[0].token_ids)


def decode(llm: LLM, plan: Plan, batch: int, context: int, limits: Limits | None) -> Row:
    row = Row(plan.model, "decode", batch, context)
    new = plan.new_tokens(batch, context)
    if reason := no_room(llm, batch, context + new):
        return replace(row, reason=reason)
    with requests(llm, batch, context, new) as counts:
        while min(counts.values()) == 0:
            step(llm, counts)
        for _ in range(WARM_STEPS):
            step(llm, counts)
        before, written = llm.get_metrics().snapshot(), sum(counts.values())
        start = time.perf_counter()
        for _ in range(plan.steps):
            step(llm, counts)
        seconds = time.perf_counter() - start
        after, generated = llm.get_metrics(), sum(counts.values()) - written
        if generated != batch * plan.steps or after.num_preemptions != before.num_preemptions:
            reason = f"{plan.steps} steps gave {generated} tokens: {batch} sequences did not all decode in each"
            return replace(row, reason=reason)
        length = context + round((written + generated / 2) / batch)
        host, wait, idle = (getattr(after, n) - getattr(before, n) for n in TIMES)
        from sharding.cost_model import Step

        return replace(
            row,
            tokens_per_second=generated / seconds,
            host_share=host / (host + wait),
            device_idle_share=idle / (host + wait),
            **beside_floor(llm, Step.decode(batch, length), seconds / plan.steps, limits),
        )


TIMES = ("host_seconds", "wait_seconds", "device_idle_seconds")


def prefill(llm: LLM, plan: Plan, batch: int, length: int, limits: Limits | None) -> Row:
    """Until all prompts have their first token; of one prompt that is the time to the first token."""
    from sharding.cost_model import Group, Step

    row = Row(plan.model, "ttft" if batch == 1 else "prefill", batch, length)
    if reason := no_room(llm, batch, length + 2):
        return replace(row, reason=reason)
    first_tokens(llm, batch, length)
    seconds = median(first_tokens(llm, batch, length) for _ in range(TTFT_REPEATS))
    floor = beside_floor(llm, Step((Group(batch, length),)), seconds, limits)
    return replace(row, tokens_per_second=batch * length / seconds, **floor)


def first_tokens(llm: LLM, batch: int, length: int) -> float:
    """Seconds."""
    with requests(llm, batch, length, 1) as counts:
        start = time.perf_counter()
        while min(counts.values()) == 0:
            step(llm, counts)
        return time.perf_counter() - start


def no_room(llm: LLM, batch: int, length: int) -> str | None:
    """With the numbers, where the KV cache does not hold so many sequences of that length."""
    config = llm.engine.scheduler.config
    needed, there = batch * -(-length // config.block_size), config.num_blocks - 1
    if needed <= there:
        return None
    tokens = there * config.block_size
    return f"{batch} × {length:,} tokens do not fit: the KV cache holds {tokens:,}, {tokens // length} such sequences"


def beside_floor(llm: LLM, work: Step, seconds: float, limits: Limits | None) -> dict[str, float]:
    found = {"seconds": seconds}
    if limits is not None:
        floor = limits.floor(*cost(llm, work))
        found |= {"floor_seconds": floor, "times_floor": seconds / floor}
    return found


def cost(llm: LLM, work: Step) -> tuple[float, float]:
    """Bytes of weights and KV, and FLOP, that the work takes at least, if all of it were one step."""
    from jaxserve.models.shape import model_shape
    from sharding.cost_model import attention_work, dense_work, vocabulary_work
    from sharding.mesh import MeshConfig

    runner, mesh = llm.engine.runner, MeshConfig()
    shape = model_shape(runner.decoder, str(runner.params[0].dtype), str(runner.config.kv_dtype)).fit_to(mesh)
    dense, vocabulary = dense_work(shape, work.num_rows, mesh), vocabulary_work(shape, work, mesh)
    layers = [attention_work(shape, work, mesh, layer.window) for layer in runner.decoder.layers]
    num_bytes = vocabulary.bytes + sum(dense.bytes + layer.bytes for layer in layers)
    return num_bytes, vocabulary.flops + sum(dense.flops + layer.flops for layer in layers)


def measure(plan: Plan, limits: Limits | None) -> list[Row]:
    from jaxserve import LLM

    llm = LLM(**plan.options())
    try:
        points = [lambda b=b, c=c: decode(llm, plan, b, c, limits) for b, c in plan.decode]
        points += [lambda b=b, n=n: prefill(llm, plan, b, n, limits) for n in plan.prefill for b in (1, PREFILL_BATCH)]
        return [point() for point in progress(plan.model, points)]
    finally:
        llm.close()


# -- beside it ---------------------------------------------------------------------------------------------------------


def with_transformers(plan: Plan) -> dict[tuple[str, int, int], Any]:
    """(what, batch, context) -> ``hf_baseline.Baseline``."""
    import hf_baseline

    from jaxserve.build import ModelFiles
    from jaxserve.engine_args import EngineArgs

    model = hf_baseline.Model(ModelFiles.find(EngineArgs(model=plan.model)).directory)
    try:
        found: dict[tuple[str, int, int], Any] = {}
        for b, c in progress("transformers", plan.decode):
            found["decode", b, c] = model.decode(b, c, plan.steps)
        for b, n in [(b, n) for n in plan.prefill for b in (1, PREFILL_BATCH)]:
            found["ttft" if b == 1 else "prefill", b, n] = model.prefill(b, n)
        return found
    finally:
        model.close()


def print_report(report: dict[str, Any], rows: Sequence[Row]) -> None:
    print(f"{report['device']}, jax {report['jax']}; transformers: {report['transformers']}")
    if report["bandwidth"] is not None:
        print(f"copy {report['bandwidth'] / 1e12:.2f} TB/s, bfloat16 product {report['flops'] / 1e12:.0f} TFLOP/s")
    header = ["", "", "tokens/s", "a step, or TTFT", "floor", "× floor", "host", "idle", "HF static", "HF continuous"]
    print_rows(header, [_cells(row) for row in rows])
    for row in rows:
        if row.reason is not None:
            print(f"  {row.model}, {row.what} {row.batch} × {row.context}: {row.reason}")


def _cells(row: Row) -> list[str]:
    def text(value: Any, form: str) -> str:
        return "" if value is None else "failed" if isinstance(value, str) else format(value, form)

    times = ["" if s is None else seconds_text(s) for s in (row.seconds, row.floor_seconds)]
    shares = [text(share, ".1%") for share in (row.host_share, row.device_idle_share)]
    rates = [text(rate, ",.0f") for rate in (row.tokens_per_second, row.hf_static, row.hf_continuous)]
    name = f"{row.what} {row.batch} × {row.context}"
    return [row.model, name, rates[0], *times, text(row.times_floor, ".2f"), *shares, *rates[1:]]


@epilog(
    "python scripts/bench_gpu.py --json engine.json",
    "python scripts/bench_gpu.py --model qwen2.5-0.5b",
    "python scripts/bench_gpu.py --small",
)
def bench_gpu(
    *,
    model: Annotated[list[str] | None, typer.Option(help="Only this one; can be repeated.")] = None,
    small: Annotated[bool, typer.Option("--small", help="The demo model, on a CPU too: does it run at all?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report here.")] = None,
) -> None:
    """Decode and prefill of whole models on this machine's GPU, beside their floor and beside transformers. Weights are
    random; compiling is not counted."""
    plans = [p for p in (SMALL if small else PLANS) if not model or p.model in model]
    if not plans:
        raise ValueError(f"--model {' '.join(model or [])}: there are {', '.join(p.model for p in PLANS)}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"{json_file}: {json_file.parent} is no directory")
    import hf_baseline

    skipped = "not with --small" if small else hf_baseline.missing()
    beside = {p.model: with_transformers(p) for p in plans if skipped is None}
    report, limits = _start(small, skipped)
    rows: list[Row] = []
    for plan in plans:
        measured = measure(plan, limits)
        gc.collect()  # the engine's arrays, before the next one asks how much memory there is
        for row in measured:
            found = beside.get(plan.model, {}).get((row.what, row.batch, row.context))
            hf = {} if found is None else {"hf_static": found.static, "hf_continuous": found.continuous}
            rows.append(replace(row, **hf))
    if json_file is not None:
        whole = report | {"rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(jsonable(whole), indent=1, ensure_ascii=False) + "\n")
    print_report(report, rows)


def _start(small: bool, skipped: str | None) -> tuple[dict[str, Any], Limits | None]:
    """Of the report, what does not depend on models; and the limits, on a GPU."""
    import jax
    import transformers
    from gpu_timing import measure_limits, the_device

    device = the_device(small)
    limits = measure_limits() if device.platform == "gpu" else None
    found = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "transformers": skipped or transformers.__version__,
        "bandwidth": None if limits is None else limits.bandwidth,
        "flops": None if limits is None else limits.flops,
    }
    return found, limits


def main() -> None:
    run_script(bench_gpu)


if __name__ == "__main__":
    main()
