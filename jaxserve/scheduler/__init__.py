"""Who gets how many tokens of the next step, and which blocks.

There is no prefill phase and no decode phase: every request's ``num_computed_tokens`` catches up with its
``num_total_tokens``. The scheduler reads no clock and no random number: the same calls give the same decisions.
"""

from jaxserve.scheduler.decision import BlockMove, Scheduled, SchedulerOutput
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.replica import Replica
from jaxserve.scheduler.scheduler import Advanced, QueueFullError, Scheduler, SchedulerCounters

__all__ = [
    "Advanced",
    "BlockMove",
    "Policy",
    "QueueFullError",
    "Replica",
    "Scheduled",
    "Scheduler",
    "SchedulerCounters",
    "SchedulerOutput",
]
