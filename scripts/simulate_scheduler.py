"""Thousands of requests through the scheduler alone, with a model of how long steps take instead of a model.

Who comes when, and with how much, is drawn from --arrivals and the lengths, or read from a trace. A step takes

    a * decode steps in one + b * token rows (padding included) + c * KV tokens read + d * KV blocks moved

seconds: as told (--step-time), or as fitted by non-negative least squares to a recording (--fit), whose engine settings
are then the defaults. With --compare, other settings see the very same arrivals, and are shown beside.

A trace has one JSON object per line: "arrival" (seconds), "prompt_tokens", "output_tokens", and if wished "tenant",
"priority", "prefix" (requests with the same one begin with the same tokens) and "prefix_tokens" (how many; part of
"prompt_tokens").
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

from schedule_log import RunLog
from schedule_report import Parser, add_output_arguments, check_plot, duration, show
from simulated_engine import SETTINGS, Fit, Setting, StepTime, fit_step_time, settings_of, simulate
from tqdm import tqdm

from jaxserve.config import SchedulerConfig
from jaxserve.evaluation.traces import Arrival, TraceShape, read_trace, tenant_rates, write_trace
from jaxserve.recording import Recording

EXAMPLES = """examples:
  python scripts/simulate_scheduler.py --step-time 8e-3,2.5e-5,4e-9 --arrivals poisson:20
  python scripts/simulate_scheduler.py --fit run.rec --arrivals burst:64@10 --requests 640 --plot burst.png
  python scripts/simulate_scheduler.py --step-time 8e-3,2.5e-5,4e-9 --arrivals poisson:30 --tenants a=1,b=9 \\
      --compare policy=fair --compare policy=fair,max_num_seqs=32 --plot fair.png
  python scripts/simulate_scheduler.py --step-time 8e-3,2.5e-5,4e-9 --trace day.jsonl --num-blocks 2000 \\
      --compare swap_space=8,preemption_mode=swap --json -
"""
BASE = "base"


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    check_plot(parser, args.plot)
    try:
        run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error).replace("\n", " "))


def _parser() -> Parser:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    times = parser.add_argument_group("how long steps take").add_mutually_exclusive_group(required=True)
    times.add_argument("--step-time", metavar="A,B,C[,D]", help="seconds; D from the swap bandwidth if left out")
    times.add_argument("--fit", metavar="RECORDING", type=Path, help="fitted to a recorded run")
    parser.add_argument(
        "--host-time",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="host's share of each step, on top of the step time; hidden behind the step before by async_scheduling",
    )
    add_trace_arguments(parser)
    group = parser.add_argument_group("engine settings (names as in jaxserve.LLM where it has them)")
    for name, setting in SETTINGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar=setting.metavar, help=setting.help)
    parser.add_argument(
        "--compare",
        metavar="NAME=VALUE,...",
        action="append",
        default=[],
        help="run these settings too, on the same arrivals; may be given several times",
    )
    add_output_arguments(parser)
    return parser


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("arrivals")
    group.add_argument("--requests", type=int, default=TraceShape.requests, help="how many (%(default)s)")
    group.add_argument(
        "--arrivals",
        metavar="PROCESS",
        default=TraceShape.arrivals,
        help="poisson:RATE or uniform:RATE (per second), burst:N@PERIOD (N at once, every PERIOD seconds), or all "
        "(at once); %(default)s",
    )
    lengths = "fixed:N, uniform:A-B or lognormal:MEDIAN,SIGMA (of the logarithm)"
    group.add_argument("--prompt-len", metavar="LENGTH", default=TraceShape.prompt_len, help=f"tokens: {lengths}")
    group.add_argument("--output-len", metavar="LENGTH", default=TraceShape.output_len, help="the same")
    group.add_argument(
        "--longest",
        type=int,
        default=TraceShape.longest,
        help="most tokens of a prompt, and of an output (%(default)s)",
    )
    group.add_argument(
        "--shared-prefix", metavar="N:SHARE", help="N more tokens, the same ones, before this share of the prompts"
    )
    group.add_argument(
        "--tenants",
        metavar="NAME=SHARE[:RATE],...",
        help="shares of the arrivals; RATE: most tokens per second under the fair policy",
    )
    group.add_argument("--priorities", metavar="P=SHARE,...", help="the same for priorities (lower goes first)")
    group.add_argument("--seed", type=int, default=TraceShape.seed)
    group.add_argument("--trace", metavar="FILE.jsonl", type=Path, help="read them instead (format above)")
    group.add_argument("--write-trace", metavar="FILE.jsonl", type=Path, help="keep them for --trace")


def trace_shape(args: argparse.Namespace) -> TraceShape:
    """As the arguments say."""
    return TraceShape(**{field.name: getattr(args, field.name) for field in fields(TraceShape)})


def run(args: argparse.Namespace) -> None:
    trace = read_trace(args.trace) if args.trace else trace_shape(args).draw()
    if args.write_trace:
        write_trace(trace, args.write_trace)
    fitted = _fitted(args.fit) if args.fit else None
    settings = _settings(args, trace, fitted)
    if fitted is not None:
        print(fit_text(fitted[1]), file=sys.stderr)
    logs = {}
    for name, setting in settings.items():
        with tqdm(total=len(trace), desc=name, unit=" requests", delay=2, disable=None, leave=False) as bar:
            logs[name] = simulate(trace, setting, args.seed, bar.update)
        _say_refused(name, logs[name])
    title = f"{len(trace):,} requests that arrive within {duration(trace[-1].arrival)}, simulated"
    times = {name: asdict(setting.step_time) for name, setting in settings.items()}
    fit = None if fitted is None else asdict(fitted[1])
    show(logs, title, args.json, args.plot, step_times=times, fit=fit, seed=args.seed)


def _fitted(path: Path) -> tuple[Recording, Fit]:
    recording = Recording(path)
    return recording, fit_step_time(recording)


def _settings(
    args: argparse.Namespace, trace: list[Arrival], fitted: tuple[Recording, Fit] | None
) -> dict[str, Setting]:
    """By name, the one that the flags say first."""
    given = {name: text for name in SETTINGS if (text := getattr(args, name)) is not None}
    base = _default(trace, args) if fitted is None else _recorded(*fitted, args)
    rates = tenant_rates(args.tenants)
    settings = {BASE: settings_of(base, given, rates)}
    for text in args.compare:
        settings[text] = settings_of(base, given | _pairs(text), rates)
    return settings


def _default(trace: list[Arrival], args: argparse.Namespace) -> Setting:
    step_time = StepTime.parse(args.step_time)
    longest = max(a.prompt_tokens + a.output_tokens for a in trace)
    return Setting(SchedulerConfig(longest, 64, 2048, 16, 4096), True, step_time, args.host_time)


def _recorded(recording: Recording, fit: Fit, args: argparse.Namespace) -> Setting:
    is_async = recording.options.get("async_scheduling", True)
    return Setting(recording.config, is_async, fit.step_time, args.host_time)


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in SETTINGS:
            raise ValueError(f"--compare {text}: {name!r} is no setting; there are {', '.join(SETTINGS)}")
        pairs[name.strip()] = value.strip()
    return pairs


def fit_text(fit: Fit) -> str:
    t, moved = fit.step_time, "" if fit.moves else " (from the recorded bandwidth)"
    parts = [duration(t.a), f"{duration(t.b)} per row", f"{duration(t.c)} per KV token"]
    if t.d:
        parts.append(f"{duration(t.d)} per block moved{moved}")
    return (
        f"fitted step time: {' + '.join(parts)}; over {fit.steps:,} steps ({fit.dropped:,} left out), off by "
        f"{100 * fit.median_error:.1f} % (median), {duration(fit.rms_error)} (rms), R² {fit.r_squared:.3f}"
    )


def _say_refused(name: str, log: RunLog) -> None:
    if log.refusal is not None:
        print(f"{name}: {log.refused:,} requests can never run, such as: {log.refusal}", file=sys.stderr)


if __name__ == "__main__":
    main()
