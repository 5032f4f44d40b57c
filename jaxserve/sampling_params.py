"""What a request may ask of sampling: values checked once, here, and trusted everywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any

SMALLEST_TEMPERATURE = 1e-5
"""Dividing logits by less than this overflows float32; 0 itself means greedy."""

FLOAT32 = (2.0**-126, 2.0**127)
"""The least and the largest number that a device surely tells from 0 and from infinity."""

WHOLE_VOCABULARY = -1
"""As ``logprobs`` or ``prompt_logprobs``: every token of the vocabulary."""


class RequestOutputKind(Enum):
    """Which part of a request's output each ``RequestOutput`` carries."""

    CUMULATIVE = 0
    """Everything generated so far, in every ``RequestOutput``."""
    DELTA = 1
    """Only what is new since the previous ``RequestOutput``."""
    FINAL_ONLY = 2
    """Everything generated, once, when the request has finished."""


@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """How to sample one request. Every value is validated and normalised when the object is made.

    A wrong type or value raises ``ValueError``, ``structured_outputs`` ``NotImplementedError``; each message
    names the parameter, the value seen and what is allowed. The constructor accepts more types than the
    fields hold: lists become tuples, a single ``stop`` string a tuple of one.
    """

    n: int
    """Completions per prompt, >= 1."""
    presence_penalty: float
    """Subtracted from the logit of every token already generated; in [-2, 2]."""
    frequency_penalty: float
    """Subtracted once per earlier occurrence in the output; in [-2, 2]."""
    repetition_penalty: float
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; > 0, 1 = off."""
    temperature: float
    """0 = greedy, else >= 1e-5."""
    top_p: float
    """Keep the most likely tokens whose probabilities sum to this; in (0, 1], 1 = off."""
    top_k: int
    """Keep this many most likely tokens; 0 or -1 = all."""
    min_p: float
    """Drop tokens less likely than this share of the most likely one's probability; in [0, 1], 0 = off."""
    seed: int | None
    """Any integer makes the request reproducible. None lets the engine choose, and -1 is read as None."""
    stop: tuple[str, ...]
    """Strings that end the generation; they need ``detokenize``."""
    stop_token_ids: tuple[int, ...]
    """Token ids that end the generation, besides EOS."""
    ignore_eos: bool
    """Whether to go on after EOS."""
    max_tokens: int | None
    """Most tokens to generate, >= 1; None = up to the model's length limit."""
    min_tokens: int
    """Tokens to generate before EOS, a stop token or a stop string may end the request; <= ``max_tokens``."""
    logprobs: int | None
    """Most likely tokens to report per generated token, besides the sampled one; -1 = all tokens."""
    prompt_logprobs: int | None
    """The same for every prompt token."""
    detokenize: bool
    """Whether to turn the output into text."""
    skip_special_tokens: bool
    """Whether to leave special tokens out of the text."""
    spaces_between_special_tokens: bool
    """Whether adjacent added tokens may be separated by the space that some tokenizers put between tokens."""
    include_stop_str_in_output: bool
    """Whether the text ends after the stop string, instead of before it."""
    output_kind: RequestOutputKind
    """What each ``RequestOutput`` carries."""
    structured_outputs: None
    """Not supported: must be None."""
    logit_bias: tuple[tuple[int, float], ...]
    """(token id, value in [-100, 100] added to its logit) pairs. Given as a dict, keys may be digits."""
    allowed_token_ids: tuple[int, ...] | None
    """The only tokens that may be sampled; None = all."""
    bad_words: tuple[str, ...]
    """Words that must not be generated."""
    extra_args: None
    """Not supported: must be None or empty."""

    # Written by hand so that what is accepted can be wider than what is stored, to a type checker as well.
    def __init__(
        self,
        *,
        n: int = 1,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        detokenize: bool = True,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
        output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        structured_outputs: None = None,
        logit_bias: Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        bad_words: Sequence[str] | None = None,
        extra_args: Mapping[str, Any] | None = None,
    ) -> None:
        given = locals()
        for field in fields(self):
            object.__setattr__(self, field.name, given[field.name])
        self.__post_init__()

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        self._check_numbers()
        self._check_counts()
        self._check_flags()
        self._check_strings()
        self._check_token_ids()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def all_stop_token_ids(self, eos_ids: Iterable[int]) -> tuple[int, ...]:
        """The token ids that end this request, sorted; ``eos_ids`` are among them unless ``ignore_eos``."""
        return tuple(sorted({*self.stop_token_ids, *(() if self.ignore_eos else eos_ids)}))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if a parameter asks for tokens that a vocabulary of this size lacks."""
        named_ids = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(token_id for token_id, _ in self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
        }
        for name, token_ids in named_ids.items():
            unknown = [token_id for token_id in token_ids if token_id >= vocab_size]
            if unknown:
                raise ValueError(f"{name} has token ids {unknown}; this model's are 0 to {vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                raise ValueError(f"{name} is {count}; it must be <= {vocab_size}, the vocabulary (-1 = all)")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse_unsupported(self) -> None:
        if self.structured_outputs is not None:
            raise NotImplementedError("structured_outputs is not supported; it must be None")
        if self.extra_args:
            raise ValueError(f"extra_args is {self.extra_args!r}; no extra arguments are supported")
        self._set("extra_args", None)

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, "in [-2, 2]", lambda value: -2.0 <= value <= 2.0)
        self._number("repetition_penalty", "> 0, in float32", lambda value: FLOAT32[0] <= value <= FLOAT32[1])
        self._number(
            "temperature",
            f"0 (greedy) or >= {SMALLEST_TEMPERATURE}, in float32",
            lambda value: value == 0.0 or SMALLEST_TEMPERATURE <= value <= FLOAT32[1],
        )
        self._number("top_p", "in (0, 1], in float32", lambda value: FLOAT32[0] <= value <= 1.0)
        self._number("min_p", "in [0, 1]", lambda value: 0.0 <= value <= 1.0)

    def _check_counts(self) -> None:
        self._integer("n", "an integer >= 1", minimum=1)
        self._integer("top_k", "an integer >= 0 (0 or -1 = all tokens)", minimum=-1)
        self._integer("seed", "an integer or None", optional=True)
        if self.seed == -1:
            self._set("seed", None)
        self._integer("max_tokens", "an integer >= 1 or None (the model's limit)", minimum=1, optional=True)
        self._integer("min_tokens", "an integer >= 0", minimum=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must be <= max_tokens, {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            allowed = "an integer >= 0, -1 (whole vocabulary) or None"
            self._integer(name, allowed, minimum=WHOLE_VOCABULARY, optional=True)

    def _check_flags(self) -> None:
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            allowed = ", ".join(str(kind) for kind in RequestOutputKind)
            raise ValueError(f"output_kind is {self.output_kind!r}; it must be one of {allowed}")

    def _check_strings(self) -> None:
        self._set("stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        if self.stop and not self.detokenize:
            raise ValueError(f"stop is {list(self.stop)!r}; stop strings need detokenize=True")
        self._set("bad_words", _strings("bad_words", self.bad_words))

    def _check_token_ids(self) -> None:
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _bias_pairs(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty; it must have at least one token id, or be None")

    def _number(self, name: str, allowed: str, is_allowed: Callable[[float], bool]) -> None:
        value = _real(name, getattr(self, name), f"a number {allowed}")
        if not math.isfinite(value) or not is_allowed(value):
            raise ValueError(f"{name} is {value}; it must be {allowed}")
        self._set(name, value)

    def _integer(self, name: str, allowed: str, *, minimum: int | None = None, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        value = _int(name, value, allowed)
        if minimum is not None and value < minimum:
            raise ValueError(f"{name} is {value}; it must be {allowed}")
        self._set(name, value)


def _int(name: str, value: object, allowed: str) -> int:
    # Integral also admits numpy integers; a bool is Integral too, but never what was meant.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return int(value)


def _real(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return float(value)


def _items(name: str, values: object, allowed: str) -> list[Any]:
    if values is None:
        return []
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}; it must be {allowed}")
    return list(values)


def _strings(name: str, values: object) -> tuple[str, ...]:
    allowed = "a list of non-empty strings"
    items = _items(name, values, allowed)
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{name} contains {item!r}; it must be {allowed}")
        if not item:
            raise ValueError(f"{name} contains an empty string; it must be {allowed}")
    return tuple(items)


def _token_id(name: str, value: object) -> int:
    allowed = "an integer >= 0"
    token_id = _int(f"a token id of {name}", value, allowed)
    if token_id < 0:
        raise ValueError(f"a token id of {name} is {token_id}; it must be {allowed}")
    return token_id


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    return tuple(_token_id(name, value) for value in _items(name, values, "a list of token ids"))


def _bias_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    # Pairs, not a dict, so that the object can be hashed and pickled; ``replace`` hands them back to us.
    allowed = "a dict of token id to bias"
    pairs = bias.items() if isinstance(bias, Mapping) else _items("logit_bias", bias, allowed)
    normalised: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"logit_bias contains {pair!r}; it must be {allowed}")
        token_id, value = _bias_pair(*pair)
        if token_id in normalised:
            raise ValueError(f"logit_bias has token id {token_id} twice; each may appear once")
        normalised[token_id] = value
    return tuple(normalised.items())


def _bias_pair(key: object, value: object) -> tuple[int, float]:
    # JSON has only string keys, so HTTP requests name token ids by their digits.
    if isinstance(key, str) and key.isascii() and key.isdigit():
        key = int(key)
    token_id = _token_id("logit_bias", key)
    allowed = "a number in [-100, 100]"
    bias = _real(f"logit_bias of token {token_id}", value, allowed)
    if not -100.0 <= bias <= 100.0:
        raise ValueError(f"logit_bias of token {token_id} is {bias}; it must be {allowed}")
    return token_id, bias
