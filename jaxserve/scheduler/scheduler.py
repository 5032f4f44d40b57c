"""All replicas: where a request goes, what the next step computes, what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

from jaxserve.config import SchedulerConfig
from jaxserve.request import Request, Status
from jaxserve.scheduler.decision import SchedulerOutput
from jaxserve.scheduler.fair import Fair
from jaxserve.scheduler.policy import Policy, Priority
from jaxserve.scheduler.replica import Replica


class QueueFullError(RuntimeError):
    """A request was rejected because too many wait; try again later."""


class Advanced(NamedTuple):
    """A request and the tokens that reached the host for it."""

    request: Request
    token_ids: list[int]


@dataclass
class SchedulerCounters:
    """Since the scheduler was made."""

    num_preemptions: int = 0
    num_swapped_out: int = 0
    """Preemptions that moved blocks to host memory instead of dropping them."""
    num_blocks_moved: int = 0
    """Out and in together."""
    prefix_cache_queries: int = 0
    """Tokens of requests that entered for the first time."""
    prefix_cache_hits: int = 0
    """Those of them that were found."""
    num_rejected: int = 0
    rejected_tokens: int = 0
    num_padding_rows: int = 0
    """Token rows of steps that held no token."""
    live_slots: int = 0
    """Token slots of KV blocks that held a token, summed over steps."""
    held_slots: int = 0
    """Token slots of KV blocks that somebody held, summed over steps."""
    withheld_slots: int = 0
    """Token slots of free blocks while a request could not enter for want of blocks, summed over steps."""


class Scheduler:
    """Deterministic: the same calls with the same arguments give the same decisions."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.replicas = [Replica(i, config, make_policy(config)) for i in range(config.num_replicas)]
        self.counters = SchedulerCounters()
        self._arrivals = 0
        self._dropped: list[tuple[int, int]] = []

    # -- requests ----------------------------------------------------------------------------------------------------

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
        total = min(num_prompt_tokens + max_tokens, limit) - 1  # the last token's K and V are never needed
        for window in self.config.windows:
            needed, there = self.config.most_blocks(window, total), self.config.blocks_of(window) - 1
            if needed > there:
                raise ValueError(
                    f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} need {needed} KV blocks of "
                    f"{self.config.block_size} tokens, the cache has {there}: lower max_tokens, or give the cache "
                    "more memory (kv_cache_memory_bytes, num_gpu_blocks_override)"
                )

    def check_queue(self, num_requests: int, num_tokens: int) -> None:
        """Reject what the queues have no room for: raises QueueFullError and counts it."""
        waiting, tokens = self.num_waiting, sum(r.waiting.num_tokens for r in self.replicas)
        for name, what, there, more in (
            ("max_num_queued_requests", "requests", waiting, num_requests),
            ("max_num_queued_tokens", "prompt tokens", tokens, num_tokens),
        ):
            limit = getattr(self.config, name)
            if limit is not None and there + more > limit:
                self.counters.num_rejected += num_requests
                self.counters.rejected_tokens += num_tokens
                raise QueueFullError(
                    f"rejected: {there} {what} wait, {more} more would exceed {name}={limit}: try again later, or "
                    "raise the limit"
                )

    def add(self, request: Request) -> None:
        """Queue a request at the replica with the least load (the first of them)."""
        self.check_fits(request.num_prompt_tokens, request.max_tokens)
        request.max_tokens = min(request.max_tokens, self.config.max_model_len - request.num_prompt_tokens)
        request.arrival = self._arrivals
        self._arrivals += 1
        request.replica = min(range(len(self.replicas)), key=lambda i: (self.replicas[i].load, i))
        self.replicas[request.replica].add(request)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, keep: int | None = None
    ) -> None:
        """End a request, wherever it is; its blocks and slot are free for the next step. The first ending counts,
        unless a later one says how many output tokens to ``keep``: those behind are dropped."""
        if keep is not None:
            del request.output_token_ids[keep:]
        elif request.status is Status.FINISHED:
            return
        self._end(request, reason, stop_reason)

    def _end(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        if request.status is Status.SWAPPED:
            self._dropped.append((request.replica, request.arrival))
        self.replicas[request.replica].finish(request)
        request.finish_reason, request.stop_reason = reason, stop_reason

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests keep their blocks."""
        for replica in self.replicas:
            replica.kv.reset_prefix_cache()

    # -- steps -------------------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> SchedulerOutput:
        """Decide the next step, ``now`` seconds on the clock of the requests' arrival times.

        May be called again before ``update`` has brought the tokens of the step before.
        """
        output = SchedulerOutput([])
        output.dropped, self._dropped = self._dropped, []
        for replica in self.replicas:
            replica.next_step()
        several = self.config.num_scheduler_steps
        if several > 1 and all(replica.can_run_several(several) for replica in self.replicas):
            output.num_steps = several
            output.replicas = [replica.schedule_several(now, several) for replica in self.replicas]
        else:
            output.replicas = [replica.schedule(now, output) for replica in self.replicas]
        if not output.is_empty:
            output.bucket = self.config.bucket(output.num_rows, output.one_token_each)
        self._count(output)
        return output

    def update(self, output: SchedulerOutput, token_ids: list[list[list[int]]]) -> list[Advanced]:
        """Record a step: ``token_ids[replica][row]`` were sampled. Returns who got tokens, without those behind an
        end."""
        advanced = []
        for rows, sampled in zip(output.replicas, token_ids, strict=True):
            for scheduled, tokens in zip(rows, sampled, strict=True):
                request = scheduled.request
                if not scheduled.samples or request.status is Status.FINISHED:
                    continue  # in the middle of its prompt; or it ended while the step ran
                request.num_in_flight -= scheduled.samples
                count = 0
                for token in tokens[: scheduled.samples]:
                    count += 1
                    request.output_token_ids.append(token)
                    if self._finish_if_done(request):
                        break
                advanced.append(Advanced(request, tokens[:count]))
        return advanced

    def _finish_if_done(self, request: Request) -> bool:
        last, count = request.output_token_ids[-1], len(request.output_token_ids)
        if last in request.stop_token_ids and count > request.params.min_tokens:
            is_listed = last in (request.params.stop_token_ids or ())
            self._end(request, "stop", last if is_listed else None)
        elif count >= request.max_tokens:
            self._end(request, "length")
        return request.status is Status.FINISHED

    # -- figures -----------------------------------------------------------------------------------------------------

    def _count(self, output: SchedulerOutput) -> None:
        counters, size = self.counters, self.config.block_size
        counters.num_preemptions += len(output.preempted)
        counters.num_swapped_out += len(output.swap_outs)
        moved = [*output.swap_outs, *output.swap_ins]
        counters.num_blocks_moved += sum(len(blocks) for move in moved for blocks in move.blocks)
        for rows in output.replicas:
            counters.num_padding_rows += output.bucket * output.num_steps - sum(s.count for s in rows)
            for s in rows:
                if s.is_new and s.request.progress_mark < 0:
                    counters.prefix_cache_queries += s.request.num_prompt_tokens
                    counters.prefix_cache_hits += s.request.num_cached_tokens
        for replica in self.replicas:
            held = replica.kv.num_held * size
            counters.held_slots += held
            counters.live_slots += held - replica.kv.num_unused_slots(replica.running)
            if replica.blocks_ran_out:
                counters.withheld_slots += sum(g.pool.num_free for g in replica.kv.groups) * size

    @property
    def num_running(self) -> int:
        return sum(len(r.running) for r in self.replicas)

    @property
    def num_waiting(self) -> int:
        return sum(len(r.waiting) for r in self.replicas)

    @property
    def num_swapped(self) -> int:
        return sum(len(r.swapped) for r in self.replicas)

    @property
    def has_unfinished(self) -> bool:
        return self.num_running + self.num_waiting + self.num_swapped > 0

    @property
    def kv_usage(self) -> float:
        return sum(r.kv.usage for r in self.replicas) / len(self.replicas)

    def check_integrity(self) -> None:
        for replica in self.replicas:
            replica.check_integrity()


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that ``config`` names; ValueError if it names a class that is none."""
    match config.policy:
        case "fcfs":
            return Policy()
        case "priority":
            return Priority()
        case "fair":
            return Fair(config.fairness)
    module, _, name = config.policy.partition(":")
    try:
        policy = getattr(import_module(module), name)(config)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"scheduling_policy={config.policy!r} cannot be made: {error}") from None
    if not isinstance(policy, Policy):
        raise ValueError(f"scheduling_policy={config.policy!r} is no jaxserve.scheduler.Policy")
    return policy
