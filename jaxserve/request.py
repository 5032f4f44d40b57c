"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from jaxserve.outputs import RequestMetrics
from jaxserve.sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"
    """To be computed from its first token, or from where the prefix cache ends."""
    RUNNING = "running"
    SWAPPED = "swapped"
    """Its blocks are in host memory."""
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt, what was generated so far, and how much of both is in the KV cache.

    ``num_computed_tokens`` catches up with ``num_total_tokens``; a request whose every token is computed gets its
    next token sampled. There is nothing else to say about prefill, decode, chunks or resumption. Both numbers run
    ahead of the device: they count what has been scheduled.
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
    priority: int = 0
    """Lower goes first, under the ``priority`` policy."""
    tenant: str = ""
    """Who is charged for it, under the ``fair`` policy."""
    cache_salt: str | None = None
    """Blocks are shared only between requests of the same salt."""
    adapter: str | None = None
    """The same for adapters."""
    waits_for_tokens: bool = False
    """Whether the host must know each token before the next can be computed (multi-token bad words)."""
    single_steps: bool = False
    """Whether the host has something to do after every token, so that several in one call are not possible."""
    reads_prefix_cache: bool = True
    """False if every prompt position must be computed (prompt log-probabilities)."""
    arrival: int = 0
    """Order of arrival."""
    output_token_ids: list[int] = field(default_factory=list)
    num_in_flight: int = 0
    """Tokens that are being sampled, or were and have not reached the host."""
    ready_at: int = 0
    """The step of its replica from which its next token is known on the device, or here."""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache had when the request first ran."""
    num_charged_tokens: int = 0
    """Tokens from the first one on that were computed, or found, once: computing them again is no new service."""
    progress_mark: int = -1
    """``num_computed_tokens`` when it was last preempted (-1: never): it has made progress when it is past this."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Names of its full blocks, as far as they were needed (``kv_cache.prefix_cache``)."""
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
        """Tokens that the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_total_tokens(self) -> int:
        """Tokens that there are, those in flight included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def num_tokens_left(self) -> int:
        """Output tokens that may still be sampled."""
        return self.max_tokens - len(self.output_token_ids) - self.num_in_flight

    @property
    def has_made_progress(self) -> bool:
        """Whether it has computed something new since it was last preempted."""
        return self.num_computed_tokens > self.progress_mark

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions ``start`` to ``stop`` of prompt and output together."""
        split = self.num_prompt_tokens
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        head = self.prompt_token_ids[start:stop]
        return head if stop <= split else head + self.output_token_ids[: stop - split]
