"""Who goes first. A policy ranks requests; it moves none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.request import Request


@dataclass
class Demand:
    """Tokens that the running requests of a lane could use in the next step, and who waits."""

    decodes: int = 0
    prefill: int = 0
    queued: list[int] = field(default_factory=list)
    """Tokens to compute of its first waiting requests, as many as there are free slots."""
    waits: bool = False
    """Whether more wait than ``queued`` lists."""


class Policy:
    """First come, first served; others override what they change.

    Every method is a function of the requests and of the calls before it: the clock comes in as ``begin``'s ``now``.
    """

    displaces = False
    """Whether ``may_displace`` is ever true."""
    shares_steps = False
    """Whether ``share`` and ``take`` limit what a request gets of a step."""

    def lane(self, request: Request) -> str:
        """Requests of one lane keep the order of their ``key``; lanes overtake each other by ``rank``."""
        return ""

    def key(self, request: Request) -> tuple[Any, ...]:
        """Order within a lane, fixed for the request's life."""
        return (request.arrival,)

    def rank(self, request: Request) -> tuple[Any, ...]:
        """Order among all requests now: the lowest is served first."""
        return self.key(request)

    def victim_rank(self, request: Request) -> tuple[Any, ...]:
        """Order among running requests when blocks run out: the highest is preempted first."""
        return self.rank(request)

    def may_displace(self, waiting: Request, running: Request) -> bool:
        """Whether ``running`` should make room because ``waiting`` cannot enter."""
        return False

    def arrived(self, request: Request, waiting: Sequence[Request]) -> None:
        """A new request. ``waiting``: the first request of each lane that has any."""

    def begin(self, now: float, running: Sequence[Request], waiting: Sequence[Request]) -> None:
        """A step begins, ``now`` seconds on the clock of ``arrival_time``. ``waiting``: the first request of each
        lane that has any."""

    def share(self, budget: int, free_slots: int, demands: Mapping[str, Demand]) -> None:
        """Share ``budget`` tokens and the free slots out among lanes."""

    def relent(self) -> bool:
        """Nobody could use their share of the step; whether it is shared out anew."""
        return False

    def take(self, request: Request, start: int, count: int, whole: bool = False) -> int:
        """How many of ``count`` tokens from ``start`` on the request may have in this step, none if they are not the
        ``whole``; they are taken from its lane's share."""
        return count

    def charge(self, request: Request, start: int, count: int, samples: int) -> None:
        """The request was given tokens."""

    @property
    def allows_several_steps(self) -> bool:
        """Whether decode steps may run without the policy in between."""
        return True


class Priority(Policy):
    """Lower ``Request.priority`` first, then the order of arrival; a waiting request displaces a running one of
    higher number."""

    displaces = True

    def key(self, request: Request) -> tuple[Any, ...]:
        return (request.priority, request.arrival)

    def may_displace(self, waiting: Request, running: Request) -> bool:
        return waiting.priority < running.priority
