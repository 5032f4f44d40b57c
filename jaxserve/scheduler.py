"""Who gets how many tokens of the next step.

There is no prefill phase and no decode phase: every request's ``num_computed_tokens`` catches up with its
``num_tokens``. ``schedule`` reads no clock and no random number: the same events give the same schedule.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from jaxserve.config import SchedulerConfig
from jaxserve.kv_cache.manager import KVCacheManager
from jaxserve.request import Request, Status

WAITING_WEIGHT = 4
"""A waiting request counts for as much load as this many running ones when a replica is chosen."""


@dataclass(frozen=True)
class Scheduled:
    """One request's share of a step: its tokens from ``start`` on, ``count`` of them, and where they go."""

    request: Request
    start: int
    count: int
    blocks: list[int]
    slot: int
    is_new: bool
    """Whether the request enters its slot with this step (first time, or again after preemption)."""

    @property
    def samples(self) -> bool:
        """Whether the step computes the request's last token, so that the next one is sampled."""
        return self.start + self.count == self.request.num_tokens


@dataclass(frozen=True)
class SchedulerOutput:
    """The decision for one step: per replica, in the order of their rows."""

    replicas: list[list[Scheduled]]
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the fullest replica: what the step must have room for."""
        return max(sum(s.count for s in replica) for replica in self.replicas)

    @property
    def is_empty(self) -> bool:
        return not any(self.replicas)

    @property
    def one_token_each(self) -> bool:
        """Whether no sequence has more than one token."""
        return all(s.count == 1 for replica in self.replicas for s in replica)


class Replica:
    """One replica's queues, blocks and slots."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.kv = KVCacheManager(config.num_blocks, config.block_size)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.free_slots = deque(range(config.max_num_seqs))

    @property
    def load(self) -> int:
        return WAITING_WEIGHT * len(self.waiting) + len(self.running)

    def schedule(self, preempted: list[Request]) -> list[Scheduled]:
        """Running requests first, then waiting ones while tokens, slots and blocks last."""
        budget = self.config.max_num_batched_tokens
        scheduled: dict[str, Scheduled] = {}
        for request in list(self.running):
            if request.status is not Status.RUNNING:
                continue  # preempted below, for one before it
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            if count > 0 and self._make_room(request, count, scheduled, preempted):
                scheduled[request.request_id] = self._grant(request, count, is_new=False)
                budget -= count
        budget = self.config.max_num_batched_tokens - sum(s.count for s in scheduled.values())
        while self.waiting and not preempted:
            request = self.waiting[0]
            count = min(request.num_tokens, budget)
            whole = self.config.enable_chunked_prefill or count == request.num_tokens
            if count == 0 or not whole or not self.free_slots or not self.kv.grow(request, count):
                break
            self._admit(self.waiting.popleft())
            scheduled[request.request_id] = self._grant(request, count, is_new=True)
            budget -= count
        return list(scheduled.values())

    def _grant(self, request: Request, count: int, is_new: bool) -> Scheduled:
        assert request.slot is not None
        start, blocks = request.num_computed_tokens, self.kv.table(request)
        return Scheduled(request, start, count, blocks, request.slot, is_new)

    def _make_room(
        self, request: Request, count: int, scheduled: dict[str, Scheduled], preempted: list[Request]
    ) -> bool:
        """Find blocks for ``count`` more tokens, preempting the latest arrivals; False if it was itself the victim."""
        while not self.kv.grow(request, request.num_computed_tokens + count):
            victim = max(self.running, key=lambda r: r.arrival)
            scheduled.pop(victim.request_id, None)
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        return True

    def _admit(self, request: Request) -> None:
        request.status = Status.RUNNING
        request.slot = self.free_slots.popleft()
        self.running.append(request)

    def _leave(self, request: Request) -> None:
        assert request.slot is not None
        self.running.remove(request)
        self.free_slots.append(request.slot)
        request.slot = None
        self.kv.free(request)

    def _preempt(self, request: Request) -> None:
        """Give up the request's blocks; its tokens are kept, and computed again when it is back."""
        self._leave(request)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.waiting.appendleft(request)

    def finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._leave(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def check_integrity(self) -> None:
        self.kv.check_integrity(self.running)
        slots = [r.slot for r in self.running]
        assert sorted([*slots, *self.free_slots]) == list(range(self.config.max_num_seqs))  # pyright: ignore
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.WAITING and r.slot is None for r in self.waiting)


class Scheduler:
    """All replicas: where a request goes, what the next step computes, what came of it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.replicas = [Replica(config) for _ in range(config.num_replicas)]
        self._arrivals = 0

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse, with the numbers, a request that could never finish on any schedule."""
        limit = self.config.max_model_len
        if num_prompt_tokens == 0:
            raise ValueError("the prompt is empty: it needs at least one token")
        if num_prompt_tokens >= limit:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens; with max_model_len={limit} there is room for "
                f"{limit - 1} and one token of output: shorten it or raise max_model_len"
            )
        pool = self.replicas[0].kv
        total = min(num_prompt_tokens + max_tokens, limit) - 1  # the last token's K and V are never needed
        if pool.blocks_for(total) > pool.pool.num_usable:
            raise ValueError(
                f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} need {pool.blocks_for(total)} KV "
                f"blocks of {self.config.block_size} tokens, the cache has {pool.pool.num_usable}: lower max_tokens, "
                "or give the cache more memory (kv_cache_memory_bytes, num_gpu_blocks_override)"
            )

    def add(self, request: Request) -> None:
        """Queue a request at the replica with the least load (the first of them)."""
        self.check_fits(request.num_prompt_tokens, request.max_tokens)
        request.arrival = self._arrivals
        self._arrivals += 1
        request.replica = min(range(len(self.replicas)), key=lambda i: (self.replicas[i].load, i))
        self.replicas[request.replica].waiting.append(request)

    def schedule(self) -> SchedulerOutput:
        preempted: list[Request] = []
        replicas = []
        for replica in self.replicas:
            victims: list[Request] = []
            replicas.append(replica.schedule(victims))
            preempted += victims
        return SchedulerOutput(replicas, preempted)

    def update(self, output: SchedulerOutput, token_ids: list[list[int]]) -> list[Request]:
        """Record a step: ``token_ids[replica][row]`` was sampled. Returns the requests that got a token."""
        advanced = []
        for rows, sampled in zip(output.replicas, token_ids, strict=True):
            for scheduled, token_id in zip(rows, sampled, strict=True):
                request = scheduled.request
                if request.status is not Status.RUNNING:
                    continue  # aborted while the step ran
                samples = scheduled.samples
                request.num_computed_tokens += scheduled.count
                if samples:
                    request.output_token_ids.append(token_id)
                    advanced.append(request)
        for request in advanced:
            self._finish_if_done(request)
        return advanced

    def _finish_if_done(self, request: Request) -> None:
        last, count = request.output_token_ids[-1], len(request.output_token_ids)
        if last in request.stop_token_ids and count > request.params.min_tokens:
            is_listed = last in (request.params.stop_token_ids or ())
            self.finish(request, "stop", last if is_listed else None)
        elif count >= request.max_tokens or request.num_tokens >= self.config.max_model_len:
            self.finish(request, "length")

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request, running or waiting; its blocks and slot are free for the next step."""
        if request.status is Status.FINISHED:
            return
        self.replicas[request.replica].finish(request)
        request.finish_reason, request.stop_reason = reason, stop_reason

    @property
    def num_running(self) -> int:
        return sum(len(r.running) for r in self.replicas)

    @property
    def num_waiting(self) -> int:
        return sum(len(r.waiting) for r in self.replicas)

    @property
    def has_unfinished(self) -> bool:
        return self.num_running + self.num_waiting > 0

    @property
    def kv_usage(self) -> float:
        return sum(r.kv.usage for r in self.replicas) / len(self.replicas)

    def check_integrity(self) -> None:
        for replica in self.replicas:
            replica.check_integrity()
