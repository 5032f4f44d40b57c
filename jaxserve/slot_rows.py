"""Keeps the devices' sampler rows (logit bias, token counts) up to date with the requests in their slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.logit_edits import LogitEdits, edits_logits, has_penalties, token_counts
from jaxserve.request import Request
from jaxserve.runner import ModelRunner
from jaxserve.scheduler import Scheduled, SchedulerOutput


class SlotRows:
    """Rows are written when a request enters a slot, and when what it forbids changes."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.vocab_size = runner.decoder.vocab_size
        self._edits: dict[str, LogitEdits] = {}
        self._biased = runner.biased_slots  # the runner's: it may have served another engine

    def add(self, request: Request, ending: Sequence[int], bad_words: Sequence[tuple[int, ...]]) -> None:
        """Learn what a request does to its logits. ``ending``: tokens that end it; ``bad_words``: as token ids."""
        if edits_logits(request.params):
            self._edits[request.request_id] = LogitEdits(request.params, self.vocab_size, ending, bad_words)

    def remove(self, request: Request) -> None:
        self._edits.pop(request.request_id, None)

    def write(self, schedule: SchedulerOutput) -> None:
        """Before a step is started."""
        for replica, rows in enumerate(schedule.replicas):
            for scheduled in rows:
                if scheduled.is_new or scheduled.request.request_id in self._edits:
                    self._write_row(replica, scheduled)

    def _write_row(self, replica: int, s: Scheduled) -> None:
        request, slot = s.request, (replica, s.slot)
        edits = self._edits.get(request.request_id)
        num_output = max(0, s.start + s.count - request.num_prompt_tokens)
        bias = None if edits is None else edits.row(request.output_token_ids, num_output, rewrite=s.is_new)
        stale = s.is_new and (has_penalties(request.params) or slot in self._biased)
        if bias is None and not stale:
            return
        (self._biased.discard if bias is None else self._biased.add)(slot)
        counts = None
        if s.is_new:
            counts = token_counts(request.prompt_token_ids, request.output_token_ids, self.vocab_size)
        self.runner.write_slot(*slot, np.zeros(self.vocab_size, np.float32) if bias is None else bias, counts)
