"""What a caller of ``LLM`` sees of the scheduler: prefixes found, priorities, tenants, rejection, recordings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import PROMPT, SMALL, one, run, tokens_of

from jaxserve import LLM, SamplingParams
from jaxserve.config import SchedulerConfig
from jaxserve.engine_args import EngineArgs
from jaxserve.recording import Recording, replay
from jaxserve.request import Request
from jaxserve.scheduler import Policy, QueueFullError

MakeLLM = Callable[..., LLM]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = list(range(1, 42))


def test_what_was_found_is_reported_and_not_computed(tiny_llm: LLM) -> None:
    tiny_llm.reset_prefix_cache()
    first = run(tiny_llm, [LONG], GREEDY)[0]
    before = tiny_llm.get_metrics().snapshot()
    again = run(tiny_llm, [LONG], GREEDY)[0]
    after = tiny_llm.get_metrics()
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 40)
    assert after.num_prompt_tokens - before.num_prompt_tokens == 1
    assert tokens_of([first]) == tokens_of([again])


def test_generated_tokens_are_found_by_the_next_turn(tiny_llm: LLM) -> None:
    tiny_llm.reset_prefix_cache()
    answer = one(tiny_llm, LONG, temperature=0, max_tokens=20, ignore_eos=True).token_ids
    assert run(tiny_llm, [[*LONG, *answer, 7]], GREEDY)[0].num_cached_tokens == 60


def test_completions_of_one_prompt_share_it(tiny_llm: LLM) -> None:
    tiny_llm.reset_prefix_cache()
    before = tiny_llm.get_metrics().snapshot()
    run(tiny_llm, [LONG], SamplingParams(n=4, seed=1, max_tokens=3, ignore_eos=True))
    assert tiny_llm.get_metrics().num_prompt_tokens - before.num_prompt_tokens == 41 + 3


def test_forgetting_prefixes(tiny_llm: LLM) -> None:
    run(tiny_llm, [LONG], GREEDY)
    assert tiny_llm.reset_prefix_cache() is True
    assert run(tiny_llm, [LONG], GREEDY)[0].num_cached_tokens == 0


def test_salted_prompts_share_with_their_own_salt_only(tiny_llm: LLM) -> None:
    tiny_llm.reset_prefix_cache()

    def cached(salt: str | None) -> int:
        prompt: dict[str, Any] = {"prompt_token_ids": LONG} | ({} if salt is None else {"cache_salt": salt})
        return run(tiny_llm, prompt, GREEDY)[0].num_cached_tokens

    assert [cached(s) for s in (None, "a", "b", "a", None)] == [0, 0, 0, 40, 40]
    with pytest.raises(ValueError, match="cache_salt"):
        cached("")


def test_prompts_whose_every_position_is_wanted_are_computed(tiny_llm: LLM) -> None:
    run(tiny_llm, [LONG], GREEDY)
    output = run(tiny_llm, [LONG], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0))[0]
    assert output.num_cached_tokens == 0
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(LONG)


def order(llm: LLM, **arguments: Any) -> list[int]:
    """Which of six prompts get their first token in which order."""
    outputs = llm.generate([[i + 1] * 30 for i in range(6)], GREEDY, use_tqdm=False, **arguments)
    times = [o.metrics.first_token_time for o in outputs if o.metrics]
    return sorted(range(6), key=lambda i: times[i] or 0.0)


def test_priorities(make_llm: MakeLLM, tiny_model: Path) -> None:
    llm = make_llm(tiny_model, scheduling_policy="priority", max_num_seqs=1, decode_buckets=(1,))
    assert order(llm) == [0, 1, 2, 3, 4, 5]
    assert order(llm, priority=[3, 0, 2, 2, -1, 0]) == [4, 1, 5, 2, 3, 0]
    assert order(llm, priority=7) == [0, 1, 2, 3, 4, 5]


def test_tenants_take_turns(make_llm: MakeLLM, tiny_model: Path) -> None:
    fairness = {"tenants": {"b": {"weight": 4.0}}}
    llm = LLM(
        tiny_model,
        scheduling_policy="fair",
        fairness=fairness,
        use_tqdm_on_load=False,
        **(SMALL | {"max_num_seqs": 1, "decode_buckets": (1,)}),
    )
    turns = order(llm, tenant=list("aaabbb"))
    assert turns.index(3) <= 1 and turns.index(4) <= 2  # b's are not behind all of a's
    assert llm.engine.scheduler.config.fairness.tenants["b"].weight == 4.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"priority": [1]}, ["1 priority", "2 prompts"]),
        ({"priority": ["high", 1]}, ["priority", "'high'", "int"]),
        ({"tenant": ["a"] * 3}, ["3 tenant", "2 prompts"]),
        ({"tenant": 5}, ["tenant", "5", "str"]),
    ],
)
def test_bad_arguments_of_generate(tiny_llm: LLM, arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        tiny_llm.generate([PROMPT, PROMPT], GREEDY, use_tqdm=False, **arguments)
    assert all(word in str(error.value) for word in words)


def test_what_the_queue_has_no_room_for_is_rejected(make_llm: MakeLLM, tiny_model: Path) -> None:
    llm = make_llm(tiny_model, max_num_queued_requests=3)
    with pytest.raises(QueueFullError, match="max_num_queued_requests=3"):
        llm.generate([PROMPT] * 4, GREEDY, use_tqdm=False)
    assert llm.get_metrics().scheduler.num_rejected == 1
    assert len(run(llm, [PROMPT] * 3, GREEDY)) == 3


class LastComeFirstServed(Policy):
    """A policy of one's own."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    def key(self, request: Request) -> tuple[Any, ...]:
        return (-request.arrival,)


def test_a_policy_of_ones_own(make_llm: MakeLLM, tiny_model: Path) -> None:
    name = f"{__name__}:LastComeFirstServed"
    llm = make_llm(tiny_model, scheduling_policy=name, max_num_seqs=1, decode_buckets=(1,))
    assert order(llm) == [5, 4, 3, 2, 1, 0]
    for wrong in ("nowhere:Policy", f"{__name__}:Missing", "json:loads", "pathlib:Path"):
        with pytest.raises(ValueError, match="scheduling_policy"):
            make_llm(tiny_model, scheduling_policy=wrong)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_recording_replays(tiny_model: Path, tmp_path: Path, async_scheduling: bool) -> None:
    path = tmp_path / "run.rec"
    llm = LLM(
        tiny_model,
        record=path,
        async_scheduling=async_scheduling,
        use_tqdm_on_load=False,
        max_model_len=64,
        max_num_seqs=4,
        decode_buckets=(4,),
        max_num_batched_tokens=32,
        token_buckets=(32,),
        block_size=4,
        num_gpu_blocks_override=20,
    )
    texts = run(llm, [[i + 1] * 9 for i in range(8)], SamplingParams(seed=3, max_tokens=30, stop=["e", "a"]))
    stream = llm.stream([PROMPT, LONG], GREEDY)
    next(stream)
    stream.close()
    assert {o.outputs[0].finish_reason for o in texts} == {"stop", "length"}
    recording = Recording(path)
    result = replay(recording)
    assert result.difference is None
    assert result.num_requests == 10 and result.num_steps == llm.get_metrics().num_steps
    assert llm.get_metrics().num_preemptions > 0
    assert recording.options["block_size"] == 4


def test_options_as_json() -> None:
    args = EngineArgs.of("demo", fairness={"slack": 3}, decode_buckets=(1, 4), mesh="tp=2", record=Path("x.rec"))
    wanted = {"model": "demo", "fairness": {"slack": 3}, "decode_buckets": [1, 4], "mesh": "tp=2", "record": "x.rec"}
    assert args.as_json() == json.loads(json.dumps(wanted))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheduling_policy": "lottery"}, ["scheduling_policy='lottery'", "fcfs, priority, fair"]),
        ({"fairness": {"weights": {}}}, ["fairness", "'weights'", "slack"]),
        ({"fairness": {"tenants": {"a": {"weight": 0}}}}, ["weight=0"]),
        ({"preemption_mode": "drop"}, ["preemption_mode='drop'", "auto, swap or recompute"]),
        ({"preemption_mode": "swap"}, ["preemption_mode='swap'", "swap_space"]),
        ({"swap_space": -1}, ["swap_space=-1"]),
        ({"num_scheduler_steps": 0}, ["num_scheduler_steps=0"]),
        ({"long_prefill_token_threshold": -1}, ["long_prefill_token_threshold=-1"]),
        ({"max_num_queued_tokens": 0}, ["max_num_queued_tokens=0"]),
        ({"record": "no/such/place/file"}, ["record=", "no/such/place"]),
    ],
)
def test_options_that_make_no_sense(tiny_model: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        LLM(tiny_model, use_tqdm_on_load=False, max_model_len=64, **options)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
