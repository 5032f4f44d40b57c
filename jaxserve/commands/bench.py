"""``jaxserve bench``: throughput and latency of this engine on this machine."""

from __future__ import annotations

from statistics import median
from typing import Annotated, Any

import typer

from jaxserve.cli.command import epilog
from jaxserve.cli.options import EngineFlags, Json
from jaxserve.cli.output import bytes_text, print_json, print_pairs, seconds_text, watched

Repeats = Annotated[int, typer.Option(min=1, help="Measured runs; the median is shown.")]


@epilog(
    "jaxserve bench throughput",
    "jaxserve bench throughput --model path/to/checkpoint --num-prompts 200 --input-len 64-512 --output-len 32-128",
    "jaxserve bench throughput --load-format dummy --model directory/with/config.json -tp 2 --json",
)
def throughput(
    engine: EngineFlags,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests, all queued at once.")] = 64,
    input_len: Annotated[str, typer.Option(metavar="N|A-B", help="Prompt tokens, fixed or a range.")] = "128",
    output_len: Annotated[str, typer.Option(metavar="N|A-B", help="Output tokens, fixed or a range.")] = "64",
    repeats: Repeats = 3,
    as_json: Json = False,
) -> None:
    """Tokens per second of a queue of random prompts. Loading, compiling and a first run are not counted."""
    from jaxserve.commands.measure import Workload, measure_throughput, open_engine

    inputs, outputs = parse_range("--input-len", input_len), parse_range("--output-len", output_len)
    llm = open_engine(engine.engine_options(), inputs[1] + outputs[1], watched())
    workload = Workload.random(llm, num_prompts, inputs, outputs, engine.seed)
    runs = measure_throughput(llm, workload, repeats)
    report = {
        "workload": {"num_prompts": num_prompts, "input_len": inputs, "output_len": outputs},
        "prompt_tokens": workload.num_prompt_tokens,
        "output_tokens": workload.num_output_tokens,
        **{name: median(run[name] for run in runs) for name in runs[0]},
        **compiled(llm),
        "runs": runs,
    }
    if as_json:
        print_json(report)
    else:
        _print_throughput(report)


def _print_throughput(report: dict[str, Any]) -> None:
    print_pairs(
        f"{report['workload']['num_prompts']} requests, {report['prompt_tokens']} prompt tokens, "
        f"{report['output_tokens']} output tokens, median of {len(report['runs'])}",
        {
            "prompt": f"{report['prompt_tokens_per_second']:,.0f} tok/s",
            "output": f"{report['output_tokens_per_second']:,.0f} tok/s",
            "total": f"{report['total_tokens_per_second']:,.0f} tok/s",
            "requests": f"{report['requests_per_second']:,.2f} per second",
            "wall": seconds_text(report["seconds"]),
            "steps": f"{report['steps']:.0f}, {seconds_text(report['seconds'] / report['steps'])} each",
            "padding": f"{report['padding_share']:.1%} of the rows computed",
            "host": f"works {report['host_share']:.1%} of the time in steps; the devices wait for it at most "
            f"{report['device_idle_share']:.1%}",
            "KV blocks": f"{report['kv_efficiency']:.1%} of their token slots in use",
            "preemptions": f"{report['preemptions']:.0f}",
            "compiled": f"{report['programs']} programs in {seconds_text(report['compile_seconds'])}, not counted",
        },
    )


@epilog(
    "jaxserve bench latency",
    "jaxserve bench latency --input-len 32 --output-len 128 --repeats 5",
    "jaxserve bench latency --load-format dummy --model directory/with/config.json --dtype bfloat16 --json",
)
def latency(
    engine: EngineFlags,
    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 32,
    output_len: Annotated[int, typer.Option(min=2, help="Output tokens.")] = 64,
    repeats: Repeats = 5,
    as_json: Json = False,
) -> None:
    """Time to first token and per token of one request, beside the time that reading the weights must take."""
    from jaxserve.commands.measure import Workload, floor, measure_latency, open_engine

    llm = open_engine(engine.engine_options(), input_len + output_len, watched())
    length = (input_len, input_len), (output_len, output_len)
    workload = Workload.random(llm, 1, *length, engine.seed)
    report = {
        "workload": {"input_len": input_len, "output_len": output_len, "repeats": repeats},
        **measure_latency(llm, workload, repeats),
        **floor(llm),
        **compiled(llm),
    }
    report["times_the_floor"] = report["token_seconds_median"] / report["floor_seconds"]
    if as_json:
        print_json(report)
    else:
        _print_latency(report)


def _print_latency(report: dict[str, Any]) -> None:
    work = report["workload"]
    print_pairs(
        f"one request, {work['input_len']} prompt tokens, {work['output_len']} output tokens, {work['repeats']} times",
        {
            "first token": f"{seconds_text(report['ttft_median'])} median, {seconds_text(report['ttft_p90'])} p90",
            "per token": f"{seconds_text(report['token_seconds_median'])} median, "
            f"{seconds_text(report['token_seconds_p90'])} p90",
            "output": f"{1 / report['token_seconds_median']:,.0f} tok/s",
            "floor": f"{seconds_text(report['floor_seconds'])} per token: {bytes_text(report['weight_bytes_read'])} "
            f"of weights at {report['bandwidth'] / 1e9:.1f} GB/s measured",
            "ratio": f"{report['times_the_floor']:.2f} × the floor",
            "compiled": f"{report['programs']} programs in {seconds_text(report['compile_seconds'])}, not counted",
        },
    )


def compiled(llm: Any) -> dict[str, Any]:
    records = llm.compiled_programs()
    return {"programs": len(records), "compile_seconds": sum(r.seconds for r in records)}


def parse_range(name: str, text: str) -> tuple[int, int]:
    """ "128" -> (128, 128), "64-256" -> (64, 256)."""
    low, dash, high = text.partition("-")
    if not low.isdigit() or (dash and not high.isdigit()):
        raise ValueError(f"{name} {text!r}: it is a number of tokens, or a range like 64-256")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} {text!r}: it begins at 1 or above and does not fall")
    return bounds
