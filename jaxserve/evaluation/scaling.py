"""How a model scales over devices: the command behind ``scripts/scaling.py`` and ``jaxserve bench scaling``.

The same requests run on more and more devices along each axis of the mesh (strong scaling), and so do requests that
grow with the devices (weak scaling). Measured speed-ups stand beside those that the cost model predicts for a named
GPU; what the collectives of the compiled steps would take of a step there is their audited bytes over its links.
"""

from __future__ import annotations

from typing import Annotated

import typer

from jaxserve.cli.command import epilog
from jaxserve.cli.options import EngineFlags
from jaxserve.evaluation.flags import PredictionFlags, ReportFlags, ScalingFlags

QUESTION = "What do more devices bring, along each axis of the mesh?"
AXES = ("tp", "pp", "dp")
DEFAULTS = EngineFlags(dtype="float32", skip_tokenizer_init=True)


@epilog(
    "jaxserve bench scaling",
    "jaxserve bench scaling --gpu h200 --axis tp --devices 4 --requests 16",
    "jaxserve bench scaling -m DIR --dtype bfloat16 --input-len 1024 --output-len 128 --least-efficiency 0.8",
)
def scaling(
    report: ReportFlags,
    prediction: PredictionFlags,
    asked: ScalingFlags,
    engine: EngineFlags = DEFAULTS,
    axis: Annotated[
        list[str] | None, typer.Option("--axis", metavar="AXIS", help="tp, pp or dp; may be repeated. None = all.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Up to so many: powers of two times those of the mesh.")] = 8,
) -> None:
    """Strong and weak scaling along the axes of the mesh: speed-up, efficiency, share of communication.

    The mesh that is given (one device unless told otherwise) is the first; each axis is multiplied by 2, 4, ... from
    there. Sizes that the model cannot have are shown with the reason. Exit code 1 if tokens are not the first mesh's,
    collectives not those expected, or a pipeline stage is slower than the others.
    """
    from jaxserve.evaluation import scaling_report, scaling_runs
    from jaxserve.evaluation.command import begin, engine_options, finish
    from jaxserve.evaluation.engines import mesh_of, start_devices

    axes = list(dict.fromkeys(axis or AXES))
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ValueError(f"--axis {unknown[0]}: it is one of {', '.join(AXES)}")
    options = engine_options(engine)
    base = mesh_of(options)
    there = start_devices(max(devices, base.num_devices))
    load = asked.load(engine.seed)
    found = scaling_runs.places(base, axes, devices)
    possible, impossible = scaling_runs.check_places(options, found, load, there)
    result = begin("scaling", QUESTION, options, engine.seed, base.sizes)
    result.simulated |= result.environment["platform"] == "cpu" and len(possible) > 1
    limits = asked.limits(result.simulated)
    runs = list(scaling_runs.measure(options, possible, load, prediction.gpu))
    finish(result, scaling_report.fill(result, runs, impossible, limits, prediction.gpu), report)
