"""How far a served model is from the plain forward of the same checkpoint, and how far it may be.

What it may be is measured, not chosen: the plain forward once more, in the dtype that is served, says what rounding
alone does. The served model may be off ``ROUNDING`` times as much, or by the floor of float32, whichever is more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.evaluation.reference import Forward, PlainModel
from jaxserve.layer_digest import LayerDigest

LOGPROB_FLOOR = 2e-4
"""Nats: what the tests allow between this engine and Hugging Face, both in float32."""
MEAN_FLOOR = LOGPROB_FLOOR / 10
"""Nats: of the mean over all entries."""
LAYER_FLOOR = 1e-4
"""Of a layer's rms: sums in another order. And two of the dtype's steps, since the largest value is a single number."""
ROUNDING = 3.0
"""The served mesh also rounds the partial sums that ranks add up, and KV blocks; and largest values scatter. The demo
model in bfloat16 over two ranks is off 1.6 times as much as the plain forward in bfloat16, on average."""
TOP = 5
"""Likeliest tokens that are compared at every position, beside the one that is there."""


@dataclass(frozen=True)
class Logprobs:
    """Every log-probability that was compared; all arrays [entries]."""

    request: np.ndarray
    position: np.ndarray
    """Of the token in its sequence."""
    generated: np.ndarray
    token: np.ndarray
    served: np.ndarray
    plain: np.ndarray
    rounded: np.ndarray
    """Of the plain forward in the served dtype."""

    @property
    def error(self) -> np.ndarray:
        return np.abs(self.served - self.plain)

    @property
    def rounding(self) -> np.ndarray:
        """What the dtype alone does."""
        return np.abs(self.rounded - self.plain)

    @property
    def tolerance(self) -> float:
        """Of each entry."""
        return max(LOGPROB_FLOOR, ROUNDING * float(self.rounding.max()))

    @property
    def mean_tolerance(self) -> float:
        """Of the mean of all."""
        return max(MEAN_FLOOR, ROUNDING * float(self.rounding.mean()))

    def to_json(self) -> dict[str, list[Any]]:
        return {name: array.tolist() for name, array in vars(self).items()}


@dataclass(frozen=True)
class Choice:
    """A greedy token that the plain forward would not have chosen."""

    request: int
    position: int
    served: int
    plain: int
    margin: float
    """Nats by which the plain forward prefers its own."""


@dataclass(frozen=True)
class LayerErrors:
    """Of every layer, as in ``LayerDigest``: the largest relative difference of its figures."""

    layer: list[int]
    error: list[float]
    rounded: list[float]
    epsilon: float
    """Of the served dtype."""

    @property
    def tolerance(self) -> float:
        return max(LAYER_FLOOR, 2 * self.epsilon, ROUNDING * max(self.rounded))

    @property
    def worst(self) -> int:
        """Place of the largest difference."""
        return int(np.argmax(self.error))

    @property
    def first_bad(self) -> int | None:
        """Place of the first layer that is off by too much."""
        return next((i for i, error in enumerate(self.error) if error > self.tolerance), None)

    def name(self, place: int) -> str:
        return layer_name(self.layer[place], len(self.layer) - 2)


def layer_name(layer: int, num_layers: int) -> str:
    return "embedding" if layer < 0 else "final norm" if layer == num_layers else f"layer {layer}"


def serve(llm: LLM, prompts: Sequence[list[int]], max_tokens: int) -> list[RequestOutput]:
    """Greedy answers of a fixed length, with log-probabilities of every token of prompts and answers."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=TOP, prompt_logprobs=TOP
    )
    return llm.generate(prompts, params, use_tqdm=False)


def sequence_of(output: RequestOutput) -> list[int]:
    return [*output.prompt_token_ids, *output.outputs[0].token_ids]


def forwards(plain: PlainModel, outputs: Sequence[RequestOutput]) -> list[Forward]:
    return [plain.forward(sequence_of(o), len(o.prompt_token_ids)) for o in outputs]


def compare_logprobs(
    outputs: Sequence[RequestOutput], plain: Sequence[Forward], rounded: Sequence[Forward]
) -> Logprobs:
    """Every entry that was served, at its place in the plain forwards."""
    rows = []
    for i, output in enumerate(outputs):
        prompt = len(output.prompt_token_ids)
        entries = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        for position, entry in enumerate(entries):
            for token, logprob in (entry or {}).items():
                at = position - 1, token
                values = logprob.logprob, plain[i].logprobs[at], rounded[i].logprobs[at]
                rows.append((i, position, position >= prompt, token, *map(float, values)))
    return Logprobs(*(np.array(column) for column in zip(*rows, strict=True)))


def other_choices(outputs: Sequence[RequestOutput], plain: Sequence[Forward]) -> list[Choice]:
    """Greedy tokens that are not the plain forward's, given the same tokens before them."""
    found = []
    for i, output in enumerate(outputs):
        for position, token in enumerate(output.outputs[0].token_ids, len(output.prompt_token_ids)):
            logprobs = plain[i].logprobs[position - 1]
            best = int(np.argmax(logprobs))
            if best != token:
                found.append(Choice(i, position, token, best, float(logprobs[best] - logprobs[token])))
    return found


def compare_layers(
    served: Sequence[LayerDigest], plain: Sequence[LayerDigest], rounded: Sequence[LayerDigest], epsilon: float
) -> LayerErrors:
    """``epsilon``: of the served dtype."""
    return LayerErrors(
        [d.layer for d in plain],
        [_difference(a, b) for a, b in zip(served, plain, strict=True)],
        [_difference(a, b) for a, b in zip(rounded, plain, strict=True)],
        epsilon,
    )


def _difference(a: LayerDigest, b: LayerDigest) -> float:
    """Of mean and rms over the rms, of the largest value over itself: it may be many times the rms, and is rounded as
    coarsely."""
    rms, largest = max(a.rms, b.rms, 1e-30), max(a.largest, b.largest, 1e-30)
    return max(abs(a.mean - b.mean) / rms, abs(a.rms - b.rms) / rms, abs(a.largest - b.largest) / largest)
