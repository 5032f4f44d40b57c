"""Scores without harness and without engine: whole sequences through the plain float32 forward.

What ``lm_eval`` reports of a served model has to be this, but for rounding. The cuts between contexts and
continuations, the windows of long texts and greedy decoding are written out here once more, in the obvious way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxserve.cli.output import progress
from jaxserve.evaluation.agreement import LOGPROB_FLOOR, MEAN_FLOOR, ROUNDING
from jaxserve.evaluation.harness import Request
from jaxserve.evaluation.reference import PlainModel
from jaxserve.evaluation.scorer import sampling_params

STEP = 128
"""Lengths are filled up to a multiple of this: few programs, and short sequences stay cheap."""


@dataclass(frozen=True)
class Likelihood:
    """Of some tokens of a sequence, given those before them."""

    logprobs: np.ndarray
    """Nats [tokens]."""
    behind: np.ndarray
    """Nats by which each token is behind the likeliest; 0 if it is the likeliest."""

    @property
    def total(self) -> float:
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        return not self.behind.any()


@dataclass(frozen=True)
class Direct:
    """A plain model that takes text."""

    plain: PlainModel
    tokenizer: Any
    prefix: int
    """The token before a text."""
    longest: int
    """Tokens of a sequence that the served model scores at once."""
    eos_ids: frozenset[int]

    def pair(self, context: str, continuation: str) -> Likelihood:
        """Of a continuation. The blanks at the end of the context are the continuation's, as most tokenizers join
        them with the word that follows."""
        if not context:
            return self._of([self.prefix], self._encode(continuation, add_special_tokens=False))
        whole, start = self._encode(context + continuation), len(self._encode(context.rstrip()))
        return self._of(whole[:start] or [self.prefix], whole[start:])

    def rolling(self, text: str) -> Likelihood:
        """Of every token of a text, each predicted once, with as much before it as its window holds."""
        tokens, size = [self.prefix, *self._encode(text)], self.longest - 1
        parts = []
        for start in range(1, len(tokens), size):
            end = min(start + size, len(tokens))
            parts.append(self._of(tokens[max(0, end - size - 1) : start], tokens[start:end]))
        return Likelihood(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("logprobs", "behind")))

    def answer(self, context: str, stop: Sequence[str], max_tokens: int) -> str:
        """The greedy continuation, up to a stop string or the end."""
        tokens = self._encode(context)
        start, text = len(tokens), ""
        while len(tokens) < start + max_tokens:
            token = int(self._logprobs(tokens)[-1].argmax())
            if token in self.eos_ids:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens[start:], skip_special_tokens=False)
            if any(end in text for end in stop):
                break
        for end in stop:
            text = text.split(end)[0]
        return text

    def tie(self, context: str, answer: str) -> float:
        """Nats by which ``answer``'s first token that is not the likeliest is behind it."""
        start = len(self._encode(context))
        whole = self._encode(context + answer)
        behind = self._of(whole[:start], whole[start:]).behind
        return float(next((x for x in behind if x), np.inf))

    def fits(self, text: str, more: int) -> bool:
        """Whether the served model had room for a text and so many tokens without cutting it."""
        return len(self._encode(text)) + max(more, 1) <= self.longest + 1

    def _of(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        rows = self._logprobs([*context, *continuation])[len(context) - 1 : -1]
        chosen = rows[np.arange(len(continuation)), list(continuation)]
        return Likelihood(chosen, rows.max(axis=-1) - chosen)

    def _encode(self, text: str, **special: bool) -> list[int]:
        return self.tokenizer.encode(text, verbose=False, **special)  # else it warns of long texts

    def _logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        length = -(-len(tokens) // STEP) * STEP
        return replace(self.plain, length=length).forward(tokens, len(tokens)).logprobs


@dataclass(frozen=True)
class Allowed:
    """What rounding explains, measured on the same requests as in ``agreement``. Nats."""

    each: float
    """Of one log-probability."""
    spread: float
    """Of many: what adds up like the steps of a random walk."""
    drift: float
    """Of many: what has the same sign in all of them."""

    @classmethod
    def of(cls, exact: Sequence[Likelihood], rounded: Sequence[Likelihood]) -> Allowed:
        off = np.concatenate([np.zeros(1), *(r.logprobs - e.logprobs for e, r in zip(exact, rounded, strict=True))])
        return cls(
            max(LOGPROB_FLOOR, ROUNDING * float(np.abs(off).max())),
            max(MEAN_FLOOR, ROUNDING * float(np.sqrt(np.mean(off * off)))),
            ROUNDING * abs(float(off.mean())),
        )

    def total(self, count: int) -> float:
        """Of the sum of ``count`` log-probabilities."""
        return self.each + self.spread * count**0.5 + self.drift * count

    @property
    def tie(self) -> float:
        """Tokens closer than this may change places."""
        return 2 * self.each


@dataclass(frozen=True)
class LikelihoodRow:
    """A likelihood that was asked for, three times."""

    request: Request
    served: float
    greedy: bool | None
    """None where the harness did not ask."""
    exact: Likelihood
    rounded: Likelihood
    """Of the plain forward in the served dtype."""

    @property
    def error(self) -> float:
        return abs(self.served - self.exact.total)

    def right(self, allowed: Allowed) -> bool:
        """A token that is as good as the likeliest may count as either."""
        nearly = float(self.exact.behind.max(initial=0)) <= allowed.tie
        agreed = self.greedy is None or self.greedy == self.exact.greedy or nearly
        return self.error <= allowed.total(len(self.exact.logprobs)) and agreed


@dataclass(frozen=True)
class TextRow:
    """An answer, and what the plain forward would have said."""

    request: Request
    exact: str
    tie: float
    """Nats by which the served answer is behind where the two part; 0 if they do not."""

    def right(self, allowed: Allowed) -> bool:
        return self.tie <= allowed.tie


@dataclass(frozen=True)
class Agreement:
    """Answers of the harness beside direct scores."""

    likelihoods: list[LikelihoodRow]
    texts: list[TextRow]
    allowed: Allowed


def compare(requests: Sequence[Request], direct: Direct, dtype: Any) -> Agreement:
    """Score requests again that fit whole into the model and draw nothing by chance. ``dtype`` is the served one."""
    rounded = replace(direct, plain=direct.plain.rounded(dtype))
    likelihoods, texts = [], []
    for request in progress("direct scoring", requests):
        if request.kind == "generate_until":
            texts += _text(request, direct)
        elif request.kind == "loglikelihood_rolling":
            (text,) = request.arguments
            exact, off = direct.rolling(text), rounded.rolling(text)
            likelihoods.append(LikelihoodRow(request, float(request.answer), None, exact, off))
        elif direct.fits("".join(request.arguments), 0):
            (nats, greedy), exact, off = (
                request.answer,
                direct.pair(*request.arguments),
                rounded.pair(*request.arguments),
            )
            likelihoods.append(LikelihoodRow(request, float(nats), bool(greedy), exact, off))
    allowed = Allowed.of([row.exact for row in likelihoods], [row.rounded for row in likelihoods])
    return Agreement(likelihoods, texts, allowed)


def _text(request: Request, direct: Direct) -> list[TextRow]:
    context, asked = request.arguments
    params = sampling_params(asked, direct.tokenizer.eos_token)
    if not params.greedy or not direct.fits(context, params.max_tokens or 0):
        return []
    exact = direct.answer(context, params.stop, params.max_tokens or 0)
    return [TextRow(request, exact, 0.0 if exact == request.answer else direct.tie(context, request.answer))]
