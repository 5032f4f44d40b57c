"""Replay a recorded schedule and say whether it comes out the same.

A recording is what ``LLM(..., record="FILE")`` wrote: every event and every decision of the scheduler. Without the
model only the host half runs (no jax). With it, the tokens are computed again on this machine, by an engine built from
the recorded options, and compared as well. Exit code 0: no difference; 1: it differs; 2: it could not be replayed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from schedule_report import Parser, duration, write_json
from tqdm import tqdm

from jaxserve.recording import Device, Recording, replay

EXAMPLES = """examples:
  python scripts/replay_schedule.py run.rec
  python scripts/replay_schedule.py run.rec --through-model
  python scripts/replay_schedule.py run.rec --through-model --model path/to/the/same/checkpoint --json -
"""


def main() -> int:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--through-model", action="store_true", help="compute the tokens again, and compare them too")
    parser.add_argument("--model", help="where the recorded model is on this machine")
    parser.add_argument("--json", metavar="FILE", help="write the result there; - writes it instead of the text")
    args = parser.parse_args()
    if args.model is not None and not args.through_model:
        parser.error("--model is of no use without --through-model")
    try:
        result = run(args.recording, args.through_model, args.model)
        if args.json is not None:
            write_json(result, args.json)
    except (OSError, ValueError, NotImplementedError, TypeError) as error:
        parser.error(str(error).replace("\n", " "))
    if args.json != "-":
        print(text(result))
    return int(result["difference"] is not None)


def run(path: Path, through_model: bool, model: str | None) -> dict[str, Any]:
    recording = Recording(path)
    device = _device(recording, model) if through_model else None
    bar = partial(tqdm, desc="replaying", unit=" entries", delay=2, disable=None, leave=False)
    start = time.perf_counter()
    result = replay(recording, device, progress=bar)
    seconds = time.perf_counter() - start
    return {**asdict(result), "through_model": through_model, "seconds": seconds}


def _device(recording: Recording, model: str | None) -> Device:
    from jaxserve.replay_device import ModelDevice, recorded_engine

    return ModelDevice(recorded_engine(recording, model))


def text(result: dict[str, Any]) -> str:
    through = "scheduler and model" if result["through_model"] else "scheduler alone"
    per_step = result["seconds"] / max(1, result["num_steps"])
    counts = f"{result['num_steps']:,} steps, {result['num_requests']:,} requests"
    times = f"{duration(result['seconds'])} ({duration(per_step)} per step, {through})"
    return f"{counts}, {times}: {result['difference'] or 'no difference'}"


if __name__ == "__main__":
    raise SystemExit(main())
