"""Who gives way when blocks run out, and how: to host memory, or to be computed again."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Run, counts, make_config, make_request, names_of, starts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import SWAP_CHUNK, SwapConfig
from jaxserve.kv_cache.host_memory import HostMemory
from jaxserve.request import Status
from jaxserve.scheduler import Scheduler


def run_with(*requests: tuple[Any, ...], **changes: Any) -> Run:
    """Requests are (name, prompt tokens, max_tokens); nothing that they say or hear is alike."""
    run = Run(Scheduler(make_config(**changes)))
    for i, (name, prompt, max_tokens) in enumerate(requests):
        run.add(make_request(name, [i, *range(prompt - 1)], max_tokens))
    return run


def test_preemption_loses_no_token() -> None:
    plan = [(f"r{i}", 10, 20) for i in range(6)]
    tight, roomy = (run_with(*plan, num_blocks=n) for n in (14, 200))
    tight.finish()
    roomy.finish()
    preempted = [r for r in tight.requests if r.metrics.num_preemptions]
    assert preempted and any(r.metrics.num_preemptions > 1 for r in preempted)
    assert not any(r.metrics.num_preemptions for r in roomy.requests)
    assert [r.output_token_ids for r in tight.requests] == [r.output_token_ids for r in roomy.requests]
    assert not tight.requests[0].metrics.num_preemptions  # the latest arrival gives way, never the oldest


def test_the_latest_arrival_gives_way() -> None:
    run = run_with(("a", 11, 20), ("b", 11, 20), num_blocks=9)  # room for two times 16 tokens
    outputs = [run.step() for _ in range(8)]
    assert [names_of(o.preempted) for o in outputs] == [[]] * 6 + [["b"], []]
    b = run.by_name("b")
    assert (b.status, b.slot, b.num_computed_tokens, len(b.output_token_ids)) == (Status.WAITING, None, 0, 5)
    assert run.scheduler.num_running == run.scheduler.num_waiting == 1
    run.finish()


def test_swapped_blocks_come_back_and_nothing_is_computed_again() -> None:
    run = run_with(("a", 11, 20), ("b", 11, 20), num_blocks=9, swap=SwapConfig(num_blocks=8, mode="swap"))
    outputs = [run.step() for _ in range(7)]
    (out,) = outputs[-1].swap_outs
    b = run.by_name("b")
    assert (out.replica, [len(blocks) for blocks in out.blocks]) == (0, [4])
    assert (b.status, b.num_computed_tokens, run.scheduler.num_swapped) == (Status.SWAPPED, 15, 1)
    while not (output := run.step()).swap_ins:
        assert not output.dropped
    (back,) = output.swap_ins
    assert (back.handle, [len(blocks) for blocks in back.blocks]) == (out.handle, [4])
    assert starts(output)["b"] == 15 and counts(output)["b"] == 1
    counters = run.scheduler.counters
    assert (counters.num_preemptions, counters.num_swapped_out, counters.num_blocks_moved) == (1, 1, 8)
    run.finish()


@pytest.mark.parametrize(("mode", "swaps"), [("recompute", False), ("swap", True), ("auto", True)])
def test_the_mode_decides(mode: Any, swaps: bool) -> None:
    swap = SwapConfig(num_blocks=8, mode=mode, bytes_per_second=8.0, prefill_tokens_per_second=14.0)
    run = run_with(("a", 11, 20), ("b", 11, 20), num_blocks=9, swap=swap)
    outputs = [run.step() for _ in range(7)]
    assert [len(o.swap_outs) for o in outputs] == [0] * 6 + [int(swaps)]
    run.finish()


def test_what_swapping_and_recomputing_cost() -> None:
    """4 blocks of 100 bytes, out and in, at 400 bytes per second: 2 seconds. At 50 tokens per second: 100 tokens."""

    def prefers_swap(num_tokens: int, mode: Any = "auto", num_blocks: int = 60, used: int = 0) -> bool:
        memory = HostMemory(SwapConfig(num_blocks, mode, 100, 400.0, 50.0))
        if used:
            memory.store(1, [used])
        return memory.prefers_swap([4, 3], num_tokens)

    assert [prefers_swap(n) for n in (99, 100, 101)] == [False, False, True]
    assert [prefers_swap(n, "swap") for n in (1, 101)] == [True, True]
    assert [prefers_swap(n, "recompute") for n in (1, 101)] == [False, False]
    # A chunk of every group is moved at once, and its room is taken.
    assert [prefers_swap(101, num_blocks=n) for n in (SWAP_CHUNK - 1, SWAP_CHUNK)] == [False, True]
    assert [prefers_swap(101, num_blocks=2 * SWAP_CHUNK, used=n) for n in (SWAP_CHUNK, SWAP_CHUNK + 1)] == [True, False]


@pytest.mark.parametrize("swap", [SwapConfig(), SwapConfig(num_blocks=100, mode="swap")])
def test_a_window_is_enough_to_come_back(swap: SwapConfig) -> None:
    """11 blocks are as many as one sequence holds at most, and fewer than it has tokens when it is preempted."""
    sizes = {"block_size": 1, "num_blocks": 12, "max_num_batched_tokens": 6, "max_num_seqs": 1}
    run = run_with(windows=(5,), policy="priority", swap=swap, enable_prefix_caching=False, **sizes)
    assert run.config.most_blocks(5, 33) == 11
    low = run.add(make_request("low", range(4), 30, priority=1))
    for _ in range(20):
        run.step()
    run.add(make_request("high", [1], 1))
    run.finish()
    assert low.metrics.num_preemptions == 1


def test_host_memory_is_counted() -> None:
    memory = HostMemory(SwapConfig(num_blocks=40))
    memory.store(3, [1, SWAP_CHUNK + 1])
    memory.store(4, [SWAP_CHUNK])
    memory.check_integrity([4, 3])
    assert memory.num_used == 3 * SWAP_CHUNK
    memory.release(3)
    assert memory.num_used == SWAP_CHUNK
    for wrong in ([], [3, 4]):
        with pytest.raises(AssertionError):
            memory.check_integrity(wrong)


def test_full_host_memory_means_recomputing() -> None:
    plan = [(name, 11, 20) for name in "abc"]
    run = run_with(*plan, num_blocks=13, swap=SwapConfig(num_blocks=8, mode="swap"), max_num_batched_tokens=40)
    while run.scheduler.counters.num_preemptions < 2:
        run.step()
    assert [run.by_name(name).status for name in "bc"] == [Status.WAITING, Status.SWAPPED]
    run.finish()


@pytest.mark.parametrize("replica", [0, 1])
def test_aborting_a_swapped_request_frees_host_memory(replica: int) -> None:
    run = Run(Scheduler(make_config(num_blocks=9, num_replicas=2, swap=SwapConfig(num_blocks=8, mode="swap"))))
    for i, name in enumerate(["a0", "a1", "b0", "b1"]):
        run.add(make_request(name, [i, *range(10)], 20))
    while run.scheduler.num_swapped < 2:
        run.step()
    gone = run.by_name(f"b{replica}")
    assert gone.status is Status.SWAPPED and gone.replica == replica
    run.abort(gone)
    assert run.step().dropped == [(replica, gone.arrival)]
    assert run.step().dropped == []
    run.finish()


@settings(max_examples=60)
@given(
    st.integers(11, 30),
    st.integers(2, 6),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=3, max_size=14),
    st.sampled_from([0, 24]),
    st.integers(6, 16),
)
def test_who_came_back_is_left_alone_until_it_has_made_progress(
    num_blocks: int, seqs: int, plan: Any, host_blocks: int, budget: int
) -> None:
    """As long as somebody else can give way; and nobody is preempted for one that came later."""
    swap = SwapConfig(num_blocks=host_blocks, mode="swap" if host_blocks else "auto")
    requests = [(f"r{i}", prompt, max_tokens) for i, (prompt, max_tokens) in enumerate(plan)]
    run = run_with(*requests, num_blocks=num_blocks, max_num_seqs=seqs, swap=swap, max_num_batched_tokens=budget)
    while run.scheduler.has_unfinished:
        progressed = {r.request_id for r in run.requests if r.status is Status.RUNNING and r.has_made_progress}
        output = run.step()
        stays = [s.request for s in output.replicas[0] if not s.is_new]
        for victim in output.preempted:
            assert all(r.arrival < victim.arrival or r.request_id not in progressed for r in stays)
            assert victim.request_id in progressed or all(r.request_id not in progressed for r in stays)
    run.finish()
