"""What do more devices bring? 1, 2, 4, 8 of them along tp, pp and dp, with the same requests and with more.

Speed-up and efficiency of strong and weak scaling, beside what the cost model predicts for a named GPU; the share of a
step that its collectives would take there; and whether tokens, collectives and pipeline stages are as they should be.

    python scripts/scaling.py --gpu h200 --out report
    python scripts/scaling.py -m path/to/checkpoint --dtype bfloat16 --axis tp --input-len 1024 --output-len 128
"""

from jaxserve.cli.command import run_script
from jaxserve.evaluation.scaling import scaling


def main() -> None:
    run_script(scaling)


if __name__ == "__main__":
    main()
