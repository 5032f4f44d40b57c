"""The scheduler and its block pool, alone: random runs in which everything is recounted after every step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SchedulerConfig, decode_buckets, token_buckets
from jaxserve.kv_cache.block_pool import NULL_BLOCK, BlockPool
from jaxserve.kv_cache.manager import KVCacheManager
from jaxserve.outputs import RequestMetrics
from jaxserve.request import Request, Status
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Replica, Scheduled, Scheduler, SchedulerOutput

VOCABULARY = 50
NEVER = frozenset[int]()


def make_config(**changes: Any) -> SchedulerConfig:
    sizes: dict[str, Any] = {
        "max_model_len": 40,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_blocks": 60,
    }
    return SchedulerConfig(**sizes | changes)


def make_request(
    name: str, prompt: Sequence[int], max_tokens: int, stop: Iterable[int] = NEVER, **params: Any
) -> Request:
    metrics = RequestMetrics(arrival_time=0.0)
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=list(stop), **params)
    return Request(name, list(prompt), sampling, 0, frozenset(stop), max_tokens, metrics)


def next_token(request: Request) -> int:
    """The fake model: a function of the request's tokens, so that losing or repeating one changes all that follow."""
    return hash((*request.prompt_token_ids, *request.output_token_ids)) % VOCABULARY


@dataclass
class Run:
    """A scheduler being driven by a fake model, with its books checked at every step."""

    scheduler: Scheduler
    requests: list[Request] = field(default_factory=list)
    first_tokens: list[Request] = field(default_factory=list)
    schedules: list[list[list[tuple[Any, ...]]]] = field(default_factory=list)

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests.append(request)

    def step(self) -> SchedulerOutput:
        entered = {r.request_id for r in self.requests if r.slot is not None}
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for replica, rows in zip(self.scheduler.replicas, output.replicas, strict=True):
            check_rows(self.scheduler.config, rows, entered - {r.request_id for r in output.preempted})
            check_nobody_waits_in_vain(replica, rows, output)
        self.schedules.append([[signature(s) for s in rows] for rows in output.replicas])
        tokens = [[next_token(s.request) for s in rows] for rows in output.replicas]
        for request in self.scheduler.update(output, tokens):
            if len(request.output_token_ids) == 1:
                self.first_tokens.append(request)
        self.scheduler.check_integrity()
        return output

    def finish(self, limit: int | None = None) -> int:
        """Step until nothing is left, at most ``limit`` times; how many steps it took."""
        limit = self.bound() if limit is None else limit
        for count in range(limit + 1):
            if not self.scheduler.has_unfinished:
                return count
            assert not self.step().is_empty
        raise AssertionError(f"requests are left after {limit} steps")

    def bound(self) -> int:
        """Steps within which everything is done: each replica's oldest request gets a token in every step."""
        return sum(r.num_prompt_tokens + r.max_tokens + 1 for r in self.requests)


def signature(s: Scheduled) -> tuple[Any, ...]:
    return s.request.request_id, s.start, s.count, tuple(s.blocks), s.slot


def check_rows(config: SchedulerConfig, rows: Sequence[Scheduled], running: set[str]) -> None:
    assert sum(s.count for s in rows) <= config.max_num_batched_tokens
    assert len({s.slot for s in rows}) == len(rows) <= config.max_num_seqs
    blocks = [block for s in rows for block in s.blocks]
    assert len(set(blocks)) == len(blocks)
    assert all(NULL_BLOCK < block < config.num_blocks for block in blocks)
    for s in rows:
        assert s.count >= 1
        assert s.start == s.request.num_computed_tokens
        assert s.start + s.count <= s.request.num_tokens <= config.max_model_len
        assert len(s.blocks) * config.block_size >= s.start + s.count
        assert s.samples == (s.start + s.count == s.request.num_tokens)
        assert s.is_new == (s.request.request_id not in running)
        assert not s.is_new or s.start == 0
        assert config.enable_chunked_prefill or s.samples


def check_nobody_waits_in_vain(replica: Replica, rows: Sequence[Scheduled], output: SchedulerOutput) -> None:
    """First come, first served; and whoever is first waits only for tokens, a slot or blocks."""
    running, waiting = [r.arrival for r in replica.running], [r.arrival for r in replica.waiting]
    assert [*running, *waiting] == sorted([*running, *waiting])
    if not waiting or any(r in output.preempted for r in replica.waiting):
        return
    budget = replica.config.max_num_batched_tokens - sum(s.count for s in rows)
    first = replica.waiting[0]
    count = min(budget, first.num_tokens)
    whole = count == first.num_tokens or replica.config.enable_chunked_prefill
    fits = replica.kv.blocks_for(count) <= replica.kv.pool.num_free
    assert not (count and whole and fits and len(replica.running) < replica.config.max_num_seqs)


configs = st.builds(
    make_config,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 24),
    block_size=st.integers(1, 5),
    num_blocks=st.integers(41, 90),  # of which one request needs up to 40
    num_replicas=st.integers(1, 3),
)
arrivals = st.tuples(st.integers(0, 6), st.integers(1, 25), st.integers(1, 14), st.sampled_from([NEVER, {3, 4, 5, 6}]))
"""Steps since the request before, prompt tokens, max_tokens, stop tokens."""
aborts = st.tuples(st.integers(0, 3), st.integers(0, 13))
"""Steps since the abort before, index of the request."""


def play(config: SchedulerConfig, plan: Sequence[tuple[Any, ...]], ends: Sequence[tuple[int, int]] = ()) -> Run:
    """Add requests as ``plan`` (of ``arrivals``) says, abort some as ``ends`` (of ``aborts``) says, run to the end."""
    run = Run(Scheduler(config))
    for i, (pause, prompt, max_tokens, stop) in enumerate(plan):
        for _ in range(pause):
            run.step()
        run.add(make_request(f"r{i}", [(7 * i + j) % VOCABULARY for j in range(prompt)], max_tokens, stop))
    for delay, index in ends:
        for _ in range(delay):
            run.step()
        run.scheduler.finish(run.requests[index % len(run.requests)], "abort")
        run.scheduler.check_integrity()
    run.finish()
    return run


def expected_output(request: Request, config: SchedulerConfig) -> list[int]:
    """What the fake model says when nobody else is there."""
    copy = make_request("alone", request.prompt_token_ids, request.max_tokens, request.stop_token_ids)
    while len(copy.output_token_ids) < copy.max_tokens and copy.num_tokens < config.max_model_len:
        copy.output_token_ids.append(next_token(copy))
        if copy.output_token_ids[-1] in copy.stop_token_ids:
            break
    return copy.output_token_ids


@settings(max_examples=400)
@given(configs, st.lists(arrivals, min_size=1, max_size=14), st.lists(aborts, max_size=4))
def test_every_request_finishes_with_the_tokens_it_would_get_alone(config: Any, plan: Any, ends: Any) -> None:
    run = play(config, plan, ends)
    for request in run.requests:
        assert request.status is Status.FINISHED
        alone = expected_output(request, config)
        if request.finish_reason == "abort":
            assert request.output_token_ids == alone[: len(request.output_token_ids)]
        else:
            assert request.output_token_ids == alone
            stopped = alone[-1] in request.stop_token_ids
            ending = ("stop", alone[-1]) if stopped else ("length", None)
            assert (request.finish_reason, request.stop_reason) == ending
    for replica in run.scheduler.replicas:
        assert replica.kv.pool.num_free == replica.kv.pool.num_usable
        assert replica.load == 0


@given(configs, st.lists(arrivals, min_size=1, max_size=14))
def test_the_same_events_give_the_same_schedule(config: Any, plan: Any) -> None:
    assert play(config, plan).schedules == play(config, plan).schedules


@given(st.lists(arrivals, min_size=2, max_size=14), st.integers(1, 6), st.integers(6, 24))
def test_first_tokens_come_in_the_order_of_arrival(plan: Any, seqs: int, tokens: int) -> None:
    run = play(make_config(num_blocks=300, max_num_seqs=seqs, max_num_batched_tokens=tokens), plan)
    assert not any(r.metrics.num_preemptions for r in run.requests)
    assert [r.arrival for r in run.first_tokens] == list(range(len(plan)))


@given(st.lists(arrivals, min_size=2, max_size=14))
def test_without_chunks_a_prompt_is_computed_at_once(plan: Any) -> None:
    run = play(make_config(enable_chunked_prefill=False, max_num_batched_tokens=40, num_blocks=20), plan)
    assert all(r.output_token_ids == expected_output(r, run.scheduler.config) for r in run.requests)


def test_preemption_loses_no_token() -> None:
    plan = [(0, 10, 20, NEVER)] * 6
    tight, roomy = (play(make_config(num_blocks=n), plan) for n in (14, 200))
    preempted = [r for r in tight.requests if r.metrics.num_preemptions]
    assert preempted and any(r.metrics.num_preemptions > 1 for r in preempted)
    assert not any(r.metrics.num_preemptions for r in roomy.requests)
    assert [r.output_token_ids for r in tight.requests] == [r.output_token_ids for r in roomy.requests]
    assert not tight.requests[0].metrics.num_preemptions  # the latest arrival gives way, never the oldest


def test_the_latest_arrival_gives_way() -> None:
    run = Run(Scheduler(make_config(num_blocks=9)))  # room for two times 16 tokens
    for name in "ab":
        run.add(make_request(name, range(11), 20))
    outputs = [run.step() for _ in range(8)]
    assert [[r.request_id for r in o.preempted] for o in outputs] == [[]] * 6 + [["b"], []]
    b = run.requests[1]
    assert (b.status, b.slot, b.num_computed_tokens, len(b.output_token_ids)) == (Status.WAITING, None, 0, 5)
    assert run.scheduler.num_running == run.scheduler.num_waiting == 1


def test_a_request_enters_the_step_after_one_ends() -> None:
    run = Run(Scheduler(make_config(max_num_seqs=2)))
    for name, max_tokens in (("a", 2), ("b", 9), ("c", 1), ("d", 1), ("e", 1)):
        run.add(make_request(name, [1, 2], max_tokens))
    names = [[s.request.request_id for s in run.step().replicas[0]] for _ in range(6)]
    assert names == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "d"], ["b", "e"], ["b"]]
    assert run.requests[2].slot is None


def test_blocks_of_an_aborted_request_are_free_at_once() -> None:
    run = Run(Scheduler(make_config(num_blocks=9)))
    for name in "ab":
        run.add(make_request(name, range(30), 2))
    run.step()
    run.step()
    assert [len(r.waiting) for r in run.scheduler.replicas] == [1]
    run.scheduler.finish(run.requests[0], "abort")
    run.scheduler.finish(run.requests[0], "stop")  # the first ending counts
    assert run.requests[0].finish_reason == "abort"
    (row,) = run.step().replicas[0]
    assert row.request.request_id == "b" and row.is_new


def test_a_request_aborted_while_its_step_runs_gets_no_token() -> None:
    scheduler = Scheduler(make_config())
    gone, stays = make_request("gone", [1], 3), make_request("stays", [1], 3)
    for request in (gone, stays):
        scheduler.add(request)
    output = scheduler.schedule()
    scheduler.finish(gone, "abort")
    assert scheduler.update(output, [[5, 6]]) == [stays]
    assert (gone.output_token_ids, stays.output_token_ids) == ([], [6])
    scheduler.check_integrity()


def test_endings() -> None:
    def ending(max_tokens: int, stop: Iterable[int] = NEVER, eos: int | None = None, **params: Any) -> tuple[Any, ...]:
        scheduler = Scheduler(make_config())
        request = make_request("r", range(30), max_tokens, stop, **params)
        if eos is not None:
            request.stop_token_ids |= {eos}
        scheduler.add(request)
        for token in range(100, 200):
            scheduler.update(output := scheduler.schedule(), [[token] * len(output.replicas[0])])
            if request.finish_reason:
                return len(request.output_token_ids), request.finish_reason, request.stop_reason
        raise AssertionError("no ending")

    # The prompt takes two steps, so that 101 is the first token.
    assert ending(3) == (3, "length", None)
    assert ending(1) == (1, "length", None)
    assert ending(50) == (10, "length", None)
    assert ending(9, stop=[104, 103]) == (3, "stop", 103)
    assert ending(9, eos=104) == (4, "stop", None)
    assert ending(9, stop=[103, 106], min_tokens=3) == (6, "stop", 106)
    assert ending(9, stop=[109]) == (9, "stop", 109)


def test_a_new_request_goes_where_the_load_is_least() -> None:
    scheduler = Scheduler(make_config(num_replicas=3))

    def add(name: str) -> int:
        request = make_request(name, [1, 2, 3], 30)
        scheduler.add(request)
        return request.replica

    assert [add(f"w{i}") for i in range(5)] == [0, 1, 2, 0, 1]
    assert [r.load for r in scheduler.replicas] == [8, 8, 4]
    scheduler.update(output := scheduler.schedule(), [[1] * len(rows) for rows in output.replicas])
    assert [r.load for r in scheduler.replicas] == [2, 2, 1]
    assert [add(f"x{i}") for i in range(4)] == [2, 0, 1, 2]
    assert [r.load for r in scheduler.replicas] == [6, 6, 9]  # one waiting weighs as much as four running
    assert (scheduler.num_running, scheduler.num_waiting) == (5, 4)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        (0, 1, ["empty"]),
        (40, 1, ["40 tokens", "max_model_len=40", "39"]),
        (20, 30, ["20 prompt tokens", "max_tokens=30", "10 KV blocks of 4", "has 8"]),
        (33, 1, ["33 prompt tokens", "9 KV blocks", "num_gpu_blocks_override"]),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(prompt: int, max_tokens: int, words: list[str]) -> None:
    scheduler = Scheduler(make_config(num_blocks=9))
    with pytest.raises(ValueError) as error:
        scheduler.add(make_request("r", range(prompt), max_tokens))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not scheduler.has_unfinished


def test_the_largest_request_that_fits_runs() -> None:
    run = Run(Scheduler(make_config(num_blocks=9)))
    for i in range(3):
        run.add(make_request(f"r{i}", range(20 + i), 12 - i))
    run.finish()
    assert [len(r.output_token_ids) for r in run.requests] == [12, 11, 10]
    assert run.scheduler.kv_usage == 0


def test_usage_counts_blocks() -> None:
    run = Run(Scheduler(make_config(num_blocks=11)))
    run.add(make_request("r", range(9), 5))
    run.step()
    assert run.scheduler.kv_usage == pytest.approx(0.3)


# -- blocks ------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.lists(st.integers(-5, 5), max_size=40))
def test_block_pool(num_blocks: int, moves: list[int]) -> None:
    """Positive: allocate so many if there are; negative: free the allocation before that many others."""
    pool, held, seen = BlockPool(num_blocks), list[list[int]](), set[int]()
    for move in moves:
        if 0 <= move <= pool.num_free:
            held.append(pool.allocate(move))
            seen.update(held[-1])
        elif move < 0 and held:
            pool.free(held.pop(move % len(held)))
        pool.check_integrity()
        flat = [block for blocks in held for block in blocks]
        assert len(set(flat)) == len(flat) == pool.num_usable - pool.num_free
    assert NULL_BLOCK not in seen and seen <= set(range(num_blocks))


def test_freed_blocks_are_used_last_and_from_the_end_of_their_sequence() -> None:
    pool = BlockPool(6)
    first = pool.allocate(3)
    pool.free(first)
    rest = pool.allocate(2)
    assert not set(rest) & set(first)
    assert pool.allocate(3) == first[::-1]


def test_the_pool_notices_wrong_use() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 1 free"):
        pool.allocate(3 if pool.num_free == 1 else 0)
    pool.free(blocks)
    with pytest.raises(KeyError):
        pool.free(blocks[:1])
    for broken in ([1, 2], [1, 2, 3, 3], [0, 1, 2, 3]):
        pool = BlockPool(4)
        pool._free.clear()
        pool._free.extend(broken)
        with pytest.raises(AssertionError):
            pool.check_integrity()


def test_growing_is_all_or_nothing() -> None:
    kv = KVCacheManager(num_blocks=5, block_size=4)
    a, b = make_request("a", range(9), 1), make_request("b", range(9), 1)
    assert kv.grow(a, 9)
    assert len(kv.table(a)) == 3
    before = kv.table(a)
    assert kv.grow(a, 12) and kv.table(a) == before
    assert not kv.grow(b, 5)
    assert kv.table(b) == [] and kv.pool.num_free == 1
    assert kv.grow(b, 4)
    kv.free(a)
    assert (kv.table(a), kv.pool.num_free, kv.usage) == ([], 3, 0.25)
    kv.free(a)
    kv.check_integrity([b])
    with pytest.raises(AssertionError):
        kv.check_integrity([])


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_num_seqs": 0}, ["max_num_seqs=0"]),
        ({"block_size": 2.5}, ["block_size=2.5"]),
        ({"num_blocks": 1}, ["num_blocks=1"]),
        ({"max_num_batched_tokens": 3}, ["max_num_batched_tokens=3", "max_num_seqs=4"]),
        ({"enable_chunked_prefill": False}, ["enable_chunked_prefill=False", "16 < 40"]),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    assert all(word in str(error.value) for word in words)


@given(st.integers(1, 3000))
def test_buckets_rise_to_the_limit(limit: int) -> None:
    buckets: list[tuple[Callable[[int], tuple[int, ...]], int]] = [(decode_buckets, 1), (token_buckets, 64)]
    for function, smallest in buckets:
        sizes = function(limit)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == limit
        assert sizes[0] == min(smallest, limit)
        assert all(b <= 2 * a for a, b in pairwise(sizes))
    large = [size for size in decode_buckets(limit) if size >= 16]
    assert all(2 * b <= 3 * a for a, b in pairwise(large))


def test_the_host_half_does_not_import_jax() -> None:
    modules = "scheduler batch request kv_cache.manager completion engine_args outputs sampling_params logit_edits"
    imports = "; ".join(f"import jaxserve.{module}" for module in modules.split())
    code = f"import sys; {imports}; print(sorted({{'jax', 'jaxlib', 'flax', 'torch', 'orbax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
