"""What a request adds to its logits: one row over the vocabulary, rewritten only when it changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.sampling_params import SamplingParams

IN_PROMPT = 1 << 30
"""Set in a token's count if the prompt has it."""


def has_penalties(params: SamplingParams) -> bool:
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    return penalties != (0.0, 0.0, 1.0)


def edits_logits(params: SamplingParams) -> bool:
    """Whether the request needs a row of its own."""
    return bool(params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens)


class LogitEdits:
    """logit_bias, allowed_token_ids, bad_words and min_tokens of one request.

    ``bad_words``: token sequences that must not appear in the output; ``ending``: ids that end the request, kept
    out until ``min_tokens`` are there.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        ending: Sequence[int],
        bad_words: Sequence[tuple[int, ...]],
    ) -> None:
        self.min_tokens, self.ending = params.min_tokens, sorted(ending)
        self.sequences = [word for word in bad_words if len(word) > 1]
        self._written: tuple[int, ...] | None = None
        self._base = np.zeros(vocab_size, np.float32)
        if params.allowed_token_ids is not None:
            self._base[:] = -np.inf
            self._base[list(params.allowed_token_ids)] = 0.0
        for token_id, bias in params.logit_bias:
            self._base[token_id] += bias
        self._base[[word[0] for word in bad_words if len(word) == 1]] = -np.inf

    def _banned(self, output: Sequence[int], num_output: int) -> tuple[int, ...]:
        """Tokens that may not come next, besides those that never may."""
        banned = list(self.ending) if num_output < self.min_tokens else []
        banned += [w[-1] for w in self.sequences if tuple(output[len(output) - len(w) + 1 :]) == w[:-1]]
        return tuple(sorted(set(banned)))

    def row(self, output: Sequence[int], num_output: int, *, rewrite: bool) -> np.ndarray | None:
        """The row float32 [V] for the next token; None if the one written last still holds.

        ``output``: the tokens that are known; ``num_output``: how many there are, which may be more, unless there are
        sequences to look for.
        """
        banned = self._banned(output, num_output)
        if not rewrite and banned == self._written:
            return None
        self._written = banned
        row = self._base.copy()
        row[list(banned)] = -np.inf
        return row


def token_counts(prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> np.ndarray:
    """int32 [V]: how often each token is in the output, plus ``IN_PROMPT`` for those in the prompt."""
    counts = np.bincount(np.asarray(output, np.int64), minlength=vocab_size).astype(np.int32)
    counts[np.unique(np.asarray(prompt, np.int64))] += IN_PROMPT
    return counts
