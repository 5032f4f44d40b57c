"""One model on several meshes: what each answered, what its devices hold, what its steps communicate; and whether that
is what the first of them did, and what the cost model expects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from jaxserve import LLM
from jaxserve.cli.output import bytes_text
from jaxserve.dry_run import Program
from jaxserve.evaluation.clients import Answer, Call, Load
from jaxserve.evaluation.engines import Loaded, audit_steps, kv_bytes, random_prompts, weight_bytes
from jaxserve.evaluation.result import Check, Figure, Table
from jaxserve.evaluation.same_tokens import TIE_NATS, differences
from sharding.audit import LAYER_PARTS, SAMPLE
from sharding.mesh import MeshConfig

TOLERANCE = 0.02
"""Of a device's memory, relative to the median of all."""


@dataclass(frozen=True)
class MeshRun:
    """One mesh."""

    name: str
    mesh: MeshConfig
    load_seconds: float
    compile_seconds: float
    tokens: list[list[int]]
    """Of the answers to the prompts that all meshes were given."""
    weights: dict[int, int]
    """Bytes by device."""
    kv: dict[int, int]
    kv_tokens: int
    programs: list[Program]
    ties: frozenset[int] = frozenset()
    """Answers that are not the first mesh's only because two tokens were as good as alike (in 16 bits)."""

    @classmethod
    def of(
        cls, name: str, loaded: Loaded, mesh: MeshConfig, tokens: list[list[int]], ties: frozenset[int] = frozenset()
    ) -> MeshRun:
        """Look into an engine that has served."""
        limits = loaded.llm.engine.scheduler.config
        return cls(
            name,
            mesh,
            loaded.seconds,
            loaded.compile_seconds,
            tokens,
            weight_bytes(loaded.llm),
            kv_bytes(loaded.llm),
            limits.num_blocks * limits.block_size * mesh.dp,
            audit_steps(loaded.llm),
            ties,
        )

    @property
    def collectives(self) -> dict[str, float]:
        """Per layer, of each step."""
        return {p.name: _in_layers(p) / p.budget.num_layers for p in self.programs}


def _in_layers(program: Program) -> int:
    return sum(1 for c in program.audit.collectives if c.axes and c.part in LAYER_PARTS)


def random_calls(llm: LLM, lengths: list[int], num_tokens: int, seed: int) -> list[Call]:
    """Prompts of random tokens, answered greedily."""
    prompts = random_prompts(llm.engine.runner.decoder.vocab_size, lengths, seed)
    return [Call(prompt, num_tokens, tenant="", size="") for prompt in prompts]


def ties(llm: LLM, calls: Sequence[Call], tokens: Sequence[list[int]], wanted: Sequence[list[int]]) -> frozenset[int]:
    """Answers that are not those wanted from a token on that was as good as a tie: none in float32, where nothing may
    differ."""
    answers = Load(0.0, [Answer(i, 0.0, [], of_one) for i, of_one in enumerate(tokens)])
    return frozenset(d.call for d in differences(llm, calls, wanted, {"": [answers]}) if d.is_tie)


def sizes_up_to(largest: int) -> list[int]:
    """Powers of two, and the largest."""
    return sorted({1 << i for i in range(largest.bit_length()) if 1 << i <= largest} | {largest})


# -- checks ------------------------------------------------------------------------------------------------------------


def same_tokens(runs: Sequence[MeshRun]) -> Check:
    """As the first."""
    first, wrong = runs[0], list[MeshRun]()
    seen = []
    for run in runs[1:]:
        others = len(run.tokens) - num_equal(run, first)
        if others:
            wrong.append(run)
            seen.append(f"{run.name} answers {others} of {len(run.tokens)} prompts differently")
    names = tuple(_answers(run, first) for run in wrong)
    detail, tied = "; ".join(seen) or "they are", sum(len(run.ties) for run in runs)
    detail += f"; {tied} more from a token on where two are within {TIE_NATS:g} nats" if tied else ""
    return Check(f"the tokens are those of {first.name}", not wrong, detail, names)


def even_memory(run: MeshRun) -> list[Check]:
    return [
        Check(
            f"{run.name}: every device holds the same {what}",
            not uneven(held),
            f"{bytes_text(min(held.values()))} to {bytes_text(max(held.values()))}, median ± {TOLERANCE:.0%} allowed",
            (fullest(run, what),),
        )
        for what, held in (("weights", run.weights), ("KV blocks", run.kv))
    ]


def uneven(held: dict[int, int]) -> list[int]:
    """Devices that hold more or less than the median by over ``TOLERANCE``: the odd one, not those beside it."""
    middle = median(held.values())
    return [device for device, size in held.items() if abs(size - middle) > TOLERANCE * middle]


def as_budgeted(runs: Sequence[MeshRun]) -> Check:
    broken = [f"{r.name}, {p.name}: {line}" for r in runs for p in r.programs for line in p.broken]
    more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
    names = tuple(_count(r, p.name) for r in runs for p in r.programs if p.broken)
    detail = broken[0] + more if broken else "all of them expected, of the expected sizes; state is updated in place"
    return Check("collectives are those of the cost model", not broken, detail, names)


# -- figures -----------------------------------------------------------------------------------------------------------


def fullest(run: MeshRun, what: str) -> str:
    """Name of a figure."""
    return f"{run.name}: {what} on the fullest device"


def _answers(run: MeshRun, first: MeshRun) -> str:
    return f"{run.name}: answers equal to {first.name}'s"


def _count(run: MeshRun, program: str) -> str:
    return f"{run.name}: collectives per layer, {program}"


def num_equal(run: MeshRun, first: MeshRun) -> int:
    """Answers, those that differ by a tie among them."""
    pairs = enumerate(zip(run.tokens, first.tokens, strict=True))
    return sum(a == b or i in run.ties for i, (a, b) in pairs)


def answers_figure(run: MeshRun, first: MeshRun) -> Figure:
    how = f"of {len(run.tokens)} answers to random prompts, greedily"
    return Figure(_answers(run, first), num_equal(run, first), "", how, better="higher")


def memory_figures(run: MeshRun) -> list[Figure]:
    shards = "sum of the bytes of all shards that lie on a device, while serving"
    return [
        Figure(fullest(run, "weights"), max(run.weights.values()), "B", shards, better="lower"),
        Figure(fullest(run, "KV blocks"), max(run.kv.values()), "B", f"{shards}, {run.kv_tokens:,} tokens in all"),
    ]


def load_figure(run: MeshRun, simulated: bool) -> Figure:
    """``simulated``: whether several devices of this result are."""
    return Figure.of(
        f"{run.name}: load time",
        [[run.load_seconds]],
        "mean",
        "s",
        "wall clock of LLM(...): weights, compilation (quick where the cache has it); once, the first starts jax",
        better="lower",
        simulated=simulated and run.mesh.num_devices > 1,
    )


def collective_figures(run: MeshRun) -> list[Figure]:
    how = "read from the compiled step that served"
    return [Figure(_count(run, name), count, "", how, better="lower") for name, count in run.collectives.items()]


def collective_table(runs: Sequence[MeshRun]) -> Table:
    rows, bad = [], []
    for run in runs:
        for program in run.programs:
            bad += [len(rows)] if program.broken else []
            rows.append((run.name, program.name, *_places(program)))
    return Table("Collectives", ("mesh", "step", "in the layers", "around them", "in sampling"), rows, bad)


def _places(program: Program) -> list[str]:
    """How many in each part of a step, and their bytes."""
    found = [c for c in program.audit.collectives if c.axes]
    layers = [c for c in found if c.part in LAYER_PARTS]
    sampling = [c for c in found if c.part == SAMPLE]
    around = [c for c in found if c.part not in (*LAYER_PARTS, SAMPLE)]
    return [f"{len(p)}, {bytes_text(sum(c.num_bytes for c in p))}" for p in (layers, around, sampling)]
