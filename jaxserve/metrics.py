"""What an engine counts."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

from jaxserve.scheduler import SchedulerCounters


@dataclass
class EngineMetrics:
    """Counters since the engine was made; times in seconds."""

    scheduler: SchedulerCounters = field(default_factory=SchedulerCounters)
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed, again after a preemption included; those found in the prefix cache are not computed."""
    num_generation_tokens: int = 0
    num_late_rows: int = 0
    """Rows computed for requests that had ended one step before, which was not known yet."""
    num_finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})
    host_seconds: float = 0.0
    """Scheduling, building batches, updating, detokenising."""
    wait_seconds: float = 0.0
    """The host waiting for a step's tokens."""
    device_idle_seconds: float = 0.0
    """The devices waiting for the host between two steps: an upper bound, since a step that is done when the next is
    started is taken to have been done ever since the host saw the step before it done."""

    def snapshot(self) -> EngineMetrics:
        """A copy that does not count on."""
        return deepcopy(self)

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.num_preemptions

    @property
    def num_padding_tokens(self) -> int:
        """Token rows of steps that held no token."""
        return self.scheduler.num_padding_rows

    @property
    def host_share(self) -> float:
        """Share of the time in steps in which the host worked, whether the devices waited for it or not."""
        return _share(self.host_seconds, self.host_seconds + self.wait_seconds)

    @property
    def device_idle_share(self) -> float:
        """Share of the time in steps in which the devices waited for the host, at most."""
        return _share(self.device_idle_seconds, self.host_seconds + self.wait_seconds)

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of prompt tokens that were found instead of computed."""
        return _share(self.scheduler.prefix_cache_hits, self.scheduler.prefix_cache_queries)

    @property
    def kv_efficiency(self) -> float:
        """Share of the token slots of held KV blocks that hold a token, over all steps."""
        return _share(self.scheduler.live_slots, self.scheduler.held_slots)

    @property
    def kv_internal_fragmentation(self) -> float:
        """Share of the token slots of held KV blocks that hold none: the ends of the sequences."""
        return _share(self.scheduler.held_slots - self.scheduler.live_slots, self.scheduler.held_slots)

    @property
    def kv_external_fragmentation(self) -> float:
        """Free token slots that nobody could use although requests waited for blocks, as a share of held and such
        slots."""
        withheld = self.scheduler.withheld_slots
        return _share(withheld, self.scheduler.held_slots + withheld)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
