"""The fair policy: who gets how much, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

import pytest
from harness import Run, counts, make_config, make_request, names_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import FairnessConfig, SwapConfig, TenantConfig
from jaxserve.scheduler import Scheduler, SchedulerOutput
from jaxserve.scheduler.fair import Fair, Share, fill


class Service:
    """A scheduler under the fair policy, driven by a model that always says the same."""

    def __init__(self, tenants: dict[str, TenantConfig] | None = None, fairness: Any = None, **changes: Any) -> None:
        sizes: dict[str, Any] = {"max_model_len": 512, "block_size": 16, "num_blocks": 2000}
        config = make_config(
            policy="fair",
            enable_prefix_caching=False,
            fairness=FairnessConfig(tenants or {}, **fairness or {}),
            **sizes | changes,
        )
        self.scheduler, self.now, self.num_requests = Scheduler(config), 0.0, 0
        policy = self.scheduler.replicas[0].policy
        assert isinstance(policy, Fair)
        self.policy = policy

    def add(self, tenant: str, prompt: int, max_tokens: int, **fields: Any) -> Any:
        self.num_requests += 1
        name = f"{tenant}{self.num_requests}"
        request = make_request(name, [1] * prompt, max_tokens, tenant=tenant, arrival_time=self.now, **fields)
        self.scheduler.add(request)
        return request

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule(self.now)
        self.scheduler.update(output, [[[1] * s.samples for s in rows] for rows in output.replicas])
        self.now += 0.1
        return output

    def num_waiting(self, tenant: str) -> int:
        replica = self.scheduler.replicas[0]
        return sum(r.tenant == tenant for queue in (replica.waiting, replica.swapped) for r in queue)

    def keep_waiting(self, tenant: str, count: int, draw: Random, prompt: int = 300, output: int = 120) -> None:
        """Requests of random size, so many that ``count`` wait."""
        while self.num_waiting(tenant) < count:
            self.add(tenant, draw.randint(1, prompt), draw.randint(1, output))

    def service(self, tenant: str) -> float:
        account = self.policy.tenant(tenant)
        return account.counter * account.config.weight


@pytest.mark.parametrize(("seqs", "budget"), [(2, 16), (4, 16), (8, 64), (16, 256), (64, 512)])
def test_service_is_in_proportion_to_weights(seqs: int, budget: int) -> None:
    """Of two tenants that always wait, over any 2000 tokens: 3 to 1, give or take 5 %."""
    service, draw = (
        Service({"b": TenantConfig(weight=3.0)}, max_num_seqs=seqs, max_num_batched_tokens=budget),
        Random(7),
    )
    tokens, history = 0, list[tuple[int, float, float]]()
    while tokens < 12_000:
        for tenant in "ab":
            service.keep_waiting(tenant, seqs, draw)
        tokens += sum(counts(service.step()).values())
        history.append((tokens, service.service("a"), service.service("b")))
    ratios, later = [], iter(history)
    end = next(later)
    for start in history[2:]:
        while end[0] < start[0] + 2000:
            if (end := next(later, (0, 0.0, 0.0)))[0] == 0:
                assert ratios and 2.85 < min(ratios) <= max(ratios) < 3.15
                return
        ratios.append((end[2] - start[2]) / (end[1] - start[1]))


tenant_configs = st.builds(
    TenantConfig,
    weight=st.sampled_from([0.25, 0.5, 1.0, 1.0, 2.0, 4.0]),
    ttft_target=st.sampled_from([None, None, 0.5]),
)


@settings(max_examples=100)
@given(
    st.lists(tenant_configs, min_size=2, max_size=5),
    st.sampled_from([(1.0, 2.0), (1.0, 1.0), (1.0, 5.0), (3.0, 1.0)]),
    st.sampled_from([1.0, 8.0, 30.0]),
    st.tuples(
        st.integers(1, 8),
        st.integers(0, 40),
        st.integers(1, 8),
        st.sampled_from([0.0, 0.5, 1.0, 8.0]),
        st.sampled_from([1, 3]),
    ),
    st.sampled_from([0, 40]),
    st.integers(0, 2**32),
)
def test_nobody_gets_far_ahead_of_one_that_waits(
    tenants: Any, token_weights: Any, slack: float, sizes: Any, host_blocks: int, seed: int
) -> None:
    """The bounds that ``jaxserve.scheduler.fair`` states, whatever is asked for, with enough blocks and with few."""
    seqs, budget, block_size, roominess, several = sizes
    names, draw = [str(i) for i in range(len(tenants))], Random(seed)
    prompt_weight, output_weight = token_weights
    one = -(-60 // block_size)
    service = Service(
        dict(zip(names, tenants, strict=True)),
        {"prompt_token_weight": prompt_weight, "output_token_weight": output_weight, "slack": slack},
        max_model_len=60,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + budget,
        block_size=block_size,
        num_blocks=1 + one + int(roominess * one),
        num_scheduler_steps=several,
        swap=SwapConfig(num_blocks=host_blocks),
    )
    most = max(token_weights) * (seqs + budget + seqs * several)
    running = 0.0 if roominess == 8.0 else max(token_weights) * seqs * 60
    rates = dict.fromkeys(names, 0.5)
    for _ in range(60):
        for name in names:
            if draw.random() < 0.05:
                rates[name] = draw.choice([0.0, 0.0, 0.1, 1.0, 2.0])
            for _ in range(int(rates[name] + draw.random())):
                if service.scheduler.num_waiting < 40:
                    service.add(name, draw.randint(1, 45), draw.randint(1, 15))
        waited = [name for name in names if service.num_waiting(name)]
        service.step()
        service.scheduler.check_integrity()
        for name in (n for n in waited if service.num_waiting(n)):
            behind = service.policy.tenant(name)
            for other in map(service.policy.tenant, names):
                weight = min(behind.config.weight, other.config.weight)
                bound = 2 * slack + 2 * most / weight + running / other.config.weight
                assert other.counter - behind.counter <= bound


@pytest.mark.parametrize(("seqs", "budget"), [(1, 8), (4, 16), (8, 64), (64, 512)])
@pytest.mark.parametrize("num_blocks", [2000, 512])
def test_a_flood_does_not_keep_a_polite_tenant_waiting(seqs: int, budget: int, num_blocks: int) -> None:
    """Its requests are short and rare. The flood has all slots, and waits for more."""

    def median_steps(flood: bool) -> float:
        service, draw = Service(max_num_seqs=seqs, max_num_batched_tokens=budget, num_blocks=num_blocks), Random(3)
        polite, entered = list[Any](), dict[str, int]()
        for step in range(400):
            if flood:
                service.keep_waiting("flood", 2 * seqs, draw)
            if step >= 40 and step % 40 == 0:
                polite.append((step, service.add("polite", draw.randint(1, budget), 5)))
            for row in service.step().replicas[0]:
                if row.samples:
                    entered.setdefault(row.request.request_id, step)
        return median(entered[request.request_id] - step for step, request in polite)

    assert median_steps(flood=True) <= median_steps(flood=False) + 1


@pytest.mark.parametrize("several", [1, 4])
def test_being_away_earns_no_credit(several: int) -> None:
    """Who comes back gets its share from then on, not what it might have had."""
    service, draw = Service(max_num_seqs=2, num_scheduler_steps=several), Random(1)
    first = service.add("a", 5, 400)
    for _ in range(120 // several):
        service.step()
    before = len(first.output_token_ids)
    for _ in range(50):
        service.keep_waiting("b", 2, draw, output=20)
        service.step()
    assert len(first.output_token_ids) - before >= 45
    for name in "abab":
        service.keep_waiting(name, 3, draw)
        assert service.policy.tenant("b").counter >= service.policy.tenant("a").counter - 60


def test_who_pauses_starts_at_the_level_of_those_that_wait() -> None:
    service, draw = Service(), Random(1)
    for step in range(120):
        service.keep_waiting("a", 3, draw)
        service.keep_waiting("b", 3 if step < 20 else 0, draw, prompt=20, output=5)
        service.step()
    levels = [service.policy.tenant(name).counter for name in "ab"]
    service.add("b", 10, 5)
    assert levels[1] < levels[0] - 100 and service.policy.tenant("b").counter == levels[0]


def test_rate_caps() -> None:
    """Tokens per second; what was not used adds up for a second."""
    service, tokens = Service({"slow": TenantConfig(max_tokens_per_second=20.0)}), list[int]()
    for _ in range(60):
        for tenant in ("slow", "quick"):
            service.keep_waiting(tenant, 4, Random(1))
        tokens.append(sum(s.count for s in service.step().replicas[0] if s.request.tenant == "slow"))
    assert all(sum(tokens[a:b]) <= 20 + 2 * (b - a) for a in range(60) for b in range(a, 61))
    assert sum(tokens) >= 20 + 2 * 59 - 2
    assert service.policy.tenant("quick").counter > 200


def test_a_cap_empties_steps_until_the_clock_moves() -> None:
    service = Service({"slow": TenantConfig(max_tokens_per_second=4.0)})
    request = service.add("slow", 10, 3)
    scheduled = []
    for now in (0.0, 0.0, 0.1, 0.5, 0.5, 9.0, 9.0, 10.0, 11.0):
        service.now = now
        scheduled.append(sum(counts(service.step()).values()))
    assert scheduled[:5] == [4, 0, 0, 2, 0] and request.finish_reason == "length"
    assert sum(scheduled) == 12  # the third output token ends the request, and is not computed


def test_a_late_tenant_goes_first_within_the_slack() -> None:
    def order(ahead_by: float, waited: float) -> list[str]:
        service = Service({"hasty": TenantConfig(ttft_target=0.5)}, max_num_seqs=1)
        service.add("hasty", 1, 1)
        service.add("other", 1, 1)
        service.policy.tenant("hasty").counter = ahead_by
        service.now = waited
        return [name for _ in range(2) for name in counts(service.step())]

    assert order(0.0, 0.0)[0] == "hasty1"
    assert order(7.0, 0.4)[0] == "other2"
    assert order(7.0, 0.6)[0] == "hasty1"
    assert order(9.0, 0.6)[0] == "other2"


def test_a_newcomer_takes_a_slot_at_once_but_two_do_not_take_turns() -> None:
    service, draw = Service(max_num_seqs=1), Random(1)
    service.keep_waiting("a", 2, draw, output=400)
    service.step()
    service.step()
    newcomer = service.add("b", 40, 200)
    assert names_of(service.step().preempted) == ["a1"] and newcomer.slot is not None
    preemptions = [len(service.step().preempted) for _ in range(100)]
    assert 0 < sum(preemptions) < 20
    assert not any(a and b for a, b in pairwise(preemptions))


def test_who_was_made_room_for_enters_and_not_another_of_the_one_that_gave_way() -> None:
    service = Service(max_num_seqs=1)
    service.add("a", 1, 20, priority=1)
    service.step()
    service.add("a", 1, 20, priority=0)
    service.add("b", 1, 20)
    assert list(counts(service.step())) == ["b3"]


def test_who_was_preempted_has_no_share_of_the_step() -> None:
    service = Service(max_num_batched_tokens=16, block_size=4, num_blocks=9, max_model_len=32)
    for _ in range(2):
        service.add("a", 10, 10)
    for _ in range(4):
        service.step()
    service.add("b", 16, 3)
    output = service.step()
    assert names_of(output.preempted) == ["a2"] and counts(output) == {"a1": 1, "b3": 15}


def test_work_done_twice_is_charged_once() -> None:
    run = Run(Scheduler(make_config(policy="fair", num_blocks=9, enable_prefix_caching=False)))
    for name in "ab":
        run.add(make_request(name, range(11), 20, tenant=name))
    run.finish()
    assert run.scheduler.counters.num_preemptions
    policy = run.scheduler.replicas[0].policy
    assert isinstance(policy, Fair)
    assert [policy.tenant(name).counter for name in "ab"] == [11 + 2 * 20] * 2


def test_cached_tokens_are_not_charged() -> None:
    run = Run(Scheduler(make_config(policy="fair")))
    for name in "ab":
        run.add(make_request(name, range(11), 1, tenant=name))
        run.finish()
    policy = run.scheduler.replicas[0].policy
    assert isinstance(policy, Fair)
    assert [policy.tenant(name).counter for name in "ab"] == [11 + 2, 3 + 2]


def test_steps_are_full_also_of_short_prompts() -> None:
    service = Service(max_num_seqs=16, max_num_batched_tokens=16)
    for _ in range(20):
        service.add("a", 2, 9)
    assert sum(counts(service.step()).values()) == 16


# -- fill --------------------------------------------------------------------------------------------------------------

shares = st.builds(
    Share,
    position=st.integers(0, 20).map(float),
    weight=st.sampled_from([0.5, 1.0, 2.0]),
    decodes=st.integers(0, 4),
    prefill=st.integers(0, 12),
    decode_cost=st.just(2.0),
    prefill_cost=st.just(1.0),
    waits=st.booleans(),
    headroom=st.sampled_from([1.0, 5.0, 30.0]),
)


def spread(services: Sequence[float], among: Sequence[Share]) -> float:
    """Tokens that the services are worth."""
    return sum(s.tokens(s.position + service / s.weight) for s, service in zip(among, services, strict=True))


@given(st.lists(shares, max_size=5), st.integers(0, 30))
def test_fill_keeps_to_the_budget_and_rises_with_it(among: list[Share], budget: int) -> None:
    less, more = fill(among, budget), fill(among, budget + 3)
    assert spread(less, among) <= budget + 1e-6
    assert all(0 <= a <= b + 1e-6 for a, b in zip(less, more, strict=True))
    assert all(a <= (s.saturation - s.position) * s.weight + 1e-9 for a, s in zip(less, among, strict=True))


@settings(max_examples=100)
@given(st.lists(shares, min_size=1, max_size=4), st.integers(1, 30))
def test_fill_equals_filling_drop_by_drop(among: list[Share], budget: int) -> None:
    """A drop at a time for who stands lowest, until nobody may have more."""
    drop = 1 / 64
    ceiling = min((s.saturation for s in among if s.waits), default=math.inf)
    tops = [min(s.saturation, ceiling + s.headroom) for s in among]
    levels = [s.position for s in among]
    left = float(budget)
    while left > 0:
        open_ = [i for i, top in enumerate(tops) if levels[i] < top - 1e-9]
        if not open_:
            break
        lowest = min(open_, key=lambda i: levels[i])
        left -= among[lowest].tokens(levels[lowest] + drop) - among[lowest].tokens(levels[lowest])
        levels[lowest] += drop
    filled = fill(among, budget)
    for s, level, service in zip(among, levels, filled, strict=True):
        assert service == pytest.approx(max(0.0, level - s.position) * s.weight, abs=0.25)


def test_who_waits_holds_back_who_is_ahead() -> None:
    def share(position: float, prefill: int, waits: bool) -> Share:
        return Share(position, 1.0, 0, prefill, 2.0, 1.0, waits, headroom=8.0)

    assert fill([share(0, 100, True), share(10, 100, True)], 50) == pytest.approx([30, 20])
    assert fill([share(0, 5, True), share(10, 100, True)], 50) == pytest.approx([5, 3])
    assert fill([share(0, 5, True), share(20, 100, True)], 50) == pytest.approx([5, 0])
    assert fill([share(0, 5, False), share(20, 100, True)], 50) == pytest.approx([5, 45])
    assert fill([], 50) == []
