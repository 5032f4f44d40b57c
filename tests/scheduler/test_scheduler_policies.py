"""Who goes first, and how prompts are cut."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Run, counts, make_config, make_request, names_of
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import FairnessConfig, TenantConfig
from jaxserve.request import Status
from jaxserve.scheduler import Scheduler


def run_with(*requests: tuple[str, int, int], ahead: bool = False, **changes: Any) -> Run:
    """Requests are (name, prompt tokens, max_tokens)."""
    run = Run(Scheduler(make_config(**{"enable_prefix_caching": False} | changes)), ahead)
    add(run, *requests)
    return run


def add(run: Run, *requests: tuple[str, int, int], **fields: Any) -> None:
    for name, prompt, max_tokens in requests:
        run.add(make_request(name, range(prompt), max_tokens, **fields))


# -- first come, first served ------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 25), st.integers(1, 14)), min_size=2, max_size=14),
    st.integers(1, 6),
    st.integers(6, 24),
    st.booleans(),
)
def test_first_tokens_come_in_the_order_of_arrival(plan: Any, seqs: int, tokens: int, ahead: bool) -> None:
    run = run_with(num_blocks=300, max_num_seqs=seqs, max_num_batched_tokens=tokens, ahead=ahead)
    for i, (pause, prompt, max_tokens) in enumerate(plan):
        for _ in range(pause):
            run.step()
        add(run, (f"r{i}", prompt, max_tokens))
    run.finish()
    assert not any(r.metrics.num_preemptions for r in run.requests)
    steps = [run.first_steps[r.request_id] for r in run.requests]
    assert steps == sorted(steps)


def test_a_request_enters_the_step_after_one_ends() -> None:
    run = run_with(("a", 2, 2), ("b", 2, 9), ("c", 2, 1), ("d", 2, 1), ("e", 2, 1), max_num_seqs=2)
    names = [list(counts(run.step())) for _ in range(6)]
    assert names == [["a", "b"], ["a", "b"], ["b", "c"], ["b", "d"], ["b", "e"], ["b"]]
    assert run.by_name("c").slot is None


def test_one_step_ahead_the_last_token_is_not_scheduled_twice() -> None:
    run = run_with(("a", 2, 3), ("b", 2, 5), ahead=True)
    assert [list(counts(run.step())) for _ in range(6)] == [["a", "b"]] * 3 + [["b"]] * 2 + [[]]


def test_who_waits_for_tokens_is_left_out_while_one_is_in_flight() -> None:
    run = run_with(("a", 2, 9), ahead=True)
    run.add(make_request("b", [1], 3, waits_for_tokens=True, single_steps=True))
    assert [list(counts(run.step())) for _ in range(5)] == [["a", "b"], ["a"], ["a", "b"], ["a"], ["a", "b"]]


def test_several_steps_in_one() -> None:
    run = run_with(("a", 2, 9), ("b", 2, 6), num_scheduler_steps=4)
    outputs = [run.step() for _ in range(3)]
    assert [(o.num_steps, o.num_rows, counts(o)) for o in outputs] == [
        (1, 4, {"a": 2, "b": 2}),
        (4, 2, {"a": 4, "b": 4}),
        (4, 2, {"a": 4, "b": 1}),
    ]
    assert all(o.one_token_each for o in outputs[1:]) and not outputs[0].one_token_each
    add(run, ("c", 2, 9))
    assert run.step().num_steps == 1
    assert run.step().num_steps == 4
    run.add(make_request("d", [1], 5, single_steps=True))
    assert [run.step().num_steps for _ in range(4)] == [1] * 4
    run.finish()


# -- priority ----------------------------------------------------------------------------------------------------------


def test_lower_numbers_go_first() -> None:
    run = run_with(policy="priority", max_num_seqs=2)
    for name, priority in (("a", 5), ("b", 5), ("c", -1), ("d", 0), ("e", 5)):
        add(run, (name, 2, 1), priority=priority)
    assert [list(counts(run.step())) for _ in range(3)] == [["c", "d"], ["a", "b"], ["e"]]


def test_a_waiting_request_displaces_running_ones_of_higher_number() -> None:
    run = run_with(policy="priority", max_num_seqs=2)
    add(run, ("a", 2, 9), priority=1)
    add(run, ("b", 2, 9), priority=2)
    run.step()
    add(run, ("equal", 2, 2), priority=2)
    assert (output := run.step()) and not output.preempted
    add(run, ("c", 2, 2), priority=1)
    output = run.step()
    assert names_of(output.preempted) == ["b"] and list(counts(output)) == ["a", "c"]
    add(run, ("d", 2, 2), priority=0)
    output = run.step()
    assert names_of(output.preempted) == ["c"] and list(counts(output)) == ["a", "d"]  # c came after a
    run.finish()
    assert run.first_steps["c"] < run.first_steps["equal"]


def test_who_came_back_is_not_displaced_before_it_has_made_progress() -> None:
    run = run_with(policy="priority", max_num_seqs=1)
    add(run, ("low", 28, 9), priority=1)
    run.step()
    run.step()
    for name in ("first", "second"):
        add(run, (name, 2, 1), priority=0)
        assert names_of(run.step().preempted) == ["low"]
        assert counts(run.step()) == {"low": 16}
        add(run, (f"{name} again", 2, 1), priority=0)
        output = run.step()
        assert not output.preempted and list(counts(output)) == ["low"]
        assert list(counts(run.step())) == [f"{name} again"]
        assert counts(run.step()) == {"low": 16}
        assert list(counts(run.step())) == ["low"]
    run.finish()


def test_displacing_for_want_of_blocks_takes_no_more_than_it_needs() -> None:
    run = run_with(policy="priority", num_blocks=13, max_num_batched_tokens=40)
    for i, name in enumerate("abc"):
        add(run, (name, 15, 9), priority=2 + i)
    run.step()
    add(run, ("high", 20, 9), priority=0)
    assert names_of(run.step().preempted) == ["c", "b"]
    run.finish()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 12)), min_size=2, max_size=12))
def test_no_request_waits_for_a_slot_while_one_of_higher_number_runs(plan: Any) -> None:
    """One makes room in each step."""
    run = run_with(policy="priority", max_num_seqs=2, num_blocks=100)
    for i, (pause, priority, max_tokens) in enumerate(plan):
        for quiet in range(1, pause + 1):
            run.step()
            (replica,) = run.scheduler.replicas
            first = min((r.priority for r in replica.waiting), default=99)
            assert sum(r.priority > first for r in replica.running) <= max(0, 2 - quiet)
        add(run, (f"r{i}", 2, max_tokens), priority=priority)
    run.finish()


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_decodes_then_running_prompts_then_waiting_ones() -> None:
    run = run_with(("a", 1, 30), ("b", 1, 30), ("c", 30, 2), ("d", 10, 2))
    assert counts(run.step()) == {"a": 1, "b": 1, "c": 14}
    assert counts(run.step()) == {"a": 1, "b": 1, "c": 14}
    assert counts(run.step()) == {"a": 1, "b": 1, "c": 2, "d": 10}


def test_a_prompt_goes_in_one_chunk_unless_others_decode() -> None:
    run = run_with(("a", 14, 4), long_prefill_token_threshold=5)
    assert counts(run.step()) == {"a": 14}
    add(run, ("b", 12, 2), ("c", 3, 2))
    assert counts(run.step()) == {"a": 1, "b": 5, "c": 3}
    assert counts(run.step()) == {"a": 1, "b": 5, "c": 1}
    run.abort(run.by_name("a"))
    run.abort(run.by_name("c"))
    assert counts(run.step()) == {"b": 2}
    add(run, ("d", 16, 2))
    assert counts(run.step()) == {"b": 1, "d": 5}
    assert counts(run.step()) == {"d": 11}  # nobody decodes any more
    run.finish()


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_short_prompts_pass_a_long_one_that_the_cap_holds(policy: str) -> None:
    run = run_with(("a", 30, 2), max_num_partial_prefills=1, max_num_batched_tokens=24, policy=policy)
    assert counts(run.step()) == {"a": 24}
    add(run, ("b", 25, 2), ("c", 4, 2), ("d", 30, 2), ("e", 5, 2))
    assert counts(run.step()) == {"a": 6, "b": 18}
    assert counts(run.step()) == {"a": 1, "b": 7, "c": 4, "d": 12}
    run.finish()


def test_the_cap_counts_a_prompt_of_which_one_token_is_left() -> None:
    run = run_with(("z", 1, 9), max_num_partial_prefills=1, long_prefill_token_threshold=5)
    run.step()
    add(run, ("a", 6, 2), ("b", 7, 2), ("c", 3, 2))
    assert counts(run.step()) == {"z": 1, "a": 5, "c": 3}
    assert counts(run.step()) == {"z": 1, "a": 1, "c": 1, "b": 5}


def test_without_chunks_a_prompt_is_computed_at_once() -> None:
    run = run_with(("a", 30, 3), ("b", 15, 3), ("c", 5, 3), enable_chunked_prefill=False, max_num_batched_tokens=40)
    assert counts(run.step()) == {"a": 30}  # b does not fit, and c does not overtake it
    assert counts(run.step()) == {"a": 1, "b": 15, "c": 5}
    run.finish()


def test_a_capped_tenant_does_not_stop_the_others() -> None:
    fairness = FairnessConfig({"slow": TenantConfig(max_tokens_per_second=2.0)})
    run = run_with(policy="fair", fairness=fairness)
    add(run, ("s", 10, 2), tenant="slow")
    add(run, ("a", 10, 2), tenant="")
    assert counts(run.step()) == {"s": 2, "a": 10}
    assert run.by_name("s").status is Status.RUNNING
    run.finish()
