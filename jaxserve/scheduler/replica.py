"""One replica's queues, blocks and slots, and its share of a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxserve.config import SchedulerConfig
from jaxserve.kv_cache.host_memory import HostMemory
from jaxserve.kv_cache.manager import KVCacheManager
from jaxserve.request import Request, Status
from jaxserve.scheduler.decision import BlockMove, Scheduled, SchedulerOutput
from jaxserve.scheduler.policy import Demand, Policy
from jaxserve.scheduler.queue import Candidates, RequestQueue

WAITING_WEIGHT = 4
"""A waiting request counts for as much load as this many running ones when a replica is chosen."""


class Replica:
    """Read ``schedule`` first."""

    def __init__(self, index: int, config: SchedulerConfig, policy: Policy) -> None:
        self.index, self.config, self.policy = index, config, policy
        self.kv = KVCacheManager(config)
        self.host = HostMemory(config.swap)
        self.waiting = RequestQueue(policy)
        self.running: list[Request] = []
        self.swapped = RequestQueue(policy)
        self.free_slots = deque(range(config.max_num_seqs))
        self._resting: deque[tuple[int, int]] = deque()  # (step, slot): free from that step on
        self._step = 0
        self.blocks_ran_out = False
        """Whether the last step had to leave somebody out for want of blocks."""

    @property
    def load(self) -> int:
        return WAITING_WEIGHT * (len(self.waiting) + len(self.swapped)) + len(self.running)

    def add(self, request: Request) -> None:
        self.policy.arrived(request, self.waiting.heads())
        self.waiting.push(request)

    # -- one step ----------------------------------------------------------------------------------------------------

    def schedule(self, now: float, output: SchedulerOutput) -> list[Scheduled]:
        """Rows of the next step; who leaves and what moves is added to ``output``.

        The running share the step's tokens, decodes before prompts; then blocks are found for what they got, at the
        cost of whoever ranks last; then others enter while tokens, slots and blocks last.
        """
        self.policy.begin(now, self.running, [*self.swapped.heads(), *self.waiting.heads()])
        if self.policy.displaces:
            self._displace(output)
        if self.policy.shares_steps:
            self.policy.share(self.config.max_num_batched_tokens, len(self.free_slots), self._demands(output))
        rows = self._fill_step(output)
        if not rows and self.policy.relent():
            rows = self._fill_step(output)
        return rows

    def next_step(self) -> None:
        """Count the step that is to be scheduled."""
        self._step += 1
        while self._resting and self._resting[0][0] <= self._step:
            self.free_slots.append(self._resting.popleft()[1])

    def _fill_step(self, output: SchedulerOutput) -> list[Scheduled]:
        counts = self._share_tokens()
        self.blocks_ran_out = self._find_blocks(counts, output)
        rows = [self._grant(request, count, is_new=False) for request, count in counts.items()]
        if not self.blocks_ran_out:
            rows += self._admit(counts, output)
        return rows

    def schedule_several(self, now: float, num_steps: int) -> list[Scheduled]:
        """Rows of a step that is ``num_steps`` decode steps in one, for which ``can_run_several`` holds."""
        self.policy.begin(now, self.running, [])
        self.blocks_ran_out = False
        rows = []
        for request in self._with_work():
            count = min(num_steps, request.num_tokens_left)
            grown = self.kv.grow(request, request.num_computed_tokens + count)
            assert grown
            rows.append(self._grant(request, count, is_new=False, samples=count))
        return rows

    def can_run_several(self, num_steps: int) -> bool:
        """Whether nothing is to be decided in the next ``num_steps`` decode steps."""
        working = list(self._with_work())
        if len(self.waiting) or len(self.swapped) or not self.policy.allows_several_steps:
            return False
        if any(_to_compute(r) != 1 or r.single_steps or r.waits_for_tokens for r in working):
            return False
        pools = [group.pool for group in self.kv.groups]
        most = len(working) * (-(-num_steps // self.config.block_size) + 1)
        return all(most <= pool.num_free for pool in pools)

    def _with_work(self) -> Iterator[Request]:
        """Running requests that can be given tokens: not those that wait for what is in flight."""
        for request in self.running:
            waits = request.ready_at > self._step or (request.waits_for_tokens and request.num_in_flight)
            if request.num_tokens_left > 0 and not waits:
                yield request

    def _demands(self, output: SchedulerOutput) -> dict[str, Demand]:
        """What each lane could use of the step; who was just preempted stays out of it."""
        demands: dict[str, Demand] = {}
        for request in self._with_work():
            demand, count = demands.setdefault(self.policy.lane(request), Demand()), _to_compute(request)
            if count == 1:
                demand.decodes += 1
            else:
                demand.prefill += count
        first = Candidates(self.policy, (self.swapped, self.waiting)).best()
        can_enter = len(self.free_slots) if first is not None and self._has_room(first) else 0
        for queue in (self.swapped, self.waiting):
            for lane, requests in queue.lanes.items():
                demand = demands.setdefault(lane, Demand())
                demand.queued += [_to_compute(r) for r in requests[:can_enter] if r not in output.preempted]
                demand.waits |= len(requests) > can_enter
        return demands

    def _share_tokens(self) -> dict[Request, int]:
        """Tokens of each running request: one for those that decode, the rest of the budget for prompts. With pipeline
        stages only so many decode at a time that all stages have some."""
        budget, counts = self.config.max_num_batched_tokens, dict[Request, int]()
        prefills, most = [], self._most_decodes()
        for request in self._in_order(self._with_work()):
            if _to_compute(request) > 1:
                prefills.append(request)
            elif len(counts) < most and self.policy.take(request, request.num_computed_tokens, 1):
                counts[request] = 1
                budget -= 1
        most = self._longest_chunk(counts)
        for request in sorted(prefills, key=self.policy.rank):
            count = min(_to_compute(request), budget, most)
            count = self.policy.take(request, request.num_computed_tokens, count)
            if count > 0:
                counts[request] = count
                budget -= count
        return counts

    def _most_decodes(self) -> int:
        """How many may decode in this step, so that in any ``num_stages`` steps in a row each has its turn."""
        step, count, stages = self._step, len(self.running), self.config.num_stages
        return max(1, (step + 1) * count // stages - step * count // stages)

    def _in_order(self, requests: Iterable[Request]) -> Iterable[Request]:
        """By rank where a policy shares tokens out, and longest ready first where stages take turns; else there are
        enough tokens for all who decode."""
        if self.policy.shares_steps:
            return sorted(requests, key=self.policy.rank)
        return sorted(requests, key=lambda r: r.ready_at) if self.config.num_stages > 1 else requests

    def _longest_chunk(self, counts: Mapping[Request, int]) -> int:
        """Tokens of one prompt in this step: a long one must not keep those waiting who decode."""
        threshold = self.config.long_prefill_token_threshold
        return threshold if threshold and 1 in counts.values() else self.config.max_num_batched_tokens

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _find_blocks(self, counts: dict[Request, int], output: SchedulerOutput) -> bool:
        """Find blocks for ``counts``, dropping from it who is preempted or has to wait. Returns whether any were
        missing."""
        wanted, victims = len(counts), 0
        for request in list(counts):
            while request in counts and not self.kv.grow(request, request.num_computed_tokens + counts[request]):
                victim = self._victim(request, counts)
                if victim is None:
                    del counts[request]
                    continue
                counts.pop(victim, None)
                self._preempt(victim, output)
                victims += 1
        missing = len(counts) < wanted or victims > 0
        if wanted and not counts and not victims and not any(r.num_in_flight for r in self.running):
            self._preempt(max(self.running, key=self.policy.victim_rank), output)  # all wait for each other
        return missing

    def _victim(self, request: Request, counts: Mapping[Request, int]) -> Request | None:
        """Who gives its blocks up for ``request``; None if the request has to wait a step instead.

        Whoever ranks last, but nobody who came back and has not made progress yet: such a request holds what it
        needs for its next token, so waiting for it comes to an end.
        """
        rank = self.policy.victim_rank
        if any(r.num_tokens_left == 0 for r in self.running):
            return None  # somebody's last token is in flight, and its blocks will be free
        movable = [r for r in self.running if r.has_made_progress or r not in counts]
        if not movable and rank(request) == min(map(rank, self.running)):
            movable = [r for r in self.running if r is not request]
        worst = max(movable, key=rank, default=None)
        if worst is None or rank(worst) < rank(request):
            return None
        if worst is request and any(rank(r) > rank(request) for r in self.running):
            return None
        return worst

    def _displace(self, output: SchedulerOutput) -> None:
        """Running requests make room for the first that waits, if the policy puts it above them."""
        first = Candidates(self.policy, (self.swapped, self.waiting)).best()
        if first is None or self._has_room(first):
            return
        movable = [r for r in self.running if r.has_made_progress and self.policy.may_displace(first, r)]
        if not movable or not self._has_room(first, movable):
            return
        movable.sort(key=self.policy.victim_rank)
        while movable and not self._has_room(first):
            self._preempt(movable.pop(), output)

    def _has_room(self, request: Request, leaving: Sequence[Request] = ()) -> bool:
        """Whether the request could enter, if these left."""
        if not self.free_slots and not leaving:
            return False
        found = self._found(request)
        needs = self.kv.needs(request, found, self._tokens_to_hold(request, found, _chunk(request, found, self.config)))
        freed = [self.kv.num_exclusive(r) for r in leaving]
        return all(
            need <= group.pool.num_free + sum(blocks[i] for blocks in freed)
            for i, (group, need) in enumerate(zip(self.kv.groups, needs, strict=True))
        )

    # -- who enters --------------------------------------------------------------------------------------------------

    def _admit(self, counts: Mapping[Request, int], output: SchedulerOutput) -> list[Scheduled]:
        """Waiting and swapped requests enter, in the policy's order, while tokens, slots and blocks last."""
        budget, most = self.config.max_num_batched_tokens - sum(counts.values()), self._longest_chunk(counts)
        candidates, rows = Candidates(self.policy, (self.swapped, self.waiting)), list[Scheduled]()
        while budget > 0 and self.free_slots and (request := candidates.best()) is not None:
            if request in output.preempted or request.num_in_flight:
                candidates.close_lane(request)
                continue
            found = self._found(request)
            left = request.num_tokens - found
            count = min(left, budget, most)
            if count < left and not self.config.enable_chunked_prefill:
                break
            whole = self._too_many_partial()
            count = 0 if whole and count < left else self.policy.take(request, found, count, whole)
            if count <= 0:
                (candidates.pass_over if whole else candidates.close_lane)(request)
                continue
            if not self._enter(request, found, count, output):
                self.blocks_ran_out = True
                break
            rows.append(self._grant(request, count, is_new=True))
            budget -= count
        return rows

    def _found(self, request: Request) -> int:
        """Tokens that a request need not compute when it enters."""
        swapped = request.status is Status.SWAPPED
        return request.num_computed_tokens if swapped else self.kv.find_prefix(request)

    def _tokens_to_hold(self, request: Request, found: int, count: int) -> int:
        """Tokens that must have blocks before the request enters. One that was preempted takes all that it needs for
        its next token, so that it gets there."""
        return found + count if request.progress_mark < 0 else request.num_tokens

    def _too_many_partial(self) -> bool:
        most = self.config.max_num_partial_prefills
        return most > 0 and sum(map(_is_partial, self.running)) >= most

    def _enter(self, request: Request, found: int, count: int, output: SchedulerOutput) -> bool:
        """Give a request its slot and its first blocks; False, and nothing changed, if there are not enough."""
        if not self.kv.admit(request, found, self._tokens_to_hold(request, found, count)):
            return False
        if request.status is Status.SWAPPED:
            self.swapped.remove(request)
            self.host.release(request.arrival)
            output.swap_ins.append(BlockMove(self.index, request.arrival, self.kv.live(request)))
        else:
            self.waiting.remove(request)
            if request.progress_mark < 0:
                request.num_cached_tokens = found
            request.num_charged_tokens = max(request.num_charged_tokens, found)
        request.status, request.num_computed_tokens = Status.RUNNING, found
        request.slot = self.free_slots.popleft()
        self.running.append(request)
        return True

    def _grant(self, request: Request, count: int, *, is_new: bool, samples: int | None = None) -> Scheduled:
        assert request.slot is not None
        start = request.num_computed_tokens
        if samples is None:
            samples = int(start + count == request.num_total_tokens)
        request.num_computed_tokens = start + count
        self.kv.name_blocks(request)
        self.policy.charge(request, start, count, samples)
        request.num_charged_tokens = max(request.num_charged_tokens, start + count)
        request.num_in_flight += samples
        if samples:
            request.ready_at = self._step + self.config.num_stages
        return Scheduled(request, start, count, self.kv.tables(request), request.slot, is_new, samples)

    # -- who leaves --------------------------------------------------------------------------------------------------

    def _leave(self, request: Request) -> None:
        assert request.slot is not None
        self.running.remove(request)
        if self.config.num_stages == 1:
            self.free_slots.append(request.slot)
        else:  # its device rows are in use until what is in the pipeline has left it
            self._resting.append((self._step + self.config.num_stages, request.slot))
        request.slot = None
        self.kv.free(request)

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        """Take a request's blocks; its tokens are kept, and its blocks too if they are worth moving to the host."""
        blocks = self.kv.live(request)
        sizes = [len(b) for b in blocks]
        swap = self.host.prefers_swap(sizes, request.num_computed_tokens)
        self._leave(request)
        request.progress_mark = request.num_computed_tokens
        request.metrics.num_preemptions += 1
        output.preempted.append(request)
        if swap:
            request.status = Status.SWAPPED
            self.host.store(request.arrival, sizes)
            output.swap_outs.append(BlockMove(self.index, request.arrival, blocks))
            self.swapped.push(request)
        else:
            request.status, request.num_computed_tokens = Status.WAITING, 0
            self.waiting.push(request)

    def finish(self, request: Request) -> None:
        """Let a request go, wherever it is."""
        if request.status is Status.RUNNING:
            self._leave(request)
        elif request.status is Status.SWAPPED:
            self.swapped.remove(request)
            self.host.release(request.arrival)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def check_integrity(self) -> None:
        """Recount everything that is counted."""
        self.kv.check_integrity(self.running)
        self.host.check_integrity([r.arrival for r in self.swapped])
        slots = [*(r.slot for r in self.running), *(slot for _, slot in self._resting)]
        assert sorted([*slots, *self.free_slots]) == list(range(self.config.max_num_seqs))  # pyright: ignore
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.WAITING and r.slot is None for r in self.waiting)
        assert all(r.status is Status.SWAPPED and r.slot is None for r in self.swapped)
        for queue in (self.waiting, self.swapped):
            assert len(queue) == len(list(queue)), "a queue counts wrongly"
            assert queue.num_tokens == sum(r.num_prompt_tokens for r in queue), "a queue counts tokens wrongly"


def _to_compute(request: Request) -> int:
    return request.num_total_tokens - request.num_computed_tokens


def _is_partial(request: Request) -> bool:
    """Whether it is in the middle of its prompt, or of what has to be computed again."""
    return request.num_computed_tokens < max(request.num_prompt_tokens, request.num_total_tokens - 1)


def _chunk(request: Request, found: int, config: SchedulerConfig) -> int:
    return min(request.num_tokens - found, config.max_num_batched_tokens)
