"""What a recorded run did: latencies, throughput, batches, preemptions, memory and tenants, as a table and a plot.

A recording is what ``LLM(..., record="FILE")`` wrote. Its scheduler is run again to see its queues and blocks; times
are the recorded ones: tokens count as there when the next step was scheduled, or where the engine went idle instead,
after as long as steps of that size usually took.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from schedule_log import recorded_run
from schedule_report import Parser, add_output_arguments, check_plot, show

from jaxserve.recording import Recording

EXAMPLES = """examples:
  python scripts/analyze_batches.py run.rec
  python scripts/analyze_batches.py run.rec --plot run.png --json run.json
"""


def main() -> None:
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    add_output_arguments(parser)
    args = parser.parse_args()
    check_plot(parser, args.plot)
    try:
        log, difference = recorded_run(Recording(args.recording))
        if not log.steps:
            parser.error(f"{args.recording}: no step was recorded")
        if difference is not None:
            print(f"this scheduler decides otherwise; what follows is up to there: {difference}", file=sys.stderr)
        title = f"{args.recording.name}: recorded run"
        show({"recorded": log}, title, args.json, args.plot, difference=difference)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
