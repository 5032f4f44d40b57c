"""Beam search finds what a plain one over the oracle's log-probabilities finds, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from tiny_models import PROMPT, Oracle, interrupted, tokens_of
from tiny_tokenizers import byte_tokens

from jaxserve import LLM, BeamSearchOutput, BeamSearchParams, BeamSearchSequence, SamplingParams
from jaxserve.engine import Engine
from jaxserve.scheduler import QueueFullError, Scheduler

TOLERANCE = 2e-4
"""Per token, of log-probabilities; the oracle sums in another order."""
PROMPTS = [PROMPT, [9, 8, 7, 6, 5, 4, 3, 2, 1], [200]]

NextLogprobs = Callable[[tuple[int, ...]], np.ndarray]
"""Log-probabilities [V] of the token after these."""


@pytest.fixture(scope="module")
def next_logprobs(tiny_oracle: Oracle) -> NextLogprobs:
    return cache(lambda tokens: tiny_oracle.logprobs(tokens)[-1])


@pytest.fixture
def ending_llm(tiny_llm: LLM) -> LLM:
    """One for which every fifth token is an EOS, so that beams end."""
    return of_engine(tiny_llm, eos_token_ids=range(0, tiny_llm.engine.runner.decoder.vocab_size, 5))


def of_engine(llm: LLM, eos_token_ids: Sequence[int] | None = None, **config: Any) -> LLM:
    """One with other EOS tokens and another configuration of the scheduler, and the same programs and KV blocks: one of
    the two at a time. What is cached is forgotten."""
    llm.reset_prefix_cache()
    other, engine = copy(llm), llm.engine
    eos = engine.eos_token_ids if eos_token_ids is None else eos_token_ids
    other.engine = Engine(Scheduler(replace(engine.scheduler.config, **config)), engine.runner, engine.tokenizer, eos)
    return other


def found(llm: LLM, prompts: Any, params: BeamSearchParams, **options: Any) -> list[BeamSearchOutput]:
    """Search, and see that nothing is left behind."""
    outputs = llm.beam_search(prompts, params, use_tqdm=False, **options)
    assert_empty(llm)
    return outputs


def assert_empty(llm: LLM) -> None:
    assert not llm.engine.has_unfinished and not llm.engine.scheduler.has_unfinished
    llm.engine.scheduler.check_integrity()


# -- against a plain search --------------------------------------------------------------------------------------------


def plain_search(
    next_logprobs: NextLogprobs, prompt: list[int], params: BeamSearchParams, eos: Sequence[int]
) -> list[tuple[list[int], float]]:
    """The best (tokens, log-probability), every round to the last, all candidates kept and scored by the definition."""

    def score(beam: tuple[list[int], float]) -> float:
        tokens, logprob = beam
        return logprob / (len(tokens) - (tokens[-1] in eos)) ** params.length_penalty

    live, ended = [(prompt, 0.0)], []
    for _ in range(params.max_tokens):
        going = []
        for tokens, logprob in live:
            logprobs = next_logprobs(tuple(tokens))
            for token in np.argsort(-logprobs)[: 2 * params.beam_width].tolist():
                stops = token in eos and not params.ignore_eos
                (ended if stops else going).append(([*tokens, token], logprob + float(logprobs[token])))
        live = sorted(going, key=score, reverse=True)[: params.beam_width]
    return sorted(ended + live, key=score, reverse=True)[: params.beam_width]


def assert_same(sequences: list[BeamSearchSequence], expected: list[tuple[list[int], float]]) -> None:
    assert [s.tokens for s in sequences] == [tokens for tokens, _ in expected]
    for sequence, (_, logprob) in zip(sequences, expected, strict=True):
        assert sequence.cum_logprob == pytest.approx(logprob, abs=TOLERANCE * len(sequence.logprobs))


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["eos", "ignore_eos"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("beam_width", [1, 2, 3, 5])
def test_it_finds_what_a_plain_search_finds(
    ending_llm: LLM, next_logprobs: NextLogprobs, beam_width: int, length_penalty: float, ignore_eos: bool
) -> None:
    params = BeamSearchParams(beam_width, 7, ignore_eos=ignore_eos, length_penalty=length_penalty)
    outputs = found(ending_llm, PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert_same(output.sequences, plain_search(next_logprobs, prompt, params, ending_llm.engine.eos_token_ids))


def test_length_penalties_and_eos_matter_to_these_prompts(ending_llm: LLM) -> None:
    """Else the test above would say little: penalties choose differently, and some sequences end with EOS, others at
    their greatest length."""
    by_penalty = {
        p: found(ending_llm, PROMPTS, BeamSearchParams(3, 7, length_penalty=p)) for p in (-1.0, 0.0, 1.0, 2.5)
    }
    tokens = {p: str([[s.tokens for s in o.sequences] for o in outputs]) for p, outputs in by_penalty.items()}
    assert len(set(tokens.values())) >= 3
    eos = ending_llm.engine.eos_token_ids
    reasons = set()
    for prompt, output in zip(PROMPTS, by_penalty[1.0], strict=True):
        for s in output.sequences:
            last = s.tokens[-1]
            assert (s.finish_reason, s.stop_reason) == (("stop", last) if last in eos else ("length", None))
            assert s.finish_reason == "stop" or len(s.tokens) == len(prompt) + 7
            reasons.add(s.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_search_stops_when_nothing_can_overtake_what_has_ended(
    ending_llm: LLM, next_logprobs: NextLogprobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[int] = []
    generate = ending_llm.generate

    def counted(prompts: Any, *arguments: Any, **options: Any) -> Any:
        rounds.append(len(prompts))
        return generate(prompts, *arguments, **options)

    monkeypatch.setattr(ending_llm, "generate", counted)
    for length_penalty, most_rounds in ((0.0, 15), (1.0, 28), (-1.0, 15)):
        rounds.clear()
        params = BeamSearchParams(2, 30, length_penalty=length_penalty)
        (output,) = found(ending_llm, PROMPT, params)
        assert_same(output.sequences, plain_search(next_logprobs, PROMPT, params, ending_llm.engine.eos_token_ids))
        assert len(rounds) < most_rounds, length_penalty


def test_a_width_of_one_is_greedy(tiny_llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    outputs = found(tiny_llm, PROMPTS, BeamSearchParams(1, 12, ignore_eos=True))
    for prompt, output, expected in zip(
        PROMPTS, outputs, tiny_llm.generate(PROMPTS, greedy, use_tqdm=False), strict=True
    ):
        (sequence,) = output.sequences
        assert sequence.tokens == prompt + expected.outputs[0].token_ids
        assert sequence.cum_logprob == pytest.approx(expected.outputs[0].cumulative_logprob, abs=12 * TOLERANCE)


def test_prompts_are_searched_together_as_alone(ending_llm: LLM) -> None:
    params = BeamSearchParams(3, 6)
    together = found(ending_llm, PROMPTS, params)
    alone = [output for prompt in PROMPTS for output in found(ending_llm, prompt, params)]
    two_at_once = found(ending_llm, PROMPTS, params, concurrency_limit=2)
    uncached = found(
        of_engine(ending_llm, ending_llm.engine.eos_token_ids, enable_prefix_caching=False), PROMPTS, params
    )
    salted = found(ending_llm, [{"prompt_token_ids": p, "cache_salt": "s"} for p in PROMPTS], params)
    for others in (alone, two_at_once, uncached, salted):
        for output, other in zip(together, others, strict=True):
            assert_same(other.sequences, [(s.tokens, s.cum_logprob) for s in output.sequences])


def test_beams_share_what_they_have_in_common(tiny_llm: LLM) -> None:
    """A round computes at most a block of every beam; another salt shares nothing."""
    prompt, params, block_size = list(range(1, 101)), BeamSearchParams(3, 6, ignore_eos=True), 4
    rounds = 5 * params.beam_width * block_size
    tiny_llm.reset_prefix_cache()

    def computed(**salt: str) -> int:
        before = tiny_llm.get_metrics().snapshot()
        found(tiny_llm, {"prompt_token_ids": prompt, **salt}, params)
        return tiny_llm.get_metrics().num_prompt_tokens - before.num_prompt_tokens

    assert tiny_llm.engine.scheduler.config.block_size == block_size
    assert len(prompt) <= computed() <= len(prompt) + rounds
    assert computed() <= block_size + rounds
    assert len(prompt) <= computed(cache_salt="s") <= len(prompt) + rounds
    assert computed(cache_salt="s") <= block_size + rounds


# -- what a sequence holds ---------------------------------------------------------------------------------------------


def test_text_and_log_probabilities(tiny_llm: LLM) -> None:
    """Of sequences that end with EOS and others that do not."""
    tokenizer = tiny_llm.get_tokenizer()
    llm = of_engine(tiny_llm, byte_tokens(tokenizer, bytes(range(0, 250, 3))))
    for shown in (False, True):
        (output,) = found(llm, "hello wor", BeamSearchParams(4, 5, include_stop_str_in_output=shown))
        assert {s.finish_reason for s in output.sequences} == {"stop", "length"}
        for s in output.sequences:
            generated = s.tokens[len(tokenizer.encode("hello wor")) :]
            assert len(s.logprobs) == len(generated)
            entries = [entry[token] for entry, token in zip(s.logprobs, generated, strict=True)]
            assert s.cum_logprob == pytest.approx(sum(e.logprob for e in entries))
            assert all(len(entry) == 8 and e.decoded_token for entry in s.logprobs for e in entry.values())
            cut = s.finish_reason == "stop" and not shown
            assert s.text == tokenizer.decode(s.tokens[:-1] if cut else s.tokens)
            assert s.text is not None and s.text.startswith("hello wor")


def test_without_a_tokenizer_there_is_no_text(tiny_llm: LLM) -> None:
    llm = of_engine(tiny_llm)
    llm.engine.tokenizer = None
    (output,) = found(llm, PROMPT, BeamSearchParams(2, 3))
    assert [s.text for s in output.sequences] == [None, None]


def test_temperature_adds_a_sampled_candidate(tiny_llm: LLM, next_logprobs: NextLogprobs) -> None:
    llm = of_engine(tiny_llm)  # a new one, so that it draws the same tokens whatever ran before
    (output,) = found(llm, PROMPT, BeamSearchParams(1, 12, temperature=50.0, ignore_eos=True))
    (sequence,) = output.sequences
    assert {len(entry) for entry in sequence.logprobs} <= {2, 3} and len(sequence.logprobs[0]) == 3
    expected = sum(next_logprobs(tuple(sequence.tokens[:i]))[sequence.tokens[i]] for i in range(len(PROMPT), 17))
    assert sequence.cum_logprob == pytest.approx(expected, abs=12 * TOLERANCE)


def test_lengths_and_widths_have_limits(tiny_llm: LLM) -> None:
    """Sequences end at max_model_len, and there are no more candidates than tokens."""
    (output,) = found(tiny_llm, [3] * 125, BeamSearchParams(2, 50, ignore_eos=True))
    assert [(len(s.tokens), s.finish_reason) for s in output.sequences] == [(128, "length")] * 2
    vocab = tiny_llm.engine.runner.decoder.vocab_size
    (output,) = found(tiny_llm, PROMPT, BeamSearchParams(2 * vocab, 1))
    assert {s.tokens[-1] for s in output.sequences} == set(range(vocab))
    assert tiny_llm.beam_search([], BeamSearchParams(2, 2), use_tqdm=False) == []


# -- refusals and interruptions ----------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "beam_width": [0, -1, 2.0, True, None, "3"],
    "max_tokens": [0, None, 1.5],
    "temperature": [-0.5, float("nan"), "hot"],
    "length_penalty": [float("inf"), float("nan"), 11, None],
    "ignore_eos": [1],
    "include_stop_str_in_output": ["yes"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values], ids=str)
def test_wrong_values_are_refused(name: str, value: Any) -> None:
    values: dict[str, Any] = {"beam_width": 2, "max_tokens": 4, name: value}
    with pytest.raises(ValueError, match=rf"^{name} is .*must be ") as error:
        BeamSearchParams(**values)
    assert "\n" not in str(error.value)


def test_what_is_not_supported_is_refused_by_name(tiny_llm: LLM) -> None:
    unsupported: Any = {"json": "{}"}
    with pytest.raises(NotImplementedError, match="structured_outputs"):
        BeamSearchParams(2, 4, structured_outputs=unsupported)
    with pytest.raises(NotImplementedError, match="lora_request"):
        tiny_llm.beam_search(PROMPT, BeamSearchParams(2, 4), lora_request=unsupported)


def test_what_the_engine_cannot_hold_is_refused_before_anything_runs(tiny_llm: LLM) -> None:
    small, params = of_engine(tiny_llm, num_blocks=8, max_num_queued_requests=7), BeamSearchParams(4, 8)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        ([PROMPT, []], params, ValueError, "empty"),
        ([PROMPT, [1] * 128], params, ValueError, "max_model_len=128"),
        ([PROMPT, [100_000]], params, ValueError, "token id 100000 is outside"),
        ([PROMPT, [1] * 40], params, ValueError, "KV blocks"),
        ([PROMPT, PROMPT], params, QueueFullError, "max_num_queued_requests=7"),
        (PROMPT, SamplingParams(), ValueError, "BeamSearchParams"),
        (PROMPT, None, ValueError, "BeamSearchParams"),
    ]
    for prompts, given, kind, words in wrong:
        with pytest.raises(kind, match=words):
            small.beam_search(prompts, given, use_tqdm=False)
    for limit in (0, 1.5, True):
        with pytest.raises(ValueError, match="concurrency_limit"):
            small.beam_search(PROMPT, params, use_tqdm=False, concurrency_limit=limit)  # pyright: ignore[reportArgumentType]
    assert small.get_metrics().num_steps == 0
    assert_empty(small)
    assert len(found(small, [PROMPT, PROMPT], params, concurrency_limit=1)) == 2


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_interrupted_search_leaves_nothing_behind(tiny_llm: LLM, tiny_oracle: Oracle, steps: int) -> None:
    with interrupted(tiny_llm, steps):
        tiny_llm.beam_search(PROMPTS, BeamSearchParams(5, 9), use_tqdm=False)
    assert_empty(tiny_llm)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    assert tokens_of(tiny_llm.generate([PROMPT], greedy, use_tqdm=False)) == [tiny_oracle.greedy(PROMPT, greedy)]


def test_an_open_stream_comes_first(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream(PROMPT, SamplingParams(temperature=0))
    next(stream)
    with pytest.raises(RuntimeError, match="stream open"):
        tiny_llm.beam_search(PROMPT, BeamSearchParams(2, 4), use_tqdm=False)
    stream.close()
    assert_empty(tiny_llm)


def test_a_bar_counts_prompts(tiny_llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llm.beam_search(PROMPTS, BeamSearchParams(2, 3))
    assert "3/3" in capsys.readouterr().err
