"""What is refused, what ends a request, where it goes; and what a decision says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from harness import NEVER, Run, counts, make_config, make_request
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import FairnessConfig, SwapConfig, TenantConfig, decode_buckets, token_buckets
from jaxserve.request import Status
from jaxserve.scheduler import QueueFullError, Scheduler

# -- admission ---------------------------------------------------------------------------------------------------------


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


def test_a_window_makes_long_sequences_fit() -> None:
    Scheduler(make_config(num_blocks=7, windows=(4,))).check_fits(30, 10)
    with pytest.raises(ValueError, match="need 10 KV blocks of 4 tokens, the cache has 6"):
        Scheduler(make_config(num_blocks=7, windows=(4, None))).check_fits(30, 10)


@pytest.mark.parametrize("replicas", [1, 2])
def test_queues_that_are_full_reject(replicas: int) -> None:
    config = make_config(max_num_queued_requests=3, max_num_queued_tokens=20, max_num_seqs=1, num_replicas=replicas)
    run = Run(Scheduler(config))
    for i in range(replicas):
        run.add(make_request(f"runs{i}", range(9), 9))
    run.step()
    run.scheduler.check_queue(3, 20)
    for name in "ab":
        run.add(make_request(name, range(6), 2))
    run.scheduler.check_queue(1, 8)
    with pytest.raises(QueueFullError, match=r"2 requests wait, 2 more would exceed max_num_queued_requests=3"):
        run.scheduler.check_queue(2, 2)
    with pytest.raises(QueueFullError, match=r"12 prompt tokens wait, 9 more would exceed max_num_queued_tokens=20"):
        run.scheduler.check_queue(1, 9)
    with pytest.raises(QueueFullError, match=r"12 prompt tokens wait, 9 more would exceed max_num_queued_tokens=20"):
        run.scheduler.check_queue(0, 9)
    assert (run.scheduler.counters.num_rejected, run.scheduler.counters.rejected_tokens) == (3, 20)
    run.abort(run.by_name("a"))
    run.scheduler.check_queue(2, 14)
    run.finish()
    run.scheduler.check_queue(3, 20)


def test_a_rejection_says_what_there_is_too_much_of() -> None:
    with pytest.raises(QueueFullError, match=r"0 prompt tokens wait, 3 more would exceed max_num_queued_tokens=2"):
        Scheduler(make_config(max_num_queued_tokens=2)).check_queue(3, 3)


def test_without_limits_nothing_is_rejected() -> None:
    Scheduler(make_config()).check_queue(10**6, 10**9)


def test_a_new_request_goes_where_the_load_is_least() -> None:
    scheduler = Scheduler(make_config(num_replicas=3))

    def add(name: str) -> int:
        request = make_request(name, [1, 2, 3], 30)
        scheduler.add(request)
        return request.replica

    assert [add(f"w{i}") for i in range(5)] == [0, 1, 2, 0, 1]
    assert [r.load for r in scheduler.replicas] == [8, 8, 4]
    scheduler.update(output := scheduler.schedule(), [[[1] for _ in rows] for rows in output.replicas])
    assert [r.load for r in scheduler.replicas] == [2, 2, 1]
    assert [add(f"x{i}") for i in range(4)] == [2, 0, 1, 2]
    assert [r.load for r in scheduler.replicas] == [6, 6, 9]  # one waiting weighs as much as four running
    assert (scheduler.num_running, scheduler.num_waiting) == (5, 4)


# -- endings -----------------------------------------------------------------------------------------------------------


def test_blocks_of_an_aborted_request_are_free_at_once() -> None:
    run = Run(Scheduler(make_config(num_blocks=9)))
    for i, name in enumerate("ab"):
        run.add(make_request(name, [i, *range(29)], 2))
    run.step()
    run.step()
    assert run.scheduler.num_waiting == 1
    run.abort(run.requests[0])
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
    assert scheduler.update(output, [[[5], [6]]]) == [(stays, [6])]
    assert (gone.output_token_ids, stays.output_token_ids) == ([], [6])
    scheduler.check_integrity()


def test_a_later_ending_may_take_tokens_back() -> None:
    """A stop string was found in what the last of several steps brought; here the request had ended by its length."""
    run = Run(Scheduler(make_config(num_scheduler_steps=4, block_size=1)))
    ended, goes_on = (run.add(make_request(name, [i], 5 + i)) for i, name in enumerate("ab"))
    run.step()
    run.step()
    assert (ended.finish_reason, goes_on.finish_reason) == ("length", None)
    for request in (ended, goes_on):
        run.scheduler.finish(request, "stop", "word", keep=3)
        run.scheduler.check_integrity()
        assert (request.finish_reason, request.stop_reason, len(request.output_token_ids)) == ("stop", "word", 3)
        assert request.status is Status.FINISHED
    assert not run.scheduler.has_unfinished


def test_endings() -> None:
    def ending(max_tokens: int, stop: Iterable[int] = NEVER, eos: int | None = None, **params: Any) -> tuple[Any, ...]:
        scheduler = Scheduler(make_config())
        request = make_request("r", range(30), max_tokens, stop, **params)
        if eos is not None:
            request.stop_token_ids |= {eos}
        scheduler.add(request)
        for token in range(100, 200):
            scheduler.update(output := scheduler.schedule(), [[[token] for _ in output.replicas[0]]])
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


def test_tokens_behind_an_end_are_dropped() -> None:
    scheduler = Scheduler(make_config(num_scheduler_steps=4))
    request = make_request("r", [1], 20, [7])
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), [[[5]]])
    assert scheduler.update(scheduler.schedule(), [[[6, 7, 8, 9]]]) == [(request, [6, 7])]
    assert request.output_token_ids == [5, 6, 7] and not scheduler.has_unfinished


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_a_digest_changes_with_the_decision() -> None:
    def decide(change: Callable[[Any], None] = lambda _: None) -> tuple[Any, str]:
        run = Run(Scheduler(make_config(num_blocks=9, swap=SwapConfig(num_blocks=8, mode="swap"))))
        for i, name in enumerate("ab"):
            run.add(make_request(name, [i, *range(10)], 20))
        for _ in range(6):
            run.step()
        output = run.scheduler.schedule()
        assert output.preempted and output.swap_outs
        change(output)
        return output.decision(), output.digest()

    changes: list[Callable[[Any], Any]] = [
        lambda o: setattr(o, "num_steps", 2),
        lambda o: setattr(o, "bucket", 99),
        lambda o: o.preempted.clear(),
        lambda o: o.swap_outs.clear(),
        lambda o: o.swap_ins.append(o.swap_outs[0]),
        lambda o: o.swap_outs.append(o.swap_outs.pop()._replace(handle=99)),
        lambda o: o.swap_outs.append(o.swap_outs.pop()._replace(replica=1)),
        lambda o: o.swap_outs[0].blocks[0].append(3),
        lambda o: o.dropped.append((0, 1)),
        lambda o: o.replicas.append([]),
        lambda o: o.replicas[0].pop(),
        lambda o: o.replicas[0][0].tables[0].append(3),
        *(
            lambda o, name=name: setattr(o.replicas[0][0], name, 99)
            for name in ("start", "count", "slot", "is_new", "samples")
        ),
    ]
    decisions = [decide(), *map(decide, changes)]
    assert decide() == decisions[0] and len(decisions[0][1]) == 32
    assert len({digest for _, digest in decisions}) == len(decisions)
    assert all(decision != decisions[0][0] for decision, _ in decisions[1:])


def test_usage_counts_blocks() -> None:
    run = Run(Scheduler(make_config(num_blocks=11)))
    run.add(make_request("r", range(9), 5))
    run.step()
    assert run.scheduler.kv_usage == pytest.approx(0.3)
    counters = run.scheduler.counters
    assert (counters.live_slots, counters.held_slots, counters.withheld_slots) == (9, 12, 0)


def test_slots_that_nobody_can_use_are_counted() -> None:
    run = Run(Scheduler(make_config(num_blocks=9, max_num_batched_tokens=40)))
    for i, name in enumerate("ab"):
        run.add(make_request(name, [i, *range(19)], 3))
    assert counts(run.step()) == {"a": 20}
    assert run.scheduler.counters.withheld_slots == 3 * 4
    run.finish()


def test_no_slots_are_withheld_once_nobody_waits() -> None:
    run = Run(Scheduler(make_config(num_blocks=9, max_num_batched_tokens=40, num_scheduler_steps=2)))
    for i, name in enumerate("ab"):
        run.add(make_request(name, [i, *range(19)], 9))
    run.step()
    before = run.scheduler.counters.withheld_slots
    assert before and run.scheduler.num_waiting == 1
    run.abort(run.by_name("b"))
    assert run.step().num_steps == 2 and run.scheduler.counters.withheld_slots == before
    run.finish()


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_num_seqs": 0}, ["max_num_seqs=0"]),
        ({"block_size": 2.5}, ["block_size=2.5"]),
        ({"block_size": True}, ["block_size=True"]),
        ({"num_blocks": 1}, ["num_blocks=1"]),
        ({"num_replicas": 0}, ["num_replicas=0"]),
        ({"num_scheduler_steps": 0}, ["num_scheduler_steps=0"]),
        ({"long_prefill_token_threshold": -1}, ["long_prefill_token_threshold=-1"]),
        ({"max_num_partial_prefills": -1}, ["max_num_partial_prefills=-1"]),
        ({"max_num_queued_requests": 0}, ["max_num_queued_requests=0"]),
        ({"max_num_queued_tokens": "9"}, ["max_num_queued_tokens='9'"]),
        ({"policy": "lifo"}, ["scheduling_policy='lifo'", "fcfs, priority, fair"]),
        ({"max_num_batched_tokens": 3}, ["max_num_batched_tokens=3", "max_num_seqs=4"]),
        ({"enable_chunked_prefill": False}, ["enable_chunked_prefill=False", "16 < 40"]),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 40, "long_prefill_token_threshold": 8},
            ["long_prefill_token_threshold=8", "enable_chunked_prefill=False"],
        ),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 40, "policy": "fair"},
            ["scheduling_policy='fair'", "enable_chunked_prefill"],
        ),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SwapConfig(mode="swap"), ["preemption_mode='swap'", "swap_space"]),
        (lambda: SwapConfig(mode="drop"), ["preemption_mode='drop'", "auto, swap or recompute"]),  # pyright: ignore
        (lambda: TenantConfig(weight=0), ["weight=0", "above 0"]),
        (lambda: TenantConfig(max_tokens_per_second=float("inf")), ["max_tokens_per_second=inf"]),
        (lambda: TenantConfig(ttft_target=-1), ["ttft_target=-1"]),
        (lambda: FairnessConfig(slack=0), ["slack=0"]),
        (lambda: FairnessConfig(prompt_token_weight="1"), ["prompt_token_weight='1'"]),  # pyright: ignore
        (lambda: FairnessConfig.of({"slak": 1}), ["fairness option 'slak'", "tenants", "slack"]),
        (lambda: FairnessConfig.of({"tenants": {"a": {"wait": 1}}}), ["tenant option 'wait'", "weight"]),
        (lambda: FairnessConfig.of({"tenants": {"a": 1}}), ["tenant 1", "mapping"]),
    ],
)
def test_shares_that_make_no_sense_are_refused(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_fairness_from_plain_dictionaries() -> None:
    made = FairnessConfig.of({"slack": 3.0, "tenants": {"a": {"weight": 2}, "b": TenantConfig(ttft_target=1.0)}})
    assert made == FairnessConfig({"a": TenantConfig(weight=2), "b": TenantConfig(ttft_target=1.0)}, slack=3.0)
    assert FairnessConfig.of(None) == FairnessConfig() and FairnessConfig.of(made) is made


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


def test_a_step_is_padded_to_the_smallest_bucket_that_has_room() -> None:
    config = make_config(decode_buckets=(1, 2, 4), token_buckets=(8, 16))
    assert [config.bucket(n, True) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5]
    assert [config.bucket(n, False) for n in (1, 8, 9, 17)] == [8, 8, 16, 17]


def test_the_scheduler_does_not_import_jax() -> None:
    code = "import sys, jaxserve.scheduler; print(sorted({'jax', 'jaxlib', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_host_half_does_not_import_jax() -> None:
    modules = "scheduler batch request kv_cache.manager completion engine_args outputs sampling_params logit_edits"
    imports = "; ".join(f"import jaxserve.{module}" for module in modules.split())
    code = f"import sys; {imports}; print(sorted({{'jax', 'jaxlib', 'flax', 'torch', 'orbax'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
