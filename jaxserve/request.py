"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from jaxserve.outputs import RequestMetrics
from jaxserve.sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt, what was generated so far, and how much of both is in the KV cache.

    ``num_computed_tokens`` catches up with ``num_tokens``; a request whose every token is computed gets its next
    token sampled. There is nothing else to say about prefill, decode, chunks or resumption.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """Of this sequence's random numbers: the same seed gives the same tokens, wherever and whenever it runs."""
    stop_token_ids: frozenset[int]
    """Token ids that end the request, EOS included unless it is to be ignored."""
    max_tokens: int
    metrics: RequestMetrics
    arrival: int = 0
    """Order of arrival."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    status: Status = Status.WAITING
    replica: int = 0
    slot: int | None = None
    """Row of the device's per-sequence state while the request runs."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions ``start`` to ``stop`` of prompt and output together."""
        split = self.num_prompt_tokens
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        head = self.prompt_token_ids[start:stop]
        return head if stop <= split else head + self.output_token_ids[: stop - split]
