"""How a GPU program is launched: which of its operations are in command buffers (CUDA graphs), and which are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OPTION = "xla_dump_to"
"""Of XLA's compiler: a directory, into which it writes what ``read_launches`` reads."""
LINE = re.compile(r"^(\s*)\d+: k(\w+)")
STRUCTURE = {"AsyncStart", "AsyncDone", "Sequential", "While", "Conditional", "DynamicSliceFusion", "PartitionId"}
"""What launches nothing itself."""


@dataclass(frozen=True)
class Launches:
    """Of one run of the program, a loop's body and every branch counted once."""

    graphs: int
    inside: int
    """Operations that belong to a graph."""
    outside: Mapping[str, int]
    """The others, by kind."""

    def __str__(self) -> str:
        others = ", ".join(f"{n} {kind}" for kind, n in self.outside.items()) or "none"
        total = self.inside + sum(self.outside.values())
        graphs = "1 CUDA graph holds" if self.graphs == 1 else f"{self.graphs} CUDA graphs hold"
        return f"{graphs} {self.inside} of {total} operations; not in one: {others}"


def read_launches(directory: Path) -> Launches | None:
    """From the one program that was dumped; None if the dump has no such file (a program that came from the cache)."""
    files = list(directory.glob("*thunk_sequence_after_thunk_passes.txt"))
    return launches_of(max(files, key=lambda f: f.stat().st_size).read_text()) if files else None


def launches_of(text: str) -> Launches:
    graphs = inside = 0
    outside = Counter[str]()
    graph_depth: int | None = None
    for depth, kind in ((len(found[1]), found[2]) for found in map(LINE.match, text.splitlines()) if found):
        if graph_depth is not None and depth <= graph_depth:
            graph_depth = None
        if kind == "CommandBuffer":
            graphs, graph_depth = graphs + 1, depth
        elif kind not in STRUCTURE:
            inside += graph_depth is not None
            outside[kind] += graph_depth is None
    return Launches(graphs, inside, dict((+outside).most_common()))
