"""What accuracy tasks ask of an engine: likelihoods of given tokens, and answers that end at a string.

Everything is token ids, so that whoever asks decides where a context ends. Many requests go into one ``generate()``
call and share steps; answers come back call by call, so that those of a long run can be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.cli.output import watched

REQUESTS_PER_CALL = 4096
"""What an interruption may lose. Steps run half empty only at the end of a call, which so many requests make up for."""
MAX_GEN_TOKS = 256
"""Tokens of an answer where a task does not say, as in the harness."""
ANSWER_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the most tokens of an answer; the first that is there counts, as in the harness."""
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids"),
)
"""Generation arguments that mean in the harness what they mean to ``SamplingParams``."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Context and continuation, as token ids."""


@dataclass(frozen=True)
class Scorer:
    """An engine that scores and answers."""

    llm: LLM

    @property
    def longest(self) -> int:
        """Tokens that can be scored at once: the engine generates one more."""
        return self.llm.engine.scheduler.config.max_model_len - 1

    def likelihoods(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        """Of each pair, the sum of the continuation's log-probabilities in nats, and whether each of its tokens is the
        likeliest one. ValueError for a pair longer than ``longest``, or without context."""
        for context, continuation in pairs:
            if not context or len(context) + len(continuation) > self.longest:
                raise ValueError(
                    f"a context of {len(context)} and a continuation of {len(continuation)} tokens: scored are 1 token "
                    f"of context or more, and {self.longest} together (max_model_len={self.longest + 1})"
                )
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
        prompts = [[*context, *continuation] for context, continuation in pairs]
        for (context, _), output in zip(pairs, self._answers(prompts, [params] * len(pairs)), strict=True):
            yield _likelihood(output, len(context))

    def texts(self, contexts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[str]:
        """What follows each context, without the stop string that ended it. ValueError for an empty context."""
        for output in self._answers(contexts, params):
            yield output.outputs[0].text

    def _answers(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[RequestOutput]:
        for at in range(0, len(prompts), REQUESTS_PER_CALL):
            these = slice(at, at + REQUESTS_PER_CALL)
            yield from self.llm.generate(list(prompts[these]), list(params[these]), use_tqdm=watched())


def _likelihood(output: RequestOutput, num_context: int) -> tuple[float, bool]:
    """Of the prompt's tokens after the first ``num_context``."""
    assert output.prompt_logprobs is not None
    tokens, entries = output.prompt_token_ids[num_context:], output.prompt_logprobs[num_context:]
    chosen = [entry[token] for token, entry in zip(tokens, entries, strict=True) if entry is not None]
    return sum(c.logprob for c in chosen), all(c.rank == 1 for c in chosen)


def first_token(tokenizer: Any, given: int | None = None) -> int:
    """What comes before a text without context: what is given, or the token that begins texts, or the one that ends
    them. ValueError where there is none."""
    for token in (given, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError("the tokenizer has no token that begins or ends a text: give prefix_token_id")


def sampling_params(asked: Mapping[str, Any], end: str | None, max_gen_toks: int = MAX_GEN_TOKS) -> SamplingParams:
    """A task's generation arguments, by the harness's names and rules: greedy unless it asks for sampling, ``until``
    ends the answer, and so does the text ``end``. ValueError for arguments that nothing here honours."""
    asked = dict(asked)
    lengths = [asked.pop(name) for name in ANSWER_LENGTHS if name in asked]
    until = asked.pop("until", None) or []
    do_sample = asked.pop("do_sample", None)
    unknown = sorted(set(asked) - set(SAMPLING))
    if unknown:
        known = ", ".join(("until", *ANSWER_LENGTHS, "do_sample", *SAMPLING))
        raise ValueError(f"generation argument {unknown[0]}={asked[unknown[0]]!r} is not supported; known: {known}")
    temperature = float(asked.pop("temperature", 1.0 if do_sample else 0.0))
    return SamplingParams(
        temperature=0.0 if do_sample is False else temperature,
        max_tokens=int(next((length for length in lengths if length is not None), max_gen_toks)),
        stop=stop_strings(until, end),
        # A stop string may be the text of a special token, which has to be there to be found.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        **asked,
    )


def stop_strings(until: str | Sequence[str], end: str | None) -> list[str]:
    """Those that a task asks for and ``end``, each once; empty ones end nothing."""
    wanted = [until] if isinstance(until, str) else list(until)
    return list(dict.fromkeys(text for text in (*wanted, end) if text))
