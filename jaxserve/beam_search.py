"""Beam search: the likeliest continuations of a prompt, found with one-token requests. No jax here.

Names, defaults and meanings are those of vLLM (``BeamSearchParams`` in vllm/sampling_params.py, the search in
vllm/entrypoints/generate/beam_search), whose two rules come from Hugging Face's beam search: a round looks at the
2 * beam_width likeliest next tokens of every beam, so that beam_width of them go on even where as many end; and a
sequence's score is its log-probability over its length to the power of ``length_penalty``.

One thing is added, which changes no result: a search stops early once nothing that still runs can overtake what has
ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import batched, islice
from numbers import Integral, Real
from typing import Any

from jaxserve.inputs import Prompt, naming, read_prompt
from jaxserve.outputs import FinishReason, Logprob, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler
from jaxserve.tokenizer import decode_token

Ask = Callable[[list[Prompt]], list[RequestOutput]]
"""Computes one round: one token of every prompt, with its log-probabilities; outputs in the order of the prompts."""

LARGEST_LENGTH_PENALTY = 10.0
"""In either direction. Lengths to a power far beyond it are no floating-point numbers any more."""


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """What to search for. Values are checked when the object is made: a wrong one raises ValueError,
    ``structured_outputs`` NotImplementedError."""

    beam_width: int
    """Sequences that go on after every round, and most that are returned per prompt; >= 1. Up to 10 the likeliest
    tokens are picked on the device, beyond it on the host, out of the whole vocabulary's log-probabilities."""
    max_tokens: int
    """Most tokens to generate, >= 1; a sequence ends at the model's length limit in any case."""
    ignore_eos: bool = False
    """Whether EOS is a token like any other, instead of the end of a sequence."""
    temperature: float = 0.0
    """Scores are made of log-probabilities before temperature, so that it changes none. Above 0, every beam has one
    candidate more in a round, a token sampled at this temperature, where it is not among the likeliest."""
    length_penalty: float = 1.0
    """The power of the length that a sequence's log-probability is divided by, in [-10, 10]: 0 compares sums, 1 means
    per token, and more favours long sequences."""
    include_stop_str_in_output: bool = False
    """Whether ``text`` has the EOS that ended a sequence; ``tokens`` has it in any case."""
    structured_outputs: None = None
    """Not supported: must be None."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer >= 1")
            object.__setattr__(self, name, int(value))
        penalty, limit = self.length_penalty, LARGEST_LENGTH_PENALTY
        if isinstance(penalty, bool) or not isinstance(penalty, Real) or not -limit <= penalty <= limit:
            raise ValueError(f"length_penalty is {penalty!r}; it must be a number in [-{limit:g}, {limit:g}]")
        object.__setattr__(self, "length_penalty", float(penalty))
        self.of_a_round(vocab_size=1)  # checks the others

    def of_a_round(self, vocab_size: int) -> SamplingParams:
        """What is asked for every beam in a round: one token, and the log-probabilities of its candidates."""
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=1,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            structured_outputs=self.structured_outputs,
            logprobs=min(2 * self.beam_width, vocab_size),
            detokenize=False,
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """A sequence that was found."""

    tokens: list[int]
    """The prompt, what was generated, and the EOS that ended it if one did."""
    logprobs: list[dict[int, Logprob]]
    """Per generated token, the candidates of its round by token id; it is one of them."""
    cum_logprob: float = 0.0
    """Sum of the generated tokens' log-probabilities."""
    text: str | None = None
    """The text of ``tokens``, the prompt's and special tokens' included; None without a tokenizer."""
    finish_reason: FinishReason | None = None
    """"stop": ended by EOS; "length": by a length limit."""
    stop_reason: int | str | None = None
    """The EOS that ended it, as a token id; None if none did."""


@dataclass(slots=True)
class BeamSearchOutput:
    """What was found for a prompt."""

    sequences: list[BeamSearchSequence]
    """``beam_width`` of them, the best score first; fewer where so many do not exist."""


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    """A generated token with the ones before it: linked, so that the candidates that lose copy nothing."""

    before: _Beam | None
    token_id: int = -1
    logprobs: dict[int, Logprob] = field(default_factory=dict)
    cum_logprob: float = 0.0
    score: float = 0.0

    def path(self) -> list[_Beam]:
        """Its generated tokens, in order. The beam that everything starts from, which has none before it, is not
        one."""
        path, beam = [], self
        while beam.before is not None:
            path.append(beam)
            beam = beam.before
        return path[::-1]


class BeamSearch:
    """The search for one prompt."""

    def __init__(
        self,
        prompt_token_ids: list[int],
        params: BeamSearchParams,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        cache_salt: str | None = None,
    ) -> None:
        self.prompt_token_ids, self.params = prompt_token_ids, params
        self.num_rounds = min(params.max_tokens, max_model_len - len(prompt_token_ids))
        self._eos, self._cache_salt = frozenset(eos_token_ids), cache_salt
        self._live, self._ended = [_Beam(None)], []
        self._num_done = 0

    @property
    def done(self) -> bool:
        """Whether no round would change the result."""
        if self._num_done == self.num_rounds or not self._live:
            return True
        full = len(self._ended) == self.params.beam_width
        return full and all(self._highest_score(beam) <= self._ended[-1].score for beam in self._live)

    def prompts(self) -> list[Prompt]:
        """Every beam that goes on, as a prompt for the next round."""
        return [{"prompt_token_ids": self._tokens(beam), "cache_salt": self._cache_salt} for beam in self._live]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """Take a round's outputs, one for each of ``prompts``."""
        self._num_done += 1
        going: list[_Beam] = []
        ended: list[_Beam] = []
        for beam, output in zip(self._live, outputs, strict=True):
            for candidate in self._candidates(beam, output):
                (ended if self._is_end(candidate.token_id) else going).append(candidate)
        self._live, self._ended = self._best(going), self._best([*self._ended, *ended])

    def output(self, tokenizer: Any | None) -> BeamSearchOutput:
        """The best of what has ended and of what still runs."""
        sequences = [self._sequence(beam) for beam in self._best([*self._ended, *self._live])]
        if tokenizer is not None:
            name_of = cache(lambda token_id: decode_token(tokenizer, token_id))
            for sequence in sequences:
                sequence.text = tokenizer.decode(self._shown(sequence))
                for entry in sequence.logprobs:
                    for token_id, logprob in entry.items():
                        logprob.decoded_token = name_of(token_id)
        return BeamSearchOutput(sequences)

    # -- scores ------------------------------------------------------------------------------------------------------

    def _candidates(self, beam: _Beam, output: RequestOutput) -> Iterator[_Beam]:
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None and len(logprobs) == 1
        for token_id, entry in logprobs[0].items():
            # As in vLLM, an EOS at the end is not counted, whether it ends the sequence or is ignored.
            length = len(self.prompt_token_ids) + self._num_done - (token_id in self._eos)
            cum_logprob = beam.cum_logprob + entry.logprob
            yield _Beam(beam, token_id, logprobs[0], cum_logprob, self._score(cum_logprob, length))

    def _score(self, cum_logprob: float, length: int) -> float:
        return cum_logprob / length**self.params.length_penalty

    def _highest_score(self, beam: _Beam) -> float:
        """A bound for every sequence that begins with a live beam: log-probabilities only fall, so it is that of the
        same log-probability at the shortest (EOS comes next) or at the greatest length that it may have."""
        prompt = len(self.prompt_token_ids)
        return max(self._score(beam.cum_logprob, prompt + length) for length in (self._num_done, self.num_rounds))

    def _best(self, beams: list[_Beam]) -> list[_Beam]:
        """The best first; of equals, the one that was found first."""
        return sorted(beams, key=lambda beam: beam.score, reverse=True)[: self.params.beam_width]

    # -- from beams to sequences -------------------------------------------------------------------------------------

    def _is_end(self, token_id: int) -> bool:
        return token_id in self._eos and not self.params.ignore_eos

    def _tokens(self, beam: _Beam) -> list[int]:
        return [*self.prompt_token_ids, *(b.token_id for b in beam.path())]

    def _sequence(self, beam: _Beam) -> BeamSearchSequence:
        ended = self._is_end(beam.token_id)
        return BeamSearchSequence(
            tokens=self._tokens(beam),
            logprobs=[b.logprobs for b in beam.path()],
            cum_logprob=beam.cum_logprob,
            finish_reason="stop" if ended else "length",
            stop_reason=beam.token_id if ended else None,
        )

    def _shown(self, sequence: BeamSearchSequence) -> list[int]:
        """The tokens whose text a sequence has."""
        hidden = sequence.finish_reason == "stop" and not self.params.include_stop_str_in_output
        return sequence.tokens[:-1] if hidden else sequence.tokens


def plan_searches(
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    concurrency_limit: int | None,
    tokenizer: Any | None,
    eos_token_ids: Iterable[int],
    vocab_size: int,
    scheduler: Scheduler,
) -> list[list[BeamSearch]]:
    """A search for every prompt, in batches of ``concurrency_limit`` (None: one batch). Raises ValueError for what is
    wrong and for a prompt that the engine could not serve to its end, and QueueFullError where its queue has no room
    for a round of a batch."""
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params {params!r}: it is of type BeamSearchParams")
    limit = concurrency_limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral) or limit < 1):
        raise ValueError(f"concurrency_limit is {limit!r}; it must be an integer >= 1 or None (all prompts)")
    searches = []
    for i, prompt in enumerate(prompts):
        with naming("prompts", i, len(prompts)):
            request = read_prompt(prompt, tokenizer)
            token_ids, longest = request["prompt_token_ids"], scheduler.config.max_model_len
            outside = next((t for t in token_ids if not 0 <= t < vocab_size), None)
            if outside is not None:
                raise ValueError(f"prompt token id {outside} is outside of the vocabulary (0 to {vocab_size - 1})")
            scheduler.check_fits(len(token_ids), params.max_tokens)
            searches.append(BeamSearch(token_ids, params, eos_token_ids, longest, request.get("cache_salt")))
    batches = [list(batch) for batch in batched(searches, int(limit or len(searches) or 1))]
    for batch in batches:
        num_tokens = sum(len(s.prompt_token_ids) + s.num_rounds - 1 for s in batch)  # of a beam each, in the last round
        scheduler.check_queue(len(batch) * params.beam_width, num_tokens * params.beam_width)
    return batches


def run_searches(searches: Sequence[BeamSearch], ask: Ask) -> Iterator[BeamSearch]:
    """Run searches to their ends, all together; each is handed over when it is done."""
    going = list(searches)
    while going:
        asked = [search.prompts() for search in going]
        outputs = iter(ask([prompt for prompts in asked for prompt in prompts]))
        for search, prompts in zip(going, asked, strict=True):
            search.advance(list(islice(outputs, len(prompts))))
        yield from (search for search in going if search.done)
        going = [search for search in going if not search.done]
