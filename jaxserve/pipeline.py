"""What each stage of a pipeline works on."""

from __future__ import annotations

from collections import deque

from jaxserve.batch import Batch, relaid
from jaxserve.config import SchedulerConfig
from jaxserve.runner import ModelRunner, PendingStep
from jaxserve.scheduler import SchedulerOutput


class Pipeline:
    """Schedules enter at the first stage and leave the last one ``num_stages - 1`` ticks later. A stage without a
    batch idles for a tick: that is the pipeline's bubble."""

    def __init__(self, runner: ModelRunner, config: SchedulerConfig) -> None:
        self.runner, self.config = runner, config
        self.num_stage_ticks = 0
        """Ticks times stages."""
        self.num_idle_stage_ticks = 0
        """How many of these had nothing to work on."""
        self._entered: deque[tuple[SchedulerOutput, Batch]] = deque(maxlen=config.num_stages)  # newest first

    @property
    def is_empty(self) -> bool:
        """Whether no stage but the last has anything to pass on."""
        return all(schedule.is_empty for schedule in self.schedules[: self.config.num_stages - 1])

    @property
    def schedules(self) -> list[SchedulerOutput]:
        """What each stage works on, the first stage first."""
        return [schedule for schedule, _ in self._entered]

    def clear(self) -> None:
        """Forget what is in the pipeline: nobody waits for it."""
        self._entered.clear()

    def tick(self, schedule: SchedulerOutput, batch: Batch) -> tuple[SchedulerOutput, PendingStep]:
        """Start a tick in which ``schedule`` enters. Returns the schedule that leaves, which may be an empty one, and
        its pending tokens."""
        nothing = SchedulerOutput([[] for _ in schedule.replicas]), batch.emptied()
        if not self._entered:
            self._entered.extend([nothing] * self.config.num_stages)
        self._entered.appendleft((schedule, batch))
        schedules = self.schedules
        self.num_stage_ticks += len(schedules)
        self.num_idle_stage_ticks += sum(s.is_empty for s in schedules)
        decodes = all(s.one_token_each for s in schedules)
        rows = max(max(s.num_rows for s in schedules), 1)
        layout = self.runner.config.layout(self.config.bucket(rows, decodes), decodes)
        pending = self.runner.tick([relaid(b, layout) for _, b in self._entered])
        return schedules[-1], pending
