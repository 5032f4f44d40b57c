"""Requests to measure with: random tokens, conversations of a file, a recorded trace, prompts that begin alike.

They become ``clients.Call``s whose answers have a fixed number of tokens, so that every run does the same work. Nothing
here needs an engine: what is wrong with a file is said before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.evaluation.clients import Call
from jaxserve.evaluation.traces import read_trace

Lengths = tuple[int, int]
"""Of a uniform draw, both ends included."""


@dataclass(frozen=True)
class Workload:
    """What to ask."""

    calls: list[Call]
    arrivals: list[float] | None = None
    """Seconds after the start at which each is due; None where the data says nothing about it."""
    left_out: int = 0
    """Entries of the file that were no use: no answer, or too long."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(call.prompt) for call in self.calls)

    @property
    def num_output_tokens(self) -> int:
        return sum(call.num_tokens for call in self.calls)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and answer."""
        return max(len(call.prompt) + call.num_tokens for call in self.calls)

    @property
    def text(self) -> str:
        """For a headline."""
        asked, answered = self.num_prompt_tokens, self.num_output_tokens
        return f"{len(self.calls)} requests, {asked} prompt tokens, {answered} output tokens"

    @property
    def notes(self) -> dict[str, str]:
        """What else to say about it."""
        return {"left out": f"{self.left_out} conversations: no answer, or too long"} if self.left_out else {}


def random_workload(count: int, inputs: Lengths, outputs: Lengths, vocab_size: int, seed: int) -> Workload:
    """Uniform token ids."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*inputs, size=count, endpoint=True)
    prompts = [rng.integers(0, vocab_size, size=n).tolist() for n in lengths]
    answers = rng.integers(*outputs, size=count, endpoint=True).tolist()
    return Workload([_call(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])


def prefix_workload(
    count: int, num_prefixes: int, prefix_len: int, inputs: Lengths, outputs: Lengths, vocab_size: int, seed: int
) -> Workload:
    """Prompts that begin with one of ``num_prefixes`` times ``prefix_len`` tokens, in turn, and go on with ``inputs``
    random ones of their own."""
    rest = random_workload(count, inputs, outputs, vocab_size, seed)
    prefixes = np.random.default_rng([seed, 1]).integers(0, vocab_size, (num_prefixes, prefix_len)).tolist()
    group = [i % num_prefixes for i in range(count)]
    pairs = zip(rest.calls, group, strict=True)
    return Workload([_call(prefixes[g] + call.prompt, call.num_tokens, f"prefix {g}") for call, g in pairs])


def trace_workload(path: Path, count: int | None, vocab_size: int, seed: int) -> Workload:
    """The first ``count`` requests of a trace (None = all), with its arrival times. Raises ValueError with the line
    that is wrong, or if there are fewer."""
    trace = read_trace(path)
    _check_count(path, count, len(trace))
    trace = trace[:count]
    calls = [
        Call([token % vocab_size for token in a.tokens(i, seed)], a.output_tokens, a.tenant, "", a.priority)
        for i, a in enumerate(trace)
    ]
    return Workload(calls, [a.arrival for a in trace])


def sharegpt_workload(
    path: Path, count: int | None, output_len: int | None, tokenizer: Any, longest: int, seed: int
) -> Workload:
    """``count`` conversations of a ShareGPT file, drawn in an order of ``seed`` (None = all, in the file's order): the
    first turn asks, the answer is as long as the second (or ``output_len`` tokens).

    The file is a JSON array or JSON lines of {"conversations": [{"from": ..., "value": ...}, ...]}. Left out and
    counted: those where one of the two is missing or empty, and those of more than ``longest`` tokens. Raises
    ValueError with the line (or the number of the entry) that is no conversation, or if there are too few.
    """
    pairs = list(_first_turns(path))
    if count is not None:
        pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    calls, left_out = [], 0
    for question, answer in pairs:
        prompt = tokenizer.encode(question)
        length = output_len or len(tokenizer.encode(answer, add_special_tokens=False))
        if prompt and length and len(prompt) + length <= longest:
            calls.append(_call(prompt, length))
        else:
            left_out += 1
        if len(calls) == count:
            break
    if not calls:
        raise ValueError(f"{path}: none of its {len(pairs)} conversations has a question and an answer that fit")
    _check_count(path, count, len(calls))
    return Workload(calls, left_out=left_out)


def _call(prompt: list[int], num_tokens: int, group: str = "") -> Call:
    return Call(prompt, num_tokens, "", group)


def _check_count(path: Path, count: int | None, there: int) -> None:
    if count is not None and count > there:
        raise ValueError(f"{path}: {count} requests are asked for, it has {there} that can be used")


def _first_turns(path: Path) -> Iterator[tuple[str, str]]:
    """Question and answer of each conversation, "" for what it does not have."""
    for where, entry in _entries(path):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(isinstance(t, dict) and _is_text(t.get("value")) for t in turns):
            form = '{"conversations": [{"from": "human", "value": "..."}, ...]}'
            raise ValueError(f"{path}, {where}: it is no conversation like {form}")
        question, answer = ([t["value"] for t in turns] + ["", ""])[:2]
        yield question, answer


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _entries(path: Path) -> Sequence[tuple[str, Any]]:
    """Every entry with where it is."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return [(f"entry {i}", entry) for i, entry in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entries.append((f"line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    if not entries:
        raise ValueError(f"{path}: there is no conversation in it")
    return entries
