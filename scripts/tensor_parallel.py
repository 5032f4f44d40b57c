"""Does tensor parallelism divide a model as it should? The same model over 1, 2, 4 devices, loaded one after the other.

Each size answers the same prompts, which must give the same tokens; what its devices hold is counted from the arrays'
shards, and must be equal; and the collectives are read out of the compiled steps that just served, and held against
what the cost model expects.

    python scripts/tensor_parallel.py --out report
    python scripts/tensor_parallel.py --model path/to/checkpoint -tp 8 -dp 1 --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any

import typer

from jaxserve import SamplingParams
from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import bytes_text, progress, seconds_text
from jaxserve.dry_run import Program
from jaxserve.evaluation.command import ReportFlags, begin, engine_options, finish
from jaxserve.evaluation.engines import (
    audit_steps,
    kv_bytes,
    mesh_of,
    mesh_sizes,
    open_llm,
    random_prompts,
    reserve_devices,
    weight_bytes,
)
from jaxserve.evaluation.plots import Plot, Theme, bars
from jaxserve.evaluation.result import Check, Figure, Result, Table
from sharding.audit import LAYER_PARTS, SAMPLE
from sharding.mesh import MeshConfig

QUESTION = "Does tensor parallelism divide the model evenly, and give the same tokens?"
TOLERANCE = 0.02
"""Of a device's memory, relative to the median of all."""
PROMPT_LENGTHS = (5, 20, 40, 70, 100)
MIB = 1 << 20
DEFAULTS = EngineFlags(tensor_parallel_size=4, dtype="float32")


@dataclass(frozen=True)
class Run:
    """One size."""

    mesh: MeshConfig
    load_seconds: float
    compile_seconds: float
    tokens: list[list[int]]
    weights: dict[int, int]
    """Bytes by device."""
    kv: dict[int, int]
    kv_tokens: int
    programs: list[Program]

    @property
    def name(self) -> str:
        return f"tp={self.mesh.tp}"

    @property
    def collectives(self) -> dict[str, float]:
        """Per layer, of each step."""
        return {p.name: self._in_layers(p) / p.budget.num_layers for p in self.programs}

    @staticmethod
    def _in_layers(program: Program) -> int:
        return sum(1 for c in program.audit.collectives if c.axes and c.part in LAYER_PARTS)


@epilog("python scripts/tensor_parallel.py", "python scripts/tensor_parallel.py -tp 8 --out report --json")
def tensor_parallel(
    report: ReportFlags,
    engine: EngineFlags = DEFAULTS,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16,
) -> None:
    """Load a model with tp 1, 2, 4, ... up to -tp: same tokens, equal memory per device, collectives as expected.

    Other mesh axes stay as given. Exit code 1 if tokens, memory or collectives are not as they should be. Tokens are
    compared in float32 unless told otherwise: in less, other sums of the same numbers may tip a choice.
    """
    options = engine_options(engine, max_num_seqs=8, max_num_batched_tokens=128, num_gpu_blocks_override=128)
    options |= {"decode_buckets": (options["max_num_seqs"],), "token_buckets": (options["max_num_batched_tokens"],)}
    largest = mesh_of(options)
    reserve_devices(largest.num_devices)
    result = begin("tensor_parallel", QUESTION, options, engine.seed, mesh_sizes(largest))
    runs = [_run(options, replace(largest, tp=tp), max_tokens) for tp in progress("sizes", sizes_up_to(largest.tp))]
    checks = [_same_tokens(runs), *(c for r in runs for c in _memory_checks(r)), _divided(runs), _as_budgeted(runs)]
    result.checks += checks
    result.figures += [figure for run in runs for figure in _figures(run, runs[0], result)]
    result.tables += [_table(runs), _collective_table(runs)]
    result.samples = {r.name: {"weights": r.weights, "kv": r.kv, "tokens": r.tokens} for r in runs}
    finish(result, _plots(runs, result), report)


def sizes_up_to(largest: int) -> list[int]:
    """Powers of two, and the largest."""
    return sorted({1 << i for i in range(largest.bit_length()) if 1 << i <= largest} | {largest})


def _run(options: dict[str, Any], mesh: MeshConfig, max_tokens: int) -> Run:
    sizes = {"mesh": mesh, **{f"{axis}_parallel_size": 1 for axis in ("tensor", "data", "pipeline", "decode_context")}}
    loaded = open_llm(options | sizes)
    llm, limits = loaded.llm, loaded.llm.engine.scheduler.config
    lengths = [min(length, limits.max_model_len - max_tokens) for length in PROMPT_LENGTHS]
    prompts = random_prompts(llm.engine.runner.decoder.vocab_size, lengths, options["seed"])
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return Run(
        mesh,
        loaded.seconds,
        loaded.compile_seconds,
        [o.outputs[0].token_ids for o in outputs],
        weight_bytes(llm),
        kv_bytes(llm),
        limits.num_blocks * limits.block_size * mesh.dp,
        audit_steps(llm),
    )


# -- checks ------------------------------------------------------------------------------------------------------------


def _same_tokens(runs: Sequence[Run]) -> Check:
    first = runs[0]
    wrong = []
    for run in runs[1:]:
        others = [i for i, (a, b) in enumerate(zip(first.tokens, run.tokens, strict=True)) if a != b]
        wrong += [f"{run.name} answers {len(others)} of {len(run.tokens)} prompts differently"] if others else []
    names = tuple(_answers(run) for run in runs[1:])
    return Check("the tokens are those of one device", not wrong, "; ".join(wrong) or "they are", names)


def _memory_checks(run: Run) -> list[Check]:
    return [
        Check(
            f"{run.name}: every device holds the same {what}",
            not uneven(held),
            f"{bytes_text(min(held.values()))} to {bytes_text(max(held.values()))}, median ± {TOLERANCE:.0%} allowed",
            (_largest(run, what),),
        )
        for what, held in (("weights", run.weights), ("KV blocks", run.kv))
    ]


def uneven(held: dict[int, int]) -> list[int]:
    """Devices that hold more or less than the median by over ``TOLERANCE``: the odd one, not those beside it."""
    middle = median(held.values())
    return [device for device, size in held.items() if abs(size - middle) > TOLERANCE * middle]


def _divided(runs: Sequence[Run]) -> Check:
    """Weights are divided by tp, but for what every rank has whole (norms) and what was filled up: between half and
    twice what division alone would give."""
    first = max(runs[0].weights.values())
    wrong = [r for r in runs if not 0.5 < max(r.weights.values()) * r.mesh.tp / first < 2]
    seen = ", ".join(f"{r.name} {max(r.weights.values()) / first:.0%}" for r in runs)
    names = tuple(_largest(run, "weights") for run in wrong)
    return Check("more ranks, fewer weights on each", not wrong, f"of those of one rank: {seen}", names)


def _as_budgeted(runs: Sequence[Run]) -> Check:
    broken = [f"{r.name}, {p.name}: {line}" for r in runs for p in r.programs for line in p.broken]
    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    names = tuple(_count(r, p.name) for r in runs for p in r.programs if p.broken)
    detail = broken[0] + more if broken else "all of them expected, of the expected sizes; state is updated in place"
    return Check("collectives are those of the cost model", not broken, detail, names)


# -- figures -----------------------------------------------------------------------------------------------------------


def _answers(run: Run) -> str:
    return f"{run.name}: answers equal to one rank's"


def _largest(run: Run, what: str) -> str:
    return f"{run.name}: {what} on the fullest device"


def _count(run: Run, program: str) -> str:
    return f"{run.name}: collectives per layer, {program}"


def _figures(run: Run, first: Run, result: Result) -> list[Figure]:
    same = sum(a == b for a, b in zip(run.tokens, first.tokens, strict=True))
    shards = "sum of the bytes of all shards that lie on a device, while serving"
    counts = [
        Figure(_count(run, name), count, "", "read from the compiled step that served", better="lower")
        for name, count in run.collectives.items()
    ]
    return [
        Figure(_answers(run), same, "", f"of {len(run.tokens)} random prompts, greedily", better="higher"),
        Figure(_largest(run, "weights"), max(run.weights.values()), "B", shards, better="lower"),
        Figure(_largest(run, "KV blocks"), max(run.kv.values()), "B", f"{shards}, {run.kv_tokens:,} tokens in all"),
        Figure.of(
            f"{run.name}: load time",
            [[run.load_seconds]],
            "mean",
            "s",
            "wall clock of LLM(...): weights, compilation (quick where the cache has it); once, the first starts jax",
            better="lower",
            simulated=result.simulated and run.mesh.num_devices > 1,
        ),
        *counts,
    ]


def _table(runs: Sequence[Run]) -> Table:
    bad = [i for i, r in enumerate(runs) if uneven(r.weights) or uneven(r.kv)]
    rows = [
        (
            r.name,
            str(r.mesh.num_devices),
            bytes_text(max(r.weights.values())),
            bytes_text(max(r.kv.values())),
            seconds_text(r.load_seconds),
            ", ".join(f"{count:g}" for count in r.collectives.values()),
        )
        for r in runs
    ]
    header = ("size", "devices", "weights each", "KV each", "load", "collectives per layer")
    return Table("Sizes", header, rows, bad)


def _collective_table(runs: Sequence[Run]) -> Table:
    rows, bad = [], []
    for run in runs:
        for program in run.programs:
            bad += [len(rows)] if program.broken else []
            rows.append((run.name, program.name, *_places(program)))
    return Table("Collectives", ("size", "step", "in the layers", "around them", "in sampling"), rows, bad)


def _places(program: Program) -> list[str]:
    """How many in each part of a step, and their bytes."""
    found = [c for c in program.audit.collectives if c.axes]
    layers = [c for c in found if c.part in LAYER_PARTS]
    sampling = [c for c in found if c.part == SAMPLE]
    around = [c for c in found if c.part not in (*LAYER_PARTS, SAMPLE)]
    return [f"{len(p)}, {bytes_text(sum(c.num_bytes for c in p))}" for p in (layers, around, sampling)]


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(runs: Sequence[Run], result: Result) -> list[Plot]:
    simulated = " (simulated)" if result.simulated else ""

    def draw_memory(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        devices = [(run, device) for run in runs for device in sorted(run.weights)]
        labels = [f"{i}" for run in runs for i, _ in enumerate(run.weights)]
        groups = {
            "weights": [run.weights[device] / MIB for run, device in devices],
            "KV blocks": [run.kv[device] / MIB for run, device in devices],
        }
        odd = {
            (name, i)
            for i, (run, device) in enumerate(devices)
            for name, held in (("weights", run.weights), ("KV blocks", run.kv))
            if device in uneven(held)
        }
        bars(panel, theme, labels, groups, lambda name, i: (name, i) in odd, stacked=True)
        panel.set(ylabel="MiB", xlabel="device")
        start = 0
        for run in runs:
            middle = start + (len(run.weights) - 1) / 2
            panel.annotate(run.name, (middle, 1), xycoords=("data", "axes fraction"), ha="center", va="top", size=8.5)
            panel.axvline(start - 0.5, color=theme.grid)
            start += len(run.weights)

    def draw_load(axes: Sequence[Any], theme: Theme) -> None:
        time, layers = axes
        names = [run.name for run in runs]
        bars(time, theme, names, {"load": [run.load_seconds for run in runs]})
        time.set(ylabel="seconds", title="Load time" + simulated)
        steps = list(runs[0].collectives)
        groups = {step: [list(run.collectives.values())[k] for run in runs] for k, step in enumerate(steps)}
        broken = {(steps[k], i) for i, run in enumerate(runs) for k, p in enumerate(run.programs) if p.broken}
        bars(layers, theme, names, groups, lambda name, i: (name, i) in broken)
        layers.set(ylabel="per layer", title="Collectives in the layers")

    return [
        Plot(
            "memory",
            "What each device holds",
            "Weights and KV blocks of every device, counted from the shards that lie on it. A device off the median by "
            f"more than {TOLERANCE:.0%} is red.",
            draw_memory,
        ),
        Plot(
            "load",
            "Load time and collectives",
            "Load time is wall clock, once. Collectives are read from the compiled steps; red where they are not "
            "those of the cost model.",
            draw_load,
            panels=2,
        ),
    ]


def main() -> None:
    run_script(tensor_parallel)


if __name__ == "__main__":
    main()
