"""Random runs: whatever happens, everybody gets the tokens that they would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from harness import NEVER, VOCABULARY, Run, make_config, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import FairnessConfig, SchedulerConfig, SwapConfig, TenantConfig, decode_buckets, token_buckets
from jaxserve.scheduler import Scheduler

TENANTS = {
    "light": TenantConfig(weight=0.5),
    "heavy": TenantConfig(weight=3.0),
    "hasty": TenantConfig(ttft_target=0.3),
    "": TenantConfig(),
}
CAPPED = TENANTS | {"light": TenantConfig(max_tokens_per_second=25.0)}
LENGTH = 40


@st.composite
def configs(draw: st.DrawFn, policies: Sequence[str] = ("fcfs", "priority", "fair")) -> SchedulerConfig:
    windows = draw(st.sampled_from([(None,), (None,), (5,), (None, 6), (3, None, 9)]))
    chunked = draw(st.integers(0, 5)) > 0
    budget = draw(st.integers(6, 24)) if chunked else LENGTH
    policy = draw(st.sampled_from(policies)) if chunked else draw(st.sampled_from(["fcfs", "priority"]))
    host_blocks = draw(st.sampled_from([0, 0, 16, 60]))
    swap = SwapConfig(
        num_blocks=host_blocks,
        mode=draw(st.sampled_from(["auto", "swap", "recompute"] if host_blocks else ["auto", "recompute"])),
        bytes_per_second=draw(st.sampled_from([0.3, 1.0, 3.0])),
    )
    sizes: dict[str, Any] = {
        "max_model_len": LENGTH,
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": budget,
        "block_size": draw(st.integers(1, 5)),
        "windows": windows,
    }
    roomy = make_config(**sizes, num_blocks=10_000)
    least = max(roomy.most_blocks(window, LENGTH) for window in windows)
    tenants = draw(st.sampled_from([TENANTS, TENANTS, TENANTS, CAPPED]))
    return make_config(
        **sizes,
        num_blocks=1 + least + draw(st.integers(0, 25)),
        enable_chunked_prefill=chunked,
        policy=policy,
        swap=swap,
        fairness=FairnessConfig(tenants, slack=draw(st.sampled_from([1.0, 8.0, 40.0]))),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 3, 8])) if chunked else 0,
        max_num_partial_prefills=draw(st.sampled_from([0, 0, 1, 2])),
        num_scheduler_steps=draw(st.sampled_from([1, 1, 2, 3, 4])),
        enable_prefix_caching=draw(st.integers(0, 4)) > 0,
        keys_depend_on_prompt_length=draw(st.integers(0, 5)) == 0,
        num_replicas=draw(st.sampled_from([1, 1, 1, 2, 3])),
        decode_buckets=draw(st.sampled_from([(), decode_buckets(sizes["max_num_seqs"])])),
        token_buckets=draw(st.sampled_from([(), token_buckets(budget, 8)])),
    )


class Arrival(NamedTuple):
    pause: int
    """Steps since the request before."""
    stem: int
    shared: int
    """Prompt tokens that it has in common with others of the same stem."""
    own: int
    max_tokens: int
    stop: frozenset[int]
    tenant: str
    priority: int
    salt: str | None
    odd: int
    """Which of the rare properties it has."""


class End(NamedTuple):
    pause: int
    request: int
    back: int
    """0: it is aborted; else a stop string is found, of which so many output tokens are not kept."""


arrivals = st.builds(
    Arrival,
    st.sampled_from([0, 0, 0, 1, 2, 6]),
    st.integers(0, 2),
    st.integers(0, 22),
    st.sampled_from([1, 1, 2, 4]),
    st.integers(1, 16),
    st.sampled_from([NEVER, NEVER, frozenset(range(10)), frozenset(range(3, 7))]),
    st.sampled_from(["", "light", "heavy", "hasty"]),
    st.integers(0, 2),
    st.sampled_from([None, None, None, "salt"]),
    st.integers(0, 15),
)
ends = st.builds(End, st.integers(0, 3), st.integers(0, 13), st.sampled_from([0, 0, 1, 2]))
plans = st.lists(st.one_of(arrivals, arrivals, arrivals, arrivals, ends), min_size=1, max_size=30)


def play(config: SchedulerConfig, plan: Sequence[Arrival | End], ahead: bool = False) -> Run:
    """Do what the plan says, then run to the end."""
    run = Run(Scheduler(config), ahead)
    for event in plan:
        for _ in range(event.pause):
            run.step()
        if isinstance(event, Arrival):
            run.add(request_of(event, len(run.requests)))
        elif run.requests:
            run.end(run.requests[event.request % len(run.requests)], event.back)
    run.finish()
    return run


def request_of(a: Arrival, index: int) -> Any:
    prompt = [(a.stem * 17 + 3 * i) % VOCABULARY for i in range(a.shared)]
    prompt += [(index * 7 + i) % VOCABULARY for i in range(a.own)]
    return make_request(
        f"r{index}",
        prompt,
        a.max_tokens,
        a.stop,
        min_tokens=min(3, a.max_tokens) if a.odd == 4 else 0,
        tenant=a.tenant,
        priority=a.priority,
        cache_salt=a.salt,
        adapter="adapter" if a.odd == 0 else None,
        waits_for_tokens=a.odd == 1,
        single_steps=a.odd in (1, 2),
        reads_prefix_cache=a.odd != 3,
    )


def test_every_request_finishes_with_the_tokens_it_would_get_alone() -> None:
    """In step with the device and one step ahead of it; ``harness.Run`` checks everything else that must hold."""
    steps = 0

    @settings(max_examples=1000)
    @given(configs(), plans, st.booleans())
    def check(config: SchedulerConfig, plan: Sequence[Arrival | End], ahead: bool) -> None:
        nonlocal steps
        steps += play(config, plan, ahead).num_steps

    check()
    assert steps >= 10_000


@settings(max_examples=30)
@given(configs(), plans, st.booleans())
def test_the_same_calls_give_the_same_decisions(config: Any, plan: Any, ahead: bool) -> None:
    runs = [play(config, plan, ahead) for _ in range(2)]
    assert runs[0].decisions == runs[1].decisions
    assert runs[0].digests == runs[1].digests
    by_digest = dict(zip(runs[0].digests, runs[0].decisions, strict=True))
    assert all(by_digest[a] == b for a, b in zip(runs[0].digests, runs[0].decisions, strict=True))
