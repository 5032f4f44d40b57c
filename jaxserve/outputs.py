"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "abort"]
"""Why a completion ended: EOS or a stop condition; a length limit; cancelled."""


@dataclass(slots=True)
class Logprob:
    """How likely one token was at one position."""

    logprob: float
    """Natural log of its probability: log-softmax of the raw logits, before penalties and temperature."""
    rank: int
    """1 = the most likely token at this position."""
    decoded_token: str | None = None
    """The token's text; None when the request is not detokenized."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a request."""

    index: int
    """Which completion this is, from 0."""
    text: str
    """The generated text; empty when the request is not detokenized."""
    token_ids: list[int]
    """The generated token ids, with the token that ended the generation."""
    cumulative_logprob: float | None = None
    """Sum of the sampled tokens' logprobs; None unless ``logprobs`` was asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per generated token, the logprobs by token id: the sampled token and the most likely ones."""
    finish_reason: FinishReason | None = None
    """Why the completion ended; None while it is running."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for EOS and for every other ending."""

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request: seconds on a monotonic clock, so only differences have a meaning.

    None = has not happened yet.
    """

    arrival_time: float
    """The engine accepted the request and queued it."""
    first_scheduled_time: float | None = None
    """It was given tokens in a step for the first time."""
    first_token_time: float | None = None
    """Its first output token reached the host."""
    last_token_time: float | None = None
    """Its latest output token reached the host."""
    finished_time: float | None = None
    """It finished or was aborted."""
    num_preemptions: int = 0
    """How often its KV blocks were taken away and had to be computed again."""


@dataclass(slots=True)
class RequestOutput:
    """A request and what has been generated for it, as much of it as its ``output_kind`` asks for."""

    request_id: str
    """The id the request was submitted under."""
    prompt: str | None
    """The prompt's text; None when it was given as token ids."""
    prompt_token_ids: list[int]
    """The prompt as the model saw it."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token, the logprobs by token id; None for the first, which nothing predicts.

    The whole is None unless asked for. Where outputs carry what is new, they come once.
    """
    outputs: list[CompletionOutput] = field(default_factory=list)
    """The completions, by index."""
    finished: bool = False
    """Whether every completion has finished."""
    metrics: RequestMetrics | None = None
    """Timestamps and counts; None when they are not recorded."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    lora_request: Any = None
    """The adapter the request used; None = the base model."""
