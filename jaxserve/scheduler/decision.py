"""What the scheduler decides for one step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxserve.kv_cache.manager import Tables
from jaxserve.request import Request


@dataclass(slots=True)
class Scheduled:
    """One request's share of a step: ``count`` tokens from position ``start`` on, and where they go."""

    request: Request
    start: int
    count: int
    tables: Tables
    slot: int
    is_new: bool
    """Whether the request enters its slot with this step (first time, or again after preemption)."""
    samples: int
    """Tokens that the step samples for it: 1 if it computes the last token that there is, several if the step is
    ``num_steps`` steps in one, else 0."""


class BlockMove(NamedTuple):
    """Blocks of one request to be moved between the device and host memory."""

    replica: int
    handle: int
    """Names the blocks while they are in host memory."""
    blocks: list[list[int]]
    """On the device, per group of layers."""


@dataclass(slots=True)
class SchedulerOutput:
    """The decision for one step: per replica, rows in their order. Before the step, blocks go out, then come in."""

    replicas: list[list[Scheduled]]
    bucket: int = 0
    """Token rows of the step, padding included."""
    num_steps: int = 1
    """Decode steps in one: each row gets up to so many tokens."""
    preempted: list[Request] = field(default_factory=list)
    swap_outs: list[BlockMove] = field(default_factory=list)
    swap_ins: list[BlockMove] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    """(replica, handle) of swapped blocks that nobody needs any more."""

    @property
    def num_rows(self) -> int:
        """Token rows of the fullest replica: what the step must have room for."""
        if self.num_steps > 1:
            return max(len(rows) for rows in self.replicas)
        return max(sum(s.count for s in rows) for rows in self.replicas)

    @property
    def is_empty(self) -> bool:
        return not any(self.replicas)

    @property
    def one_token_each(self) -> bool:
        """Whether no sequence has more than one token (at a time)."""
        return self.num_steps > 1 or all(s.count == 1 for rows in self.replicas for s in rows)

    def decision(self) -> list[Any]:
        """All of it as plain numbers and names, to be compared and written down."""
        rows = [
            [[s.request.request_id, s.start, s.count, s.samples, s.slot, int(s.is_new), s.tables] for s in replica]
            for replica in self.replicas
        ]
        moves = [list(map(list, moves)) for moves in (self.swap_outs, self.swap_ins)]
        return [rows, self.bucket, self.num_steps, [r.request_id for r in self.preempted], *moves, self.dropped]

    def digest(self) -> str:
        """128 bits that differ when the decision differs: what several processes compare."""
        return hashlib.blake2b(repr(self.decision()).encode(), digest_size=16).hexdigest()
