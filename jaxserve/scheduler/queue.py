"""Requests that do not run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

from jaxserve.request import Request
from jaxserve.scheduler.policy import Policy


class RequestQueue:
    """Requests in the order of a policy: sorted lanes, of which the first requests compete."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.lanes: dict[str, list[Request]] = {}
        self.num_tokens = 0
        """Prompt tokens of all requests in it."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        return (request for lane in self.lanes.values() for request in lane)

    def push(self, request: Request) -> None:
        insort(self.lanes.setdefault(self.policy.lane(request), []), request, key=self.policy.key)
        self.num_tokens += request.num_prompt_tokens
        self._length += 1

    def remove(self, request: Request) -> None:
        name = self.policy.lane(request)
        lane = self.lanes[name]
        at = bisect_left(lane, self.policy.key(request), key=self.policy.key)
        assert lane[at] is request
        del lane[at]
        if not lane:
            del self.lanes[name]
        self.num_tokens -= request.num_prompt_tokens
        self._length -= 1

    def heads(self) -> list[Request]:
        """The first request of each lane."""
        return [lane[0] for lane in self.lanes.values()]


class Candidates:
    """Goes through queues in the order of a policy, while requests leave them and ranks change."""

    def __init__(self, policy: Policy, queues: Sequence[RequestQueue]) -> None:
        self.policy = policy
        self._lanes = [lane for queue in queues for lane in queue.lanes.values()]
        self._skipped = [0] * len(self._lanes)
        self._closed: set[str] = set()

    def best(self) -> Request | None:
        """The next request, or None; the same one again unless it left its queue or was passed over."""
        heads = [
            lane[skipped]
            for lane, skipped in zip(self._lanes, self._skipped, strict=True)
            if skipped < len(lane) and self.policy.lane(lane[skipped]) not in self._closed
        ]
        return min(heads, key=self._rank, default=None)

    def _rank(self, request: Request) -> tuple[Any, ...]:
        return self.policy.rank(request)

    def pass_over(self, request: Request) -> None:
        """Leave the request where it is and go on behind it."""
        for i, lane in enumerate(self._lanes):
            if self._skipped[i] < len(lane) and lane[self._skipped[i]] is request:
                self._skipped[i] += 1

    def close_lane(self, request: Request) -> None:
        """Nobody else of the request's lane."""
        self._closed.add(self.policy.lane(request))
