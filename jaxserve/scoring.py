"""Log-probabilities that requests asked for, of sampled tokens and of prompt tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.completion import Completion, RequestGroup, logprob_entry
from jaxserve.request import Request, Status
from jaxserve.runner import ModelRunner, PendingStep, Scores
from jaxserve.scheduler import Scheduled, SchedulerOutput

Owners = dict[str, tuple[RequestGroup, Completion]]
"""By request id."""


@dataclass(frozen=True)
class Wanted:
    """The log-probability of ``target`` after row ``row`` of a replica's tokens, and of ``num_top`` others."""

    request: Request
    replica: int
    row: int
    target: int
    num_top: int
    is_prompt: bool


def add_logprobs(
    schedule: SchedulerOutput,
    tokens: list[list[list[int]]],
    pending: PendingStep,
    owners: Owners,
    runner: ModelRunner,
    tokenizer: Any | None,
    announce: Callable[..., None],
) -> None:
    """Compute what the rows of a step want, with a second program over the step's hidden states, and hand it to the
    completions. ``announce`` is told the arguments of ``score_rows`` first: other processes have to compute it too."""
    wanted = [w for i, rows in enumerate(schedule.replicas) for w in _wanted(i, rows, tokens[i], owners)]
    if not wanted:
        return
    rows, targets = [(w.replica, w.row) for w in wanted], [w.target for w in wanted]
    num_top = -1 if any(w.num_top < 0 for w in wanted) else max(w.num_top for w in wanted)
    announce("score", rows, targets, num_top)
    scores = score_rows(pending, runner, rows, targets, num_top)
    for i, w in enumerate(wanted):
        top = slice(None) if w.num_top < 0 else slice(w.num_top)
        chosen = (w.target, float(scores.target[i]), int(scores.rank[i]))
        detokenizer = tokenizer if w.request.params.detokenize else None
        entry = logprob_entry(
            chosen, scores.top_ids[i, top].tolist(), scores.top_logprobs[i, top].tolist(), detokenizer
        )
        group, completion = owners[w.request.request_id]
        if w.is_prompt:
            assert group.prompt_logprobs is not None
            group.prompt_logprobs.append(entry)
        else:
            completion.add_logprobs(entry, w.target)


def score_rows(
    pending: PendingStep, runner: ModelRunner, rows: Sequence[Sequence[int]], targets: Sequence[int], num_top: int
) -> Scores:
    """Log-probabilities of ``targets`` after rows (replica, row) of a step, and of the ``num_top`` likeliest tokens
    (-1: all)."""
    states = runner.states(pending)
    return runner.score(np.stack([states[replica, row] for replica, row in rows]), np.array(targets), num_top)


def _wanted(replica: int, rows: list[Scheduled], tokens: list[list[int]], owners: Owners) -> Iterator[Wanted]:
    at = 0
    for s, sampled in zip(rows, tokens, strict=True):
        request, params = s.request, s.request.params
        if request.status is not Status.FINISHED and (
            params.logprobs is not None or params.prompt_logprobs is not None
        ):
            group, completion = owners[request.request_id]
            if group.prompt_logprobs is not None and completion.index == 0:
                have = len(group.prompt_logprobs)
                for position in range(max(s.start + 1, have), min(s.start + s.count + 1, request.num_prompt_tokens)):
                    token, num_top = request.prompt_token_ids[position], params.prompt_logprobs or 0
                    yield Wanted(request, replica, at + position - 1 - s.start, token, num_top, True)
            if s.samples and params.logprobs is not None:
                yield Wanted(request, replica, at + s.count - 1, sampled[0], params.logprobs, False)
        at += s.count
