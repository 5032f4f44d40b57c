"""The text of an optimised program (HLO), as far as an audit reads it: instructions, calls, aliased memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

BITS = {"pred": 8, "s4": 4, "u4": 4, "f4e2m1fn": 4, "token": 0, "opaque": 0}
"""Of the types whose names do not say it."""
CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
PASSED_ON = ("bitcast", "copy", "get-tuple-element", "convert", "transpose", "reshape", "tuple", "fusion", "broadcast")
"""What stands between a collective without a name and what it is for."""


@dataclass(frozen=True)
class Array:
    """Type and shape of one device's part of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.dims) * _bits(self.dtype) // 8


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])  # pyright: ignore[reportOptionalSubscript]


def arrays(shape: str) -> list[Array]:
    """Of an array's shape, or of a tuple's, without its structure."""
    return [Array(d, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)) for d, dims in ARRAY.findall(shape)]


def bytes_of(shape: str) -> int:
    return sum(array.num_bytes for array in arrays(shape))


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    @property
    def num_bytes(self) -> int:
        return bytes_of(self.shape)

    @cached_property
    def op_name(self) -> str:
        """Where jax traced it: functions and named scopes, or the name of a parameter."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self) -> Iterator[tuple[str, str]]:
        """(how, computation) of everything that it calls."""
        for how, several, one in CALLS.findall(self.attributes):
            for name in several.split(",") if several else [one]:
                yield how, name.strip().lstrip("%")


@dataclass(frozen=True)
class Site:
    """A place where an instruction runs: its callers, the entry's first."""

    instruction: Instruction
    computation: str
    callers: tuple[Instruction, ...] = ()


@dataclass
class Module:
    """Computations by name, each with its instructions by name, in order."""

    entry: str = ""
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    aliased: frozenset[int] = frozenset()
    """Parameters of the entry whose memory an output takes over."""

    @classmethod
    def parse(cls, text: str) -> Module:
        module, current = cls(), None
        for line in text.splitlines():
            if line.startswith("HloModule"):
                module.aliased = _aliased(line)
            elif header := HEADER.match(line):
                current = module.computations.setdefault(header[2], {})
                module.entry = header[2] if header[1] else module.entry
            elif current is not None and (found := INSTRUCTION.match(line)):
                current[found[1]] = _instruction(found[1], found[2], "ROOT " in line[: found.start(1)])
        return module

    @property
    def parameters(self) -> dict[int, Instruction]:
        """Of the entry, by their number."""
        entry = self.computations.get(self.entry, {}).values()
        return {int(i.operands[0]): i for i in entry if i.op == "parameter"}

    def sites(self) -> Iterator[Site]:
        """Every instruction that runs, once per place that it runs from."""
        todo: list[tuple[str, tuple[Instruction, ...]]] = [(self.entry, ())]
        while todo:
            name, callers = todo.pop()
            for instruction in self.computations.get(name, {}).values():
                yield Site(instruction, name, callers)
                todo += [(c, (*callers, instruction)) for how, c in instruction.called() if _runs(instruction, how)]

    def root(self, computation: str) -> Instruction | None:
        return next((i for i in self.computations.get(computation, {}).values() if i.is_root), None)

    def around(self, site: Site) -> Iterator[Instruction]:
        """The instructions that feed this one, nearest first, then those that it feeds; only through such as compute
        nothing new."""
        block = self.computations[site.computation]
        users: dict[str, list[str]] = {}
        for instruction in block.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction.name)
        for neighbours in ((lambda i: i.operands), (lambda i: users.get(i.name, []))):
            seen, todo = set[str](), [site.instruction]
            while todo:
                names = [n for i in todo for n in neighbours(i) if n in block and n not in seen]
                seen.update(names)
                found = [block[n] for n in names]
                yield from found
                todo = [i for i in found if i.op.removesuffix("-done").removesuffix("-start") in PASSED_ON]


def _runs(instruction: Instruction, how: str) -> bool:
    """Whether a call is a step of the program, not the function of a reduction."""
    return how != "to_apply" or instruction.op in ("call", "async-start")


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    shape, rest = _shape_and_rest(text)
    op, _, rest = rest.partition("(")
    end = _closing(rest)
    operands = tuple(part.strip().split(" ")[-1].lstrip("%") for part in _arguments(rest[:end]))
    return Instruction(name, shape, op.strip(), operands, rest[end + 1 :], is_root)


def _shape_and_rest(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Where the bracket that is open before ``text`` closes."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def _arguments(text: str) -> list[str]:
    """Operands, which older texts write with their shapes."""
    text = re.sub(r"/\*.*?\*/", "", text)
    if "%" in text:
        return re.findall(r"%[\w.\-]+", text)
    return [part for part in text.split(",") if part.strip()]


def _aliased(line: str) -> frozenset[int]:
    found = re.search(r"input_output_alias=\{(.*?)\}, \w+=", line + ", end=")
    return frozenset(int(n) for n in re.findall(r"\((\d+),", found[1])) if found else frozenset()
