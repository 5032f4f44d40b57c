"""Service in proportion to weights, among tenants that share an engine.

Each tenant has a counter: service (prompt and output tokens, each with its weight) divided by the tenant's weight.
The idea, and the name virtual token counter, are from Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024). There, counters decide who is admitted, and two tenants may drift apart by as much as the cache holds.
Here each step's tokens are shared out as well: counters are filled like vessels to one level, and while a tenant
waits for more than it can get, nobody is raised far above it: those that wait too by ``slack``, those that do not by
one step's service on top, which they are given first. So, while tenant i waits, for every other tenant j

    counter_j - counter_i <= 2 * slack + 2 * C / min(weight_i, weight_j)

where C = max(prompt_token_weight, output_token_weight) * (max_num_batched_tokens + max_num_seqs *
num_scheduler_steps) bounds the service of one step: once for the head start of those that do not wait, once for a step
that could not use what it was given. It is for limits that can be shared out. Where i waits for blocks that others
hold, j may in addition be given what its running requests need to their end; where i waits for its own rate cap, or
for prompts that were begun (max_num_partial_prefills), there is no bound.
Between two tenants that both go on waiting, and whose blocks fit, the difference stays at about ``slack``. The
service per weight of an interval differs by at most twice the difference of the counters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.config import FairnessConfig, TenantConfig
from jaxserve.request import Request
from jaxserve.scheduler.policy import Demand, Policy


@dataclass
class Tenant:
    """One tenant's account."""

    config: TenantConfig
    counter: float = 0.0
    """Service per weight, so far."""
    head_start: float = 0.0
    """By how much its counter is taken for lower when it is ranked."""
    quota: float = 0.0
    """Service that is left of the current step's share."""
    tokens_available: float = 0.0
    """Under a rate cap: tokens that may be computed now."""
    refilled_at: float | None = None

    @property
    def position(self) -> float:
        return self.counter - self.head_start


@dataclass(frozen=True)
class Share:
    """What one tenant could use of a step, for ``fill``."""

    position: float
    weight: float
    decodes: int
    prefill: int
    decode_cost: float
    prefill_cost: float
    waits: bool
    """Whether it would wait for more than that."""
    headroom: float
    """How far above those that wait it may be raised."""

    @property
    def saturation(self) -> float:
        """The level at which it has all that it could use."""
        return self.position + (self.decodes * self.decode_cost + self.prefill * self.prefill_cost) / self.weight

    def service(self, level: float) -> float:
        """Service that raises it to ``level``, as far as it could use that."""
        return max(0.0, min(level, self.saturation) - self.position) * self.weight

    def tokens(self, level: float) -> float:
        """Tokens of that service, decodes first."""
        service = self.service(level)
        decoded = min(service, self.decodes * self.decode_cost)
        return decoded / self.decode_cost + (service - decoded) / self.prefill_cost


def fill(shares: Sequence[Share], budget: float) -> list[float]:
    """Service of each share: all are raised to one level, with ``budget`` tokens in all, but nobody by more than its
    headroom above one that waits and could not use more."""
    ceiling = min((s.saturation for s in shares if s.waits), default=math.inf)
    tops = [min(s.saturation, ceiling + s.headroom) for s in shares]

    def tokens(level: float) -> float:
        return sum(s.tokens(min(level, top)) for s, top in zip(shares, tops, strict=True))

    low, high = min((s.position for s in shares), default=0.0), max(tops, default=0.0)
    if tokens(high) <= budget:
        low = high
    else:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tokens(middle) <= budget else (low, middle)
    return [s.service(min(low, top)) for s, top in zip(shares, tops, strict=True)]


class Fair(Policy):
    """Tenants are lanes; the one with the lowest counter goes first."""

    displaces = True
    shares_steps = True

    def __init__(self, config: FairnessConfig) -> None:
        self.config = config
        self.tenants: dict[str, Tenant] = {}
        # Where newcomers start: the lowest counter of the tenants that wait, or if none do, the highest that runs.
        self._level = 0.0
        self._now = 0.0
        self._step = 0.0  # most service that a step can do
        self._running: set[str] = set()
        self._late: set[str] = set()
        self._wanted: dict[str, float] = {}

    def tenant(self, name: str) -> Tenant:
        if name not in self.tenants:
            self.tenants[name] = Tenant(self.config.tenants.get(name, TenantConfig()))
        return self.tenants[name]

    def lane(self, request: Request) -> str:
        return request.tenant

    def key(self, request: Request) -> tuple[Any, ...]:
        return (request.priority, request.arrival)

    def rank(self, request: Request) -> tuple[Any, ...]:
        return (self.tenant(request.tenant).position, request.tenant in self._running, *self.key(request))

    def may_displace(self, waiting: Request, running: Request) -> bool:
        """A tenant with nothing running takes the place of one that has had no less. A request that was preempted
        itself waits until the other is a step's service ahead: two must not take turns at every step."""
        lead = self.tenant(running.tenant).position - self.tenant(waiting.tenant).position
        if waiting.progress_mark >= 0:
            lead -= self.config.slack + self._step / self.tenant(running.tenant).config.weight
        return waiting.tenant not in self._running and lead >= 0

    def arrived(self, request: Request, waiting: Sequence[Request]) -> None:
        """Being away earns no credit: a tenant that starts to wait starts at the level of those who do."""
        if all(other.tenant != request.tenant for other in waiting):
            level = min((self.tenant(other.tenant).counter for other in waiting), default=self._level)
            tenant = self.tenant(request.tenant)
            tenant.counter = max(tenant.counter, level)

    # -- sharing a step out ------------------------------------------------------------------------------------------

    def begin(self, now: float, running: Sequence[Request], waiting: Sequence[Request]) -> None:
        self._now = now
        self._running = {request.tenant for request in running}
        self._late = {r.tenant for r in waiting if self._is_late(r)}
        counters = [self.tenant(r.tenant).counter for r in waiting or running]
        if counters:
            self._level = max(self._level, min(counters) if waiting else max(counters))
        for name, tenant in self.tenants.items():
            tenant.head_start = self.config.slack if name in self._late else 0.0

    def _is_late(self, request: Request) -> bool:
        target = self.tenant(request.tenant).config.ttft_target
        return target is not None and self._now - request.metrics.arrival_time > target

    def share(self, budget: int, free_slots: int, demands: Mapping[str, Demand]) -> None:
        config = self.config
        step = self._step = budget * max(config.prompt_token_weight, config.output_token_weight)
        self._give_slots(free_slots, demands)
        shares = []
        for name, demand in demands.items():
            tenant = self.tenant(name)
            weight, waits = tenant.config.weight, bool(demand.queued) or demand.waits
            headroom = config.slack
            if not waits:
                headroom += step / weight
                tenant.head_start += step / weight
            decodes, prefill = self._capped(tenant, demand)
            if (decodes, prefill) != (demand.decodes, demand.prefill):
                waits = False  # its cap holds it back, so it holds nobody back
            shares.append(
                Share(
                    tenant.position,
                    weight,
                    decodes,
                    prefill,
                    config.output_token_weight,
                    config.prompt_token_weight,
                    waits,
                    headroom,
                )
            )
        for name, service in zip(demands, fill(shares, budget), strict=True):
            self.tenant(name).quota = service
        self._wanted = {name: share.service(math.inf) for name, share in zip(demands, shares, strict=True)}

    def relent(self) -> bool:
        """Who should go first cannot, and nobody gains by waiting for it: all get what they could use."""
        for name, service in self._wanted.items():
            self.tenant(name).quota = service
        return any(self._wanted.values())

    def _give_slots(self, free_slots: int, demands: Mapping[str, Demand]) -> None:
        """Let waiting requests count as demand, as many as there are slots, in the order in which they will enter."""
        config = self.config
        levels = {}
        for name, demand in demands.items():
            service = demand.decodes * config.output_token_weight + demand.prefill * config.prompt_token_weight
            levels[name] = self.tenant(name).position + service / self.tenant(name).config.weight
        for _ in range(free_slots):
            queued = (name for name, demand in demands.items() if demand.queued)
            name = min(queued, key=lambda n: (levels[n], n in self._running), default=None)
            if name is None:
                break
            tokens = demands[name].queued.pop(0)
            demands[name].prefill += tokens
            levels[name] += tokens * config.prompt_token_weight / self.tenant(name).config.weight

    def _capped(self, tenant: Tenant, demand: Demand) -> tuple[int, int]:
        """Decodes and prompt tokens that the tenant's rate cap allows; what it does not use adds up for a second."""
        rate = tenant.config.max_tokens_per_second
        if rate is None:
            return demand.decodes, demand.prefill
        most = max(rate, 1.0)
        if tenant.refilled_at is None:
            tenant.tokens_available = most
        else:
            gained = rate * max(0.0, self._now - tenant.refilled_at)
            tenant.tokens_available = min(most, tenant.tokens_available + gained)
        tenant.refilled_at = self._now
        available = max(0, math.floor(tenant.tokens_available))
        decodes = min(demand.decodes, available)
        return decodes, min(demand.prefill, available - decodes)

    def take(self, request: Request, start: int, count: int, whole: bool = False) -> int:
        """What was computed before is free; the rest as far as the tenant's quota reaches, and then one more. The
        token that a prompt ends with is not foreseen in quotas, but charged."""
        tenant, allowed = self.tenant(request.tenant), count
        if tenant.quota <= 0 or start < request.num_prompt_tokens:
            free = max(0, request.num_charged_tokens - start)
            allowed = min(count, free + max(0, math.ceil(tenant.quota / self.config.prompt_token_weight)))
        if whole and allowed < count:
            return 0
        tenant.quota -= self._service(request, start, allowed, int(start >= request.num_prompt_tokens))
        return allowed

    def charge(self, request: Request, start: int, count: int, samples: int) -> None:
        tenant = self.tenant(request.tenant)
        tenant.counter += self._service(request, start, count, samples) / tenant.config.weight
        tenant.tokens_available -= max(0, start + count - max(start, request.num_charged_tokens))

    def _service(self, request: Request, start: int, count: int, samples: int) -> float:
        """What the tokens are worth. Those that were charged before are not charged again."""
        end, charged = start + count, request.num_charged_tokens
        prompt = max(0, min(end, request.num_prompt_tokens) - max(start, charged))
        output = samples if end > charged else 0
        return prompt * self.config.prompt_token_weight + output * self.config.output_token_weight

    @property
    def allows_several_steps(self) -> bool:
        return all(t.config.max_tokens_per_second is None for t in self.tenants.values())
