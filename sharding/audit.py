"""What a compiled program does on a mesh: its collectives, the copies it makes of its state, its memory; and whether
that is what it should do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from sharding import cost_model
from sharding.collectives import Kind
from sharding.cost_model import Step
from sharding.hlo import Array, Instruction, Module, Site, arrays, bytes_of
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape
from sharding.replica_groups import axes_of, groups_of, spans

if TYPE_CHECKING:
    import jax

OPS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
)
OP_OF: Mapping[Kind, str] = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "permute": "collective-permute",
}
"""As the cost model calls them."""
PLACES = re.compile(r"layer_\d+/(?:attention|mlp)|(?<=/)(?:embed|unembed|sample|ppermute)\b")
LAYER_PARTS = ("attention", "mlp")
SAMPLE, ELSEWHERE, AROUND = "sample", "elsewhere", "around the layers"
KEPT = ("state.keys", "state.values")
"""Parameters of a step that are too large to be copied: the KV blocks."""


@dataclass(frozen=True)
class Collective:
    op: str
    axes: tuple[str, ...]
    """That it goes over; () if every group has one member."""
    num_bytes: int
    """As ``sharding.collectives`` counts them: the whole array of an all-reduce, an all-gather (its result) or a
    reduce-scatter (its operand), what a device sends in the others."""
    where: str
    """"layer_3/attention", "embed", "sample" and so on: the scope it was traced in."""
    in_loop: bool = False
    in_branch: bool = False
    """Of a conditional: it may not run."""
    whole: bool = True
    """Whether its groups are all the devices along its axes."""

    @property
    def part(self) -> str:
        """``where``, without saying which layer."""
        return re.sub(r"^layer_\d+/", "", self.where)

    def __str__(self) -> str:
        over = ("" if self.whole else "part of ") + (",".join(self.axes) or "nothing")
        return f"{self.op} over {over} in {self.where}, {self.num_bytes:,} bytes"


@dataclass(frozen=True)
class Parameter:
    """Of the program: on one device."""

    name: str
    num_bytes: int
    aliased: bool
    """Whether an output takes over its memory."""


@dataclass(frozen=True)
class Copy:
    """Of one array, within one device."""

    name: str
    num_bytes: int
    where: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    """Of the outputs: those that lie in the arguments' memory."""

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries - self.aliased


@dataclass(frozen=True)
class Rule:
    """Collectives that a program may have. ``where``: "layer_*/attention", "sample", or ``AROUND``: in no layer, and
    not in sampling."""

    op: str
    axes: tuple[str, ...]
    where: str
    sizes: tuple[int, ...]
    """Bytes that each may have."""
    count: int | None = 1
    """In each place (of a pattern of layers: in each layer); None = any number, and of any size up to the largest."""

    def covers(self, found: Collective) -> bool:
        fits = found.num_bytes in self.sizes or (self.count is None and found.num_bytes <= max(self.sizes))
        return fits and found.whole and (found.op, found.axes) == (self.op, self.axes) and self.has(found.where)

    def has(self, where: str) -> bool:
        if self.where == AROUND:
            return not where.startswith("layer_") and where != SAMPLE
        return fnmatchcase(where, self.where)

    def __str__(self) -> str:
        sizes = " or ".join(f"{size:,}" for size in self.sizes)
        return f"{self.op} over {','.join(self.axes)} of {sizes} bytes"


@dataclass(frozen=True)
class Budget:
    """What a program may do: these collectives and no others, over no other axes; parameters whose names begin with
    ``in_place`` are updated where they are, and those of ``KEPT`` never copied."""

    num_layers: int
    rules: tuple[Rule, ...] = ()
    in_place: str = "state"

    @classmethod
    def of_step(cls, shape: ModelShape, step: Step, mesh: MeshConfig, wide: bool = False) -> Budget:
        """What the cost model says that a step of the engine (a tick, with pp) communicates. ``shape`` is fitted to
        the mesh. ``wide``: 16-bit numbers may be carried as float32, which XLA:CPU computes in."""
        counts = Counter[tuple[str, tuple[str, ...], str, int]]()
        for c in cost_model.layer_collectives(shape, step, mesh):
            places = LAYER_PARTS if c.axes == ("tp",) else ("attention",)
            for place in places:
                counts[OP_OF[c.kind], c.axes, f"layer_*/{place}", c.num_bytes] += c.count // len(places)
        for c in cost_model.tick_collectives(shape, step, mesh):
            counts[OP_OF[c.kind], c.axes, AROUND if c.count == 1 else SAMPLE, c.num_bytes] += c.count
        factors = (1, 2) if wide and shape.dtype_bytes == 2 else (1,)
        rules = (
            Rule(op, axes, where, tuple(size * f for f in factors), None if where == SAMPLE else count)
            for (op, axes, where, size), count in counts.items()
        )
        return cls(shape.layers_per_stage(mesh), tuple(rules))


@dataclass(frozen=True)
class Audit:
    collectives: tuple[Collective, ...]
    parameters: tuple[Parameter, ...]
    copies: tuple[Copy, ...]
    """As large as the arrays that were to be watched."""
    memory: Memory | None = None

    def matching(self, op: str | None = None, axis: str | None = None, where: str = "*") -> list[Collective]:
        return [
            c
            for c in self.collectives
            if op in (None, c.op) and (axis is None or axis in c.axes) and fnmatchcase(c.where, where)
        ]

    def per_layer(self, op: str | None = None, axis: str | None = None) -> dict[int, int]:
        """How many such collectives every layer has that has any."""
        layers = (re.match(r"layer_(\d+)/", c.where) for c in self.matching(op, axis))
        return dict(sorted(Counter(int(found[1]) for found in layers if found).items()))

    def total_bytes(self, op: str | None = None, axis: str | None = None, where: str = "*") -> int:
        """Payload per device of all of them: a loop's body once, every branch of a conditional."""
        return sum(c.num_bytes for c in self.matching(op, axis, where))

    def check(self, budget: Budget) -> list[str]:
        """What breaks the budget, in words; [] if nothing does."""
        return [*self._unexpected(budget), *self._miscounted(budget), *self._not_in_place(budget)]

    def _unexpected(self, budget: Budget) -> Iterator[str]:
        stray = Counter(c for c in self.collectives if c.axes and not any(r.covers(c) for r in budget.rules))
        for c, count in stray.items():
            yield f"not expected: {count} × {c}"

    def _miscounted(self, budget: Budget) -> Iterator[str]:
        for rule in budget.rules:
            covered = Counter(c.where for c in self.collectives if rule.covers(c))
            counts = {rule.where: covered.total()}
            if "*" in rule.where:
                places = (rule.where.replace("*", str(i)) for i in range(budget.num_layers))
                counts = {place: covered[place] for place in places}
            for place, count in counts.items():
                if rule.count not in (None, count):
                    yield f"{place} has {count} {rule}, {rule.count} expected"

    def _not_in_place(self, budget: Budget) -> Iterator[str]:
        for p in self.parameters:
            if p.name.startswith(budget.in_place) and not p.aliased:
                yield f"{p.name}, {p.num_bytes:,} bytes, is not updated in place"
        for copy in self.copies:
            yield f"copy of KV blocks: {copy.name} in {copy.where}, {copy.num_bytes:,} bytes"

    def groups(self) -> list[tuple[Collective, int]]:
        """The collectives without telling layers apart, and how many of each there are."""
        return list(Counter(replace(c, where=c.part) for c in self.collectives).items())

    def to_json(self, num_layers: int | None = None) -> dict[str, Any]:
        """Collectives of layers together, with how many each of ``num_layers`` has."""
        memory = None if self.memory is None else asdict(self.memory) | {"total": self.memory.total}

        def group(c: Collective, count: int) -> dict[str, Any]:
            per_layer = count / num_layers if num_layers and c.part in LAYER_PARTS else None
            return asdict(c) | {"count": count, "per_layer": per_layer}

        groups = [group(c, count) for c, count in self.groups()]
        return {
            "collectives": groups,
            "copies": [asdict(c) for c in self.copies],
            "aliased": [p.name for p in self.parameters if p.aliased],
            "memory": memory,
        }


def audit(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh, kept: Sequence[str] = KEPT) -> Audit:
    """Read a compiled program of ``mesh``. ``kept``: names (their beginnings) of parameters of which copies are
    looked for, as ``jit`` calls them: "state.keys" for the ``keys`` of an argument ``state``."""
    found = audit_text(compiled.as_text() or "", dict(mesh.shape), kept)
    stats = compiled.memory_analysis()
    if stats is None:
        return found
    sizes = (f"{name}_size_in_bytes" for name in ("argument", "output", "temp", "alias"))
    return replace(found, memory=Memory(*(getattr(stats, size) for size in sizes)))


def audit_text(text: str, axis_sizes: Mapping[str, int], kept: Sequence[str] = KEPT) -> Audit:
    """The same from the program's text. ``axis_sizes``: of the mesh, in its order."""
    module = Module.parse(text)
    sites = list(module.sites())
    parameters = tuple(
        Parameter(p.op_name or p.name, p.num_bytes, i in module.aliased) for i, p in sorted(module.parameters.items())
    )
    watched = {
        _form(array)
        for p in module.parameters.values()
        if p.op_name.startswith(tuple(kept))
        for array in arrays(p.shape)
    }
    collectives = tuple(_collective(module, s, axis_sizes) for s in sites if _op(s.instruction) in OPS)
    return Audit(collectives, parameters, tuple(_copies(module, sites, watched)))


# -- reading the program -----------------------------------------------------------------------------------------------


def _op(instruction: Instruction) -> str:
    """ "all-reduce" of all-reduce and all-reduce-start; the -done of a pair is not counted."""
    return instruction.op.removesuffix("-start")


def _collective(module: Module, site: Site, axis_sizes: Mapping[str, int]) -> Collective:
    instruction = site.instruction
    groups = groups_of(instruction.attributes, prod(axis_sizes.values()))
    axes = axes_of(groups, axis_sizes)
    op = _op(instruction)
    pairs = op in ("collective-permute", "send")
    return Collective(
        op,
        axes,
        _payload(module, site, len(groups[0])),
        _place(module, site),
        in_loop=any(c.op == "while" for c in site.callers),
        in_branch=any(c.op == "conditional" for c in site.callers),
        whole=pairs or spans(groups, axes, axis_sizes),
    )


def _payload(module: Module, site: Site, group_size: int) -> int:
    instruction = site.instruction
    if instruction.op == "send":
        return arrays(instruction.shape)[0].num_bytes
    num_bytes = bytes_of(_result(module, site))
    return num_bytes * group_size if instruction.op.startswith("reduce-scatter") else num_bytes


def _result(module: Module, site: Site) -> str:
    """The shape of what it gives. That of a -start may hold its operands as well; its -done says."""
    instruction = site.instruction
    done = instruction.op.removesuffix("-start") + "-done"
    for other in module.computations[site.computation].values() if instruction.op.endswith("-start") else ():
        if other.op == done and instruction.name in other.operands:
            return other.shape
    return instruction.shape


def _place(module: Module, site: Site) -> str:
    """From its own name, or that of what it feeds or is fed by, or of what calls it."""
    for instruction in (site.instruction, *module.around(site), *reversed(site.callers)):
        if found := PLACES.findall(instruction.op_name):
            return found[-1]
    return ELSEWHERE


Form = tuple[str, tuple[int, ...]]


def _form(array: Array) -> Form:
    """What an array and its transposed copies have in common."""
    return array.dtype, tuple(sorted(n for n in array.dims if n > 1))


def _copies(module: Module, sites: Sequence[Site], watched: set[Form]) -> Iterator[Copy]:
    for site in sites:
        instruction = site.instruction
        if any(c.op == "fusion" for c in site.callers) or not _is_copy(module, instruction):
            continue
        for array in arrays(instruction.shape)[:1]:
            if _form(array) in watched:
                yield Copy(instruction.name, array.num_bytes, _place(module, site))


def _is_copy(module: Module, instruction: Instruction) -> bool:
    """A copy, or a fusion that does nothing else."""
    if instruction.op != "fusion":
        return instruction.op in ("copy", "copy-start", "transpose")
    roots = (module.root(name) for _, name in instruction.called())
    return any(root is not None and root.op in ("copy", "transpose") for root in roots)
