"""From sampled tokens to what the caller sees: text, stop strings, log-probabilities, request outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxserve.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from jaxserve.request import Request
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.tokenizer import IncrementalDetokenizer, StopStringMatcher, decode_token


class Completion:
    """The output side of one Request."""

    def __init__(self, index: int, request: Request, tokenizer: Any | None) -> None:
        params = request.params
        self.index, self.request, self.tokenizer = index, request, tokenizer
        self.text = ""
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self._sent_text, self._sent_tokens = 0, 0
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                request.prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
        self._matcher = StopStringMatcher(params.stop, params.include_stop_str_in_output)

    def append(self, token_id: int, count: int) -> str | None:
        """Take the request's ``count``-th output token; returns the stop string that it completes, if it does."""
        if self._detokenizer is None:
            return None
        request, params = self.request, self.request.params
        ended_by_token = request.finish_reason == "stop" and count == len(request.output_token_ids)
        if ended_by_token and not params.include_stop_str_in_output:
            return None
        delta = self._detokenizer.append([token_id])
        if count <= params.min_tokens:
            self.text += self._matcher.feed_early(delta)
            return None
        emitted, matched = self._matcher.feed(delta)
        self.text += emitted
        return matched

    def finish(self) -> str | None:
        """The request has ended: release what was held back; returns a stop string that only shows now."""
        if self._detokenizer is None or self.request.stop_reason in self.request.params.stop:
            return None
        emitted, matched = self._matcher.feed(self._detokenizer.finish())
        self.text += emitted
        if matched is None:
            self.text += self._matcher.flush()
        return matched

    def add_logprobs(self, entry: dict[int, Logprob], sampled: int) -> None:
        assert self.logprobs is not None and self.cumulative_logprob is not None
        self.logprobs.append(entry)
        self.cumulative_logprob += entry[sampled].logprob

    def output(self, delta: bool) -> CompletionOutput:
        """Everything so far, or with ``delta`` what is new since the last call."""
        request = self.request
        text_from, tokens_from = (self._sent_text, self._sent_tokens) if delta else (0, 0)
        self._sent_text, self._sent_tokens = len(self.text), len(request.output_token_ids)
        reason: FinishReason | None = request.finish_reason  # pyright: ignore[reportAssignmentType]
        return CompletionOutput(
            index=self.index,
            text=self.text[text_from:],
            token_ids=request.output_token_ids[tokens_from:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[tokens_from:],
            finish_reason=reason,
            stop_reason=request.stop_reason,
        )


class RequestGroup:
    """A caller's request: its prompt and its ``n`` completions."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        completions: list[Completion],
    ) -> None:
        self.request_id, self.prompt, self.params, self.completions = request_id, prompt, params, completions
        wanted = params.prompt_logprobs is not None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] if wanted else None
        self._sent_prompt_logprobs = 0

    @property
    def finished(self) -> bool:
        return all(c.request.finish_reason is not None for c in self.completions)

    def output(self) -> RequestOutput | None:
        """What the caller gets after a step; None if it asked for the final output only and that is not there."""
        kind, finished = self.params.output_kind, self.finished
        if kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        first, delta = self.completions[0].request, kind is RequestOutputKind.DELTA
        prompt_logprobs = self.prompt_logprobs
        if delta and prompt_logprobs is not None:
            prompt_logprobs = prompt_logprobs[self._sent_prompt_logprobs :]
            self._sent_prompt_logprobs += len(prompt_logprobs)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[c.output(delta) for c in self.completions],
            finished=finished,
            metrics=_merge([c.request.metrics for c in self.completions]),
            num_cached_tokens=first.num_cached_tokens,
        )


def _merge(metrics: Sequence[RequestMetrics]) -> RequestMetrics:
    """Times of a request with several completions: its first ones and its last ones. With one completion its own,
    which go on changing until it has finished."""
    if len(metrics) == 1:
        return metrics[0]

    def first(name: str) -> float | None:
        return min((t for m in metrics if (t := getattr(m, name)) is not None), default=None)

    def last(name: str) -> float | None:
        return max((t for m in metrics if (t := getattr(m, name)) is not None), default=None)

    return RequestMetrics(
        arrival_time=metrics[0].arrival_time,
        first_scheduled_time=first("first_scheduled_time"),
        first_token_time=first("first_token_time"),
        last_token_time=last("last_token_time"),
        finished_time=last("finished_time") if all(m.finished_time is not None for m in metrics) else None,
        num_preemptions=sum(m.num_preemptions for m in metrics),
    )


def logprob_entry(
    target: tuple[int, float, int], top_ids: Sequence[int], top_logprobs: Sequence[float], tokenizer: Any | None
) -> dict[int, Logprob]:
    """{token id: Logprob} of the chosen token (id, logprob, rank) and of the likeliest ones, in order."""
    token_id, logprob, rank = target
    entry = {token_id: Logprob(float(logprob), int(rank))}
    for position, (other, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
        entry.setdefault(int(other), Logprob(float(value), position))
    if tokenizer is not None:
        for other, value in entry.items():
            value.decoded_token = decode_token(tokenizer, other)
    return entry
