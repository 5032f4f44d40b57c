"""Whether requests get the same tokens under a load as in one offline batch."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxserve import LLM, SamplingParams
from jaxserve.evaluation.clients import Call, Load
from jaxserve.evaluation.result import Check

TIE_NATS = 0.25
"""In 16 bits, other batch shapes round otherwise, and what is closer than this may be chosen either way: the demo
model's log-probabilities in bfloat16 are off by up to 0.2 nats (scripts/verify.py). In float32 nothing may differ."""
TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Difference:
    """An answer that is not the batch's, from a token on."""

    load: str
    call: int
    position: int
    """Of the first token that differs, in the answer."""
    margin: float
    """Nats between the two tokens, asked again; infinite where one is not among the likeliest."""
    allowed: float

    @property
    def is_tie(self) -> bool:
        return self.margin <= self.allowed


def offline_batch(llm: LLM, calls: Sequence[Call]) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens of every call."""
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(
        [c.prompt for c in calls], [c.params for c in calls], tenant=[c.tenant for c in calls], use_tqdm=False
    )
    return time.perf_counter() - start, [o.outputs[0].token_ids for o in outputs]


def differences(
    llm: LLM, calls: Sequence[Call], tokens: Sequence[list[int]], loads: Mapping[str, Sequence[Load]]
) -> list[Difference]:
    """Answers of ``loads`` that are not ``tokens``."""
    allowed = TIE_NATS if llm.engine.runner.params[0].dtype.itemsize < 4 else 0.0
    found = []
    for name, runs in loads.items():
        for answer in (a for load in runs for a in load.answers):
            batch = tokens[answer.call]
            if answer.tokens != batch:
                pairs = enumerate(zip(answer.tokens, batch, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(answer.tokens), len(batch)))
                margin = math.inf
                if at < min(len(answer.tokens), len(batch)):
                    before = [*calls[answer.call].prompt, *batch[:at]]
                    margin = _margin(llm, before, answer.tokens[at], batch[at])
                found.append(Difference(name, answer.call, at, margin, allowed))
    return found


def _margin(llm: LLM, before: list[int], a: int, b: int) -> float:
    """Nats between two tokens as the next one."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP_LOGPROBS, ignore_eos=True, detokenize=False)
    (entry,) = llm.generate([before], params, use_tqdm=False)[0].outputs[0].logprobs or [{}]
    return abs(entry[a].logprob - entry[b].logprob) if {a, b} <= set(entry) else math.inf


def wrong(found: Sequence[Difference]) -> list[Difference]:
    """Those that no tie explains."""
    return [d for d in found if not d.is_tie]


def token_check(found: Sequence[Difference], compared: int, figure: str) -> Check:
    """``compared``: answers; ``figure``: the name of what turns red for a load, as a format of {load}."""
    bad = wrong(found)
    detail = f"{len(bad)} of {compared} answers differ"
    if bad:
        first = bad[0]
        detail += f", first {first.load}, call {first.call}, token {first.position} by {first.margin:.2g} nats"
    if len(found) > len(bad):
        detail += f"; {len(found) - len(bad)} more from a token on where two are within {TIE_NATS:g} nats"
    names = tuple(sorted({figure.format(load=d.load) for d in bad}))
    return Check("tokens are those of the offline batch", not bad, detail, names)
