"""Blocks and prefixes: what is found, what is forgotten, what is never shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from harness import Run, counts, make_config, make_request, starts
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kv_cache.block_pool import NULL_BLOCK, BlockPool
from jaxserve.kv_cache.manager import KVCacheManager
from jaxserve.request import Status
from jaxserve.scheduler import Scheduler

STEM = list(range(12))


def run_with(**changes: Any) -> Run:
    return Run(Scheduler(make_config(max_num_batched_tokens=64, **changes)))


# -- prefixes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "found"), [(1, 12), (4, 12), (5, 10), (16, 0)])
def test_a_prefix_is_found_in_the_step_that_computes_it(block_size: int, found: int) -> None:
    run = run_with(block_size=block_size)
    for name in "abc":
        run.add(make_request(name, [*STEM, ord(name) % 50], 3))
    assert starts(run.step()) == {"a": 0, "b": found, "c": found}
    assert [r.num_cached_tokens for r in run.requests] == [0, found, found]
    assert (run.scheduler.counters.prefix_cache_queries, run.scheduler.counters.prefix_cache_hits) == (39, 2 * found)
    run.finish()


def test_a_prefix_is_found_after_its_request_ended_and_in_what_it_said() -> None:
    run = run_with()
    first = run.add(make_request("first", STEM, 9))
    run.finish()
    run.add(make_request("again", [*STEM, *first.output_token_ids], 1))
    assert starts(run.step()) == {"again": 20}  # the 21st token was never computed
    run.finish()


def test_a_prefix_is_found_after_preemption() -> None:
    run = run_with(max_num_seqs=1, policy="priority")
    low = run.add(make_request("low", STEM, 9, priority=1))
    for _ in range(3):
        run.step()
    run.add(make_request("high", [40], 1, priority=0))
    assert starts(run.step()) == {"high": 0} and low.status is Status.WAITING
    assert counts(output := run.step()) == {"low": 3} and starts(output) == {"low": 12}
    assert (low.num_cached_tokens, low.metrics.num_preemptions) == (0, 1)
    run.finish()


@pytest.mark.parametrize(
    ("changes", "first", "second", "found"),
    [
        ({}, {}, {}, 12),
        ({}, {"cache_salt": "x"}, {"cache_salt": "x"}, 12),
        ({}, {"cache_salt": "x"}, {"cache_salt": "y"}, 0),
        ({}, {}, {"cache_salt": ""}, 0),
        ({}, {"adapter": "x"}, {"cache_salt": "x"}, 0),
        ({}, {"adapter": "x"}, {"adapter": "x"}, 12),
        ({}, {"adapter": "x"}, {}, 0),
        ({}, {}, {"reads_prefix_cache": False}, 0),
        ({}, {"reads_prefix_cache": False}, {}, 12),
        ({"enable_prefix_caching": False}, {}, {}, 0),
        ({"keys_depend_on_prompt_length": True}, {}, {}, 12),
    ],
)
def test_who_shares_with_whom(changes: Any, first: Any, second: Any, found: int) -> None:
    run = run_with(**changes)
    run.add(make_request("first", [*STEM, 20], 2, **first))
    run.add(make_request("second", [*STEM, 21], 2, **second))
    assert starts(run.step()) == {"first": 0, "second": found}
    run.finish()


def test_keys_that_depend_on_the_prompt_length() -> None:
    run = run_with(keys_depend_on_prompt_length=True)
    for name, own in (("a", 1), ("b", 2), ("c", 1)):
        run.add(make_request(name, [*STEM, *[20] * own], 2))
    assert starts(run.step()) == {"a": 0, "b": 0, "c": 12}


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_is_always_computed(length: int, found: int) -> None:
    run = run_with()
    for name in "ab":
        run.add(make_request(name, STEM[:length], 1))
    assert starts(run.step()) == {"a": 0, "b": found}


def test_the_prefix_that_was_used_longest_ago_is_forgotten_first_from_its_end() -> None:
    run = run_with(num_blocks=7)  # of which four get names below
    for name, token in (("a", 1), ("b", 2)):
        run.add(make_request(name, [token] * 9, 1))
        run.finish()
    run.add(make_request("c", [3] * 13, 1))  # takes the two blocks without names, and the end and start of a
    run.finish()
    for name, token, found in (("b", 2, 8), ("c", 3, 8), ("a", 1, 0)):
        run.add(make_request(f"{name}2", [token] * 9, 1))
        assert starts(run.step()) == {f"{name}2": found}


def test_a_prefix_that_was_found_counts_as_used() -> None:
    run = run_with(num_blocks=7)
    for name, token in (("a", 1), ("b", 2), ("a2", 1)):
        run.add(make_request(name, [token] * 9, 1))
        run.finish()
    run.add(make_request("c", [3] * 13, 1))
    run.finish()
    run.add(make_request("a3", [1] * 9, 1))
    assert starts(run.step()) == {"a3": 8}


def test_resetting_forgets_every_prefix_and_disturbs_nobody() -> None:
    run = run_with()
    for name in "ab":
        run.add(make_request(name, [*STEM, 30], 8))
    run.step()
    run.scheduler.reset_prefix_cache()
    run.scheduler.check_integrity()
    run.add(make_request("c", [*STEM, 31], 2))
    assert starts(run.step())["c"] == 0
    run.add(make_request("d", [*STEM, 31], 2))
    assert starts(run.step())["d"] == 12
    run.finish()


def test_names_are_chained_hashes() -> None:
    run = run_with(block_size=3)
    request = run.add(make_request("a", STEM, 9, cache_salt="salt", adapter="adapter"))
    run.finish()
    assert request.block_hashes == list(run.stories["a"].names)[: len(request.block_hashes)]
    assert len(request.block_hashes) == 6 and all(len(name) == 32 for name in request.block_hashes)


def test_what_is_computed_behind_an_end_cannot_be_found() -> None:
    """The second of four steps ends the request, while the next four are on their way."""
    for block_size in (1, 2):
        run = Run(Scheduler(make_config(num_scheduler_steps=4, block_size=block_size)), ahead=True)
        request = make_request("a", [1], 20)
        tokens = run.add(request).prompt_token_ids + run.stories["a"].tokens[1:]
        run.abort(request)
        run = Run(run.scheduler, ahead=True)
        run.add(make_request("b", [1], 20, {tokens[3]}))
        run.finish()
        pool = run.scheduler.replicas[0].kv.groups[0].pool
        end = run.stories["b"].length
        assert pool.num_named == end // block_size < 20


@given(
    st.sampled_from([(None,), (5,), (None, 6), (3, None, 9), (1,)]),
    st.integers(1, 4),
    st.integers(1, 24),
    st.lists(st.booleans(), min_size=72, max_size=72),
)
def test_the_longest_prefix_after_which_computing_can_go_on(
    windows: tuple[int | None, ...], block_size: int, length: int, there: Sequence[bool]
) -> None:
    config = make_config(windows=windows, block_size=block_size, num_blocks=100, max_num_seqs=16)
    kv, request = KVCacheManager(config), make_request("a", range(length), 1)
    hashes = kv.hasher.hashes(request)
    has = [[there[24 * g + i] for i in range(len(hashes))] for g in range(len(windows))]
    for group, present in zip(kv.groups, has, strict=True):
        for name in (h for h, p in zip(hashes, present, strict=True) if p):
            (block,) = group.pool.allocate(1)
            group.pool.name(block, name)
            group.pool.free([block])

    def can_go_on(count: int) -> bool:
        seen = [range(0 if w is None else max(0, count * block_size - w + 1) // block_size, count) for w in windows]
        return all(has[g][i] for g, blocks in enumerate(seen) for i in blocks)

    found = max(count for count in range((length - 1) // block_size + 1) if can_go_on(count)) * block_size
    assert kv.find_prefix(request) == found
    needs = kv.needs(request, found, length)
    free = [group.pool.num_free for group in kv.groups]
    assert kv.admit(request, found, length)
    assert [a - g.pool.num_free for a, g in zip(free, kv.groups, strict=True)] == needs
    request.num_computed_tokens = found
    kv.check_integrity([request])


# -- blocks ------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=60))
def test_block_pool(num_blocks: int, moves: list[tuple[int, int]]) -> None:
    """Allocate, free, name, share and forget at random; a plain model says what is there."""
    pool, held, names = BlockPool(num_blocks), list[list[int]](), dict[bytes, int]()
    for kind, number in moves:
        name = bytes([number])
        if kind == 0 and number <= pool.num_free:
            held.append(pool.allocate(number))
            names = {n: b for n, b in names.items() if b not in held[-1]}
        elif kind == 1 and held:
            pool.free(held.pop(number % len(held)))
        elif kind == 2 and held and held[number % len(held)]:
            block = held[number % len(held)][0]
            pool.name(block, name)
            if name not in names and block not in names.values():
                names[name] = block
        elif kind == 3 and name in names:
            pool.share([names[name]])
            held.append([names[name]])
        elif kind == 4 and number == 0:
            pool.forget_all()
            names = {}
        flat = [block for blocks in held for block in blocks]
        pool.check_integrity(flat)
        assert all(pool.find(bytes([i])) == names.get(bytes([i])) for i in range(8))
        assert pool.num_usable - pool.num_free == len(set(flat)) and NULL_BLOCK not in flat
        once = Counter(flat)
        assert pool.num_held_once(once) == sum(n == 1 for n in once.values())
        assert pool.num_free_among(range(1, num_blocks)) == pool.num_free
    assert pool.num_named == len(names)


def test_the_order_in_which_blocks_are_used_again() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(2)
    for block in first[:2]:
        pool.name(block, bytes([block]))
    pool.free(first)
    assert pool.allocate(1) == [first[2]]  # without a name: lost anyway
    assert not set(pool.allocate(2)) & {*first, *second}  # never used
    assert pool.allocate(2) == [first[1], first[0]]
    pool.free(second)
    assert pool.allocate(2) == second


def test_the_pool_notices_wrong_use() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 1 free"):
        pool.allocate(3)
    for wrong in ([], blocks[:1], [*blocks, 3], [*blocks, blocks[0]], [*blocks, NULL_BLOCK]):
        with pytest.raises(AssertionError):
            pool.check_integrity(wrong)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="is free already"):
        pool.free(blocks[:1])


def test_growing_is_all_or_nothing() -> None:
    kv = KVCacheManager(make_config(num_blocks=5))
    a, b = make_request("a", range(9), 1), make_request("b", range(9), 1)
    assert kv.admit(a, 0, 9)
    (table,) = kv.tables(a)
    before = list(table)
    assert len(before) == 3 and kv.grow(a, 12) and table == before
    assert not kv.admit(b, 0, 5) and kv.groups[0].pool.num_free == 1
    assert kv.admit(b, 0, 4) and not kv.grow(b, 5) and [len(t) for t in kv.tables(b)] == [1]
    assert (kv.num_held, kv.usage) == (4, 1)
    kv.free(a)
    kv.free(a)
    assert kv.usage == 0.25
    kv.check_integrity([b])
    for wrong in ([], [a, b]):
        with pytest.raises(AssertionError):
            kv.check_integrity(wrong)


def test_a_window_lets_go_of_blocks_and_needs_no_more_than_it_says() -> None:
    run = Run(Scheduler(make_config(windows=(None, 6), max_num_seqs=1, max_num_batched_tokens=4, num_blocks=11)))
    request = run.add(make_request("a", range(24), 16))
    full, window = run.scheduler.replicas[0].kv.groups
    most = run.config.most_blocks(6, 39)
    while run.scheduler.has_unfinished:
        run.step()
        assert len(full.held(request)) == -(-request.num_computed_tokens // 4) or not request.num_tokens_left
        assert len(window.held(request)) <= most
    run.finish()


def test_a_window_does_not_count_on_blocks_that_others_hold_too() -> None:
    kv = KVCacheManager(make_config(windows=(4,), num_blocks=5))
    a, b = make_request("a", range(12), 1), make_request("b", [0, 1, 2, 3, 9, 9, 9, 9], 1)
    assert kv.admit(a, 0, 8)
    a.num_computed_tokens = 8
    kv.name_blocks(a)
    assert kv.find_prefix(b) == 4 and kv.admit(b, 4, 8)
    b.num_computed_tokens = 8
    filler = kv.groups[0].pool.allocate(1)
    assert not kv.grow(a, 12)
    kv.free(b)
    kv.groups[0].pool.allocate(1)
    assert kv.grow(a, 12)
    assert kv.groups[0].pool.num_free == 0 and filler


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 60),
    st.lists(st.integers(1, 12), min_size=60),
)
def test_most_blocks_is_never_exceeded(
    block_size: int, window: int, budget: int, length: int, chunks: Sequence[int]
) -> None:
    """However a sequence is cut into chunks."""
    config = make_config(
        windows=(window,),
        block_size=block_size,
        num_blocks=100,
        max_num_seqs=1,
        max_num_batched_tokens=budget,
        max_model_len=60,
    )
    kv, request = KVCacheManager(config), make_request("a", range(length), 1)
    most = config.most_blocks(window, length)
    assert most <= config.blocks_of(window) - 1
    assert kv.admit(request, 0, min(length, chunks[0], budget))
    for chunk in chunks:
        end = min(length, request.num_computed_tokens + min(chunk, budget))
        assert kv.grow(request, end) and len(kv.groups[0].held(request)) <= most
        request.num_computed_tokens = end
