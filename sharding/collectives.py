"""Seconds of collectives: a part that does not depend on the bytes (latency), and one that is proportional to them.

p ranks, n bytes, bandwidth W of one GPU in one direction, a hop of h seconds:

| | ring | direct (everybody sends to everybody at once) |
|---|---|---|
| all-reduce of n | 2(p-1)/p · n/W + 2(p-1)h | (p-1) · n/W + h |
| all-gather to n, reduce-scatter of n | (p-1)/p · n/W + (p-1)h | (p-1)/p · n/W + h |
| all-to-all, n sent by each | (p-1)/2 · n/W + (p-1)h | (p-1)/p · n/W + h |

The better of the two is taken: direct all-reduces (one-shot) win while they are small, rings when they are large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sharding.hardware import COLLECTIVE_SECONDS, Link, Span

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute"]


@dataclass(frozen=True)
class CommTime:
    """Seconds that a collective takes at least, whatever its size, and those that its bytes take."""

    latency: float = 0.0
    bandwidth: float = 0.0

    @property
    def seconds(self) -> float:
        return self.latency + self.bandwidth

    def __add__(self, other: CommTime) -> CommTime:
        return CommTime(self.latency + other.latency, self.bandwidth + other.bandwidth)

    def __mul__(self, times: float) -> CommTime:
        return CommTime(self.latency * times, self.bandwidth * times)


def ring(kind: Kind, num_bytes: float, ranks: int, link: Link) -> CommTime:
    rounds, share = {
        "all_reduce": (2 * (ranks - 1), 2 * (ranks - 1) / ranks),
        "all_gather": (ranks - 1, (ranks - 1) / ranks),
        "reduce_scatter": (ranks - 1, (ranks - 1) / ranks),
        "all_to_all": (ranks - 1, (ranks - 1) / 2),
        "permute": (1, 1.0),
    }[kind]
    return CommTime(rounds * link.latency, share * num_bytes / link.achievable)


def direct(kind: Kind, num_bytes: float, ranks: int, link: Link) -> CommTime:
    share = {"all_reduce": ranks - 1.0, "permute": 1.0}.get(kind, (ranks - 1) / ranks)
    return CommTime(link.latency, share * num_bytes / link.achievable)


def collective(kind: Kind, num_bytes: float, span: Span) -> CommTime:
    """Of ``num_bytes``: the whole array for all-reduce, all-gather (its result) and reduce-scatter (its operand); what
    one rank sends for the others."""
    if span.size == 1:
        return CommTime()
    if kind == "permute":
        return _best(kind, num_bytes, span.size, span.intra if span.hosts == 1 else span.inter)
    if span.hosts == 1:
        return _best(kind, num_bytes, span.size, span.intra)
    if span.per_host == 1:
        return _best(kind, num_bytes, span.size, span.inter)
    return _hierarchical(kind, num_bytes, span)


def within_a_host(span: Span) -> Span:
    """The same ranks, if one host had them all: what crossing hosts is compared with."""
    return replace(span, per_host=span.size)


def _best(kind: Kind, num_bytes: float, ranks: int, link: Link) -> CommTime:
    found = min((f(kind, num_bytes, ranks, link) for f in (ring, direct)), key=lambda t: t.seconds)
    return found + CommTime(latency=COLLECTIVE_SECONDS)


def _hierarchical(kind: Kind, num_bytes: float, span: Span) -> CommTime:
    """Inside every host, between hosts with what is left for each GPU's own adapter, inside again: each a collective
    that has to start. (NCCL's tuning model gives a small all-reduce over 2 hosts of 8 about as much: 25 µs.)"""
    local, hosts, part = span.per_host, span.hosts, num_bytes / span.per_host

    def inside(step: Kind) -> CommTime:
        return _best(step, num_bytes, local, span.intra)

    def between(step: Kind, size: float) -> CommTime:
        return _best(step, size, hosts, span.inter)

    if kind == "all_reduce":
        return inside("reduce_scatter") + between("all_reduce", part) + inside("all_gather")
    if kind == "all_to_all":  # first to the GPU of the own host that has the receiver's place there
        return inside("all_to_all") + between("all_to_all", num_bytes)
    return inside(kind) + between(kind, part)
