"""The commands of ``jaxserve bench``. What they need is imported when they run: ``--help`` answers at once."""

from __future__ import annotations

from jaxserve.cli.command import epilog
from jaxserve.cli.options import EngineFlags
from jaxserve.commands.bench.options import BenchFlags, DatasetFlags, PaceFlags, RepeatFlags, SingleFlags, StartupFlags


@epilog(
    "jaxserve bench throughput",
    "jaxserve bench throughput --model path/to/checkpoint --num-prompts 200 --input-len 64-512 --output-len 32-128",
    "jaxserve bench throughput --load-format dummy --model directory/with/config.json -tp 2 --json",
    'jaxserve bench throughput --request-rate 20 --goodput "ttft:200 tpot:50" --out report',
    "jaxserve bench throughput --dataset sharegpt --dataset-path conversations.jsonl --max-concurrency 16",
    "jaxserve bench throughput --dataset trace --dataset-path day.jsonl",
    "jaxserve bench throughput --dataset prefix --sweep enable_prefix_caching=true,false",
    "jaxserve bench throughput --sweep max_num_seqs=8,16,32 --sweep num_prompts=32,64 --out report",
)
def throughput(data: DatasetFlags, pace: PaceFlags, engine: EngineFlags, runs: RepeatFlags, flags: BenchFlags) -> None:
    """Tokens per second of requests that are all there at once, or come over time.

    All at once, they go through LLM. Loading, compiling and a first run are not counted.

    With arrival times (--request-rate, --arrivals, a trace), --max-concurrency or --goodput they come to AsyncLLM, and
    latencies are shown, counted from when a request was due (with --max-concurrency alone: from when it had a place).

    TTFT: time to first token. TPOT: per token after it. ITL: between tokens. E2EL: end to end.
    """
    from jaxserve.commands.bench.throughput import run

    run({"engine": engine, "data": data, "pace": pace, "runs": runs}, flags)


@epilog(
    "jaxserve bench latency",
    "jaxserve bench latency --input-len 32 --output-len 128 --repeats 5",
    "jaxserve bench latency --load-format dummy --model directory/with/config.json --dtype bfloat16 --json",
    "jaxserve bench latency --sweep dtype=float32,bfloat16 --out report",
)
def latency(engine: EngineFlags, single: SingleFlags, flags: BenchFlags) -> None:
    """Time to first token and per token of one request, beside the time that reading the weights must take."""
    from jaxserve.commands.bench.latency import run

    run({"engine": engine, "single": single}, flags)


@epilog(
    "jaxserve bench startup",
    "jaxserve bench startup --model path/to/checkpoint -tp 2 --repeats 3 --out report",
    "jaxserve bench startup --sweep max_num_seqs=16,64 --json",
)
def startup(engine: EngineFlags, start: StartupFlags, flags: BenchFlags) -> None:
    """Time to import, start devices, load, compile and answer, each time in a new process.

    Cold: with an empty compile cache; warm: with what the cold one left there. Weights that were read a moment before
    come from the operating system's memory, and GPU drivers keep caches of their own: neither is emptied.
    """
    from jaxserve.commands.bench.startup import run

    run({"engine": engine, "start": start}, flags)
