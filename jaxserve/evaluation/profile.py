"""What a ``jax.profiler`` trace (``LLM.start_profile``) says of each device: which operations ran, when, how long.

A pipeline's stages, and all ranks, run one program whose time the host sees as one: only here is each device's own.
Operations of loops contain those of their bodies, and a device may run several at once, so times are those of unions
of intervals. On simulated devices they include what other threads took of the same cores.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.profiler import ProfileData

COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all|psum|pmax|pmin|ppermute"
    r"|all_gather|all_to_all|reduce_scatter)"
)
"""How the names of such operations begin: XLA's own, or those of the jax functions that they come from."""
DEVICE_PLANE = re.compile(r"/device:GPU:(\d+)")

UNDISTURBED = 25
"""Percentile of an operation's durations that stands for it. Simulated devices share cores, with each other and with
whatever else runs there: on two busy cores, sums over all runs of four equal stages differed by up to 3.8 times, sums
of this by up to 1.09 times."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Operation:
    """One run of an operation of a compiled program; times in seconds on the profile's clock."""

    device: int
    """As the profiler counts this process's devices."""
    name: str
    """Of the operation in the compiled program, like ``fusion.3``."""
    program: str
    run: int
    """Operations of one run of a program have the same, on every device."""
    start: float
    end: float

    @property
    def is_collective(self) -> bool:
        return COLLECTIVE.match(self.name) is not None


def read_operations(directory: Path) -> list[Operation]:
    """Of the newest profile in ``directory``, in order of their starts. ValueError where there is none."""
    files = sorted(directory.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{directory}: no profile in it (LLM.start_profile writes one)")
    with warnings.catch_warnings():
        # The library's own types lack a __module__; where warnings are errors, that would end the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        planes = ProfileData.from_file(str(files[-1])).planes
        found = sorted((o for plane in planes for o in _operations(plane)), key=lambda operation: operation.start)
    if not found:
        raise ValueError(f"{files[-1]}: no device did anything in this profile")
    return found


def _operations(plane: Any) -> Iterator[Operation]:
    of_gpu = DEVICE_PLANE.fullmatch(plane.name)
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" not in stats or (of_gpu is None and "device_ordinal" not in stats):
                continue
            device = int(of_gpu[1]) if of_gpu else int(stats["device_ordinal"])
            start, run = event.start_ns / 1e9, int(stats.get("run_id", 0))
            end = start + event.duration_ns / 1e9
            yield Operation(device, str(stats["hlo_op"]), str(stats["hlo_module"]), run, start, end)


def busy_seconds(operations: Iterable[Operation]) -> dict[int, float]:
    """Per device, the time in which an operation ran and no collective."""
    of_device: dict[int, list[Operation]] = defaultdict(list)
    for operation in operations:
        of_device[operation.device].append(operation)
    return {device: _outside_of_collectives(found) for device, found in sorted(of_device.items())}


def collective_seconds(operations: Iterable[Operation]) -> dict[int, float]:
    """Per device, the time in which a collective ran: moving data, and waiting for the other ranks."""
    of_device: dict[int, list[Interval]] = defaultdict(list)
    for operation in operations:
        of_device[operation.device] += [(operation.start, operation.end)] if operation.is_collective else []
    return {device: covered(intervals) for device, intervals in sorted(of_device.items())}


def typical_seconds(operations: Iterable[Operation]) -> dict[int, float]:
    """Per device, for how long its operations ran, collectives left out, each as long as it takes undisturbed: to
    compare devices that do the same. A loop counts beside what is in it."""
    durations: dict[int, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for o in operations:
        if not o.is_collective:
            durations[o.device][o.program, o.name].append(o.end - o.start)
    return {
        device: sum(len(seen) * float(np.percentile(seen, UNDISTURBED)) for seen in of.values())
        for device, of in durations.items()
    }


def collective_share(operations: Sequence[Operation]) -> float:
    """Of the time in which devices do anything, on average."""
    inside, outside = collective_seconds(operations), busy_seconds(operations)
    whole = sum(inside.values()) + sum(outside.values())
    return sum(inside.values()) / whole if whole else 0.0


def _outside_of_collectives(operations: list[Operation]) -> float:
    collectives = [(o.start, o.end) for o in operations if o.is_collective]
    return covered((o.start, o.end) for o in operations) - covered(collectives)


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
