"""Every parameter does what it says, measured against a recomputation in plain Python; errors leave nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import PROMPT, SMALL, Oracle, one, run, tokens_of
from tiny_tokenizers import EOS, byte_tokens, word_tokenizer

from jaxserve import LLM, RequestOutputKind, SamplingParams
from jaxserve.outputs import CompletionOutput

TOLERANCE = 2e-4
"""Of log-probabilities; the oracle sums in another order."""


def letters(llm: LLM) -> list[int]:
    """Tokens of one letter each: with only these allowed, outputs are legible."""
    return byte_tokens(llm.get_tokenizer(), b"abcdefghijklmnopqrstuvwxyz")


# -- greedy, token by token, against the oracle ------------------------------------------------------------------------


def test_greedy_is_the_most_likely_token(tiny_llm: LLM, tiny_oracle: Oracle) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 288, n).tolist() for n in (1, 3, 4, 31, 33, 70, 110)]
    params = SamplingParams(temperature=0, max_tokens=12)
    for prompt, output in zip(prompts, run(tiny_llm, prompts, params), strict=True):
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == tiny_oracle.greedy(prompt, params)


EDITS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "presence rewards": {"presence_penalty": -1.5},
    "frequency": {"frequency_penalty": 0.7},
    "frequency rewards": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.6},
    "repetition rewards": {"repetition_penalty": 0.6},
    "all penalties": {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {17: 3.0, 60: -100.0, 200: 2.5}},
    "allowed": {"allowed_token_ids": [3, 9, 27, 81, 243]},
    "allowed with bias and penalty": {
        "allowed_token_ids": [3, 9, 27],
        "logit_bias": {9: -1.0, 100: 50.0},
        "frequency_penalty": 1.0,
    },
}
PLAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_greedy_tokens_as_defined(tiny_llm: LLM, tiny_oracle: Oracle, edit: str) -> None:
    params = SamplingParams(**PLAIN | EDITS[edit])
    tokens = one(tiny_llm, **PLAIN | EDITS[edit]).token_ids
    assert tokens == tiny_oracle.greedy(PROMPT, params)
    assert tokens != one(tiny_llm, **PLAIN).token_ids


def test_edits_of_one_request_do_not_reach_another(tiny_llm: LLM, tiny_oracle: Oracle) -> None:
    """More requests than slots, so that each slot serves requests with and without edits in turn."""
    many = [SamplingParams(**PLAIN | edit) for edit in [*EDITS.values(), {}] * 2]
    prompts = [[i, *PROMPT] for i in range(len(many))]
    for prompt, params, output in zip(prompts, many, run(tiny_llm, prompts, many), strict=True):
        assert output.outputs[0].token_ids == tiny_oracle.greedy(prompt, params), params


def test_a_slot_forgets_the_edits_of_its_last_request(tiny_llm: LLM, tiny_oracle: Oracle) -> None:
    slots = SMALL["max_num_seqs"]
    edited, plain = SamplingParams(**PLAIN | EDITS["allowed"]), SamplingParams(**PLAIN)
    run(tiny_llm, [PROMPT] * slots, edited)
    outputs = run(tiny_llm, [PROMPT] * slots, [plain] * (slots - 1) + [edited])
    assert [o.outputs[0].token_ids for o in outputs[:-1]] == [tiny_oracle.greedy(PROMPT, plain)] * (slots - 1)


# -- what may be sampled -----------------------------------------------------------------------------------------------


def kept(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """Tokens that min_p, top_k and top_p leave, one after the other, by sorting."""
    scaled = logits / params.temperature
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    order, probabilities = order[probabilities >= params.min_p], probabilities[probabilities >= params.min_p]
    if params.top_k > 0:
        order, probabilities = order[: params.top_k], probabilities[: params.top_k]
    before = np.cumsum(probabilities) - probabilities
    return set(order[before < params.top_p * probabilities.sum()].tolist())


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "presence_penalty": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_only_what_truncation_leaves_is_sampled(
    tiny_llm: LLM, tiny_oracle: Oracle, options: dict[str, Any], temperature: float
) -> None:
    params = SamplingParams(n=4, seed=1, max_tokens=15, ignore_eos=True, temperature=temperature, **options)
    (output,) = run(tiny_llm, [PROMPT], params)
    seen_unlikely = 0
    for completion in output.outputs:
        for i, token in enumerate(completion.token_ids):
            logits = tiny_oracle.edited(PROMPT, completion.token_ids[:i], params)
            assert token in kept(logits, params)
            seen_unlikely += token != np.argmax(logits)
    assert seen_unlikely > 5
    free = SamplingParams(n=4, seed=1, max_tokens=15, ignore_eos=True, temperature=temperature)
    assert tokens_of(run(tiny_llm, [PROMPT], free)) != tokens_of([output])


def test_top_k_of_one_and_low_temperature_are_greedy(tiny_llm: LLM) -> None:
    greedy = one(tiny_llm, temperature=0, max_tokens=12)
    assert one(tiny_llm, temperature=2.0, top_k=1, max_tokens=12).token_ids == greedy.token_ids
    assert one(tiny_llm, temperature=0.001, max_tokens=12).token_ids == greedy.token_ids
    assert one(tiny_llm, temperature=2.0, seed=0, max_tokens=12).token_ids != greedy.token_ids


def test_seeds(tiny_llm: LLM) -> None:
    first, again, other = (one(tiny_llm, seed=s, max_tokens=12).token_ids for s in (7, 7, 8))
    assert first == again != other
    unseeded = run(tiny_llm, [PROMPT] * 2, SamplingParams(max_tokens=12))
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


@pytest.mark.parametrize("seed", [-5, 2**31, 2**32 + 3, 2**63, 2**64 - 1, 2**70])
def test_any_integer_is_a_seed(tiny_llm: LLM, seed: int) -> None:
    tokens = one(tiny_llm, seed=seed, max_tokens=12).token_ids
    assert tokens == one(tiny_llm, seed=seed, max_tokens=12).token_ids
    assert tokens != one(tiny_llm, seed=seed + 2**33, max_tokens=12).token_ids


def test_n_completions(tiny_llm: LLM) -> None:
    outputs = run(tiny_llm, [PROMPT, [9]], SamplingParams(n=3, seed=3, max_tokens=10, logprobs=1, prompt_logprobs=1))
    for output in outputs:
        assert [c.index for c in output.outputs] == [0, 1, 2]
        assert len({tuple(c.token_ids) for c in output.outputs}) == 3
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert outputs[0].outputs[0].token_ids == one(tiny_llm, seed=3, max_tokens=10).token_ids
    assert one(tiny_llm, n=1, temperature=0).index == 0


# -- endings -----------------------------------------------------------------------------------------------------------


def test_max_tokens(tiny_llm: LLM) -> None:
    for count in (1, 2, 9):
        completion = one(tiny_llm, max_tokens=count, ignore_eos=True, temperature=0)
        assert (len(completion.token_ids), completion.finish_reason, completion.stop_reason) == (count, "length", None)
    limit = SMALL["max_model_len"]
    completion = one(tiny_llm, list(range(100)), max_tokens=None, ignore_eos=True)
    assert (len(completion.token_ids), completion.finish_reason) == (limit - 100, "length")
    completion = one(tiny_llm, list(range(100)), max_tokens=1000, ignore_eos=True)
    assert len(completion.token_ids) == limit - 100
    assert len(one(tiny_llm, list(range(limit - 1)), max_tokens=None).token_ids) == 1


def test_eos_and_ignore_eos(tiny_llm: LLM) -> None:
    eos = tiny_llm.get_tokenizer().eos_token_id
    options: dict[str, Any] = {"temperature": 0, "logit_bias": {eos: 100}, "max_tokens": 4}
    completion = one(tiny_llm, **options)
    assert (completion.token_ids, completion.text) == ([eos], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    completion = one(tiny_llm, **options, ignore_eos=True)
    assert (completion.token_ids, completion.finish_reason) == ([eos] * 4, "length")


def test_eos_in_the_middle(tiny_llm: LLM, tiny_oracle: Oracle) -> None:
    eos = tiny_llm.get_tokenizer().eos_token_id
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "presence_penalty": 2.0, "logit_bias": {eos: 1.5}}
    completion = one(tiny_llm, **options)
    assert completion.token_ids == tiny_oracle.greedy(PROMPT, SamplingParams(**options))
    assert 1 < len(completion.token_ids) < 40 and completion.token_ids[-1] == eos


def test_min_tokens(tiny_llm: LLM, tiny_oracle: Oracle) -> None:
    eos = tiny_llm.get_tokenizer().eos_token_id
    for ending in ({"logit_bias": {eos: 100}}, {"logit_bias": {8: 100}, "stop_token_ids": [8]}):
        for least in (0, 1, 3):
            params: dict[str, Any] = {"temperature": 0, "min_tokens": least, "max_tokens": 10} | ending
            completion = one(tiny_llm, **params)
            assert completion.token_ids == tiny_oracle.greedy(PROMPT, SamplingParams(**params))
            assert len(completion.token_ids) == least + 1
            assert completion.finish_reason == "stop"


def test_stop_token_ids(tiny_llm: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "frequency_penalty": 2.0}
    options["allowed_token_ids"] = letters(tiny_llm)
    full = one(tiny_llm, **options)
    stop = full.token_ids[5]
    length = full.token_ids.index(stop) + 1
    completion = one(tiny_llm, **options, stop_token_ids=[stop, 250])
    assert completion.token_ids == full.token_ids[:length]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == full.text[: length - 1]
    included = one(tiny_llm, **options, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert included.text == full.text[:length]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_stop_strings_across_tokens(tiny_llm: LLM, include: bool, length: int) -> None:
    options: dict[str, Any] = {"seed": 3, "max_tokens": 20, "allowed_token_ids": letters(tiny_llm)}
    full = one(tiny_llm, **options)
    assert len(full.text) == len(full.token_ids) == 20
    stop = full.text[9 : 9 + length]
    end = full.text.index(stop) + length
    completion = one(tiny_llm, **options, stop=["not there", stop], include_stop_str_in_output=include)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == full.text[: end if include else end - length]
    assert completion.token_ids == full.token_ids[:end]


def test_stop_strings_inside_tokens(tiny_llm: LLM) -> None:
    (hello,) = tiny_llm.get_tokenizer().encode("hello")
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "allowed_token_ids": [hello]}
    for stop, text, count in (("ell", "h", 1), ("loh", "hel", 2), ("olleh", "hello" * 4, 4), ("lohello", "hel", 2)):
        completion = one(tiny_llm, **options, stop=stop)
        assert (completion.text, len(completion.token_ids)) == (text, count)
    completion = one(tiny_llm, **options, stop=["lohe", "ell"], include_stop_str_in_output=True)
    assert (completion.text, completion.stop_reason) == ("hell", "ell")
    assert len(one(tiny_llm, **options, stop="ell", min_tokens=2).token_ids) == 3
    for least, text, count in ((0, "hel", 2), (1, "hel", 2), (2, "hellohel", 3)):
        completion = one(tiny_llm, **options, stop="loh", min_tokens=least)  # with 1 it begins too early to end there
        assert (completion.text, len(completion.token_ids)) == (text, count)


def test_a_stop_string_held_back_is_released_at_the_end(tiny_llm: LLM) -> None:
    (hello,) = tiny_llm.get_tokenizer().encode("hello")
    completion = one(tiny_llm, temperature=0, max_tokens=2, allowed_token_ids=[hello], stop="lohello!")
    assert (completion.text, completion.finish_reason) == ("hellohello", "length")


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_is_what_the_tokenizer_decodes(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.get_tokenizer()
    (output,) = run(tiny_llm, "hello world", SamplingParams(n=4, seed=0, max_tokens=40))
    assert output.prompt == "hello world"
    assert output.prompt_token_ids == tokenizer.encode("hello world")
    for completion in output.outputs:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_prompts_of_every_kind(tiny_llm: LLM) -> None:
    ids = tiny_llm.get_tokenizer().encode("hello")
    params = SamplingParams(temperature=0, max_tokens=4)
    kinds: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    together = tokens_of(run(tiny_llm, kinds, params))
    alone = [tokens_of(run(tiny_llm, kind, params))[0] for kind in kinds]
    assert together == alone == [together[0]] * 4
    assert run(tiny_llm, [], params) == []


def test_detokenize(tiny_llm: LLM) -> None:
    with_text, without = (one(tiny_llm, temperature=0, detokenize=d, logprobs=1) for d in (True, False))
    assert with_text.token_ids == without.token_ids
    assert with_text.text and not without.text
    assert with_text.logprobs is not None and without.logprobs is not None
    assert all(entry.decoded_token is not None for step in with_text.logprobs for entry in step.values())
    assert all(entry.decoded_token is None for step in without.logprobs for entry in step.values())


def test_skip_special_tokens(tiny_llm: LLM) -> None:
    eos = tiny_llm.get_tokenizer().eos_token_id
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "allowed_token_ids": [eos]}
    assert one(tiny_llm, **options).text == ""
    assert one(tiny_llm, **options, skip_special_tokens=False).text == EOS * 3


def test_spaces_between_special_tokens(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    words = word_tokenizer()  # the only kind whose decoder puts spaces between tokens
    monkeypatch.setattr(tiny_llm.engine, "tokenizer", words)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "allowed_token_ids": [words.eos_token_id]}
    options |= {"ignore_eos": True, "skip_special_tokens": False}
    assert one(tiny_llm, **options).text.strip() == " ".join([EOS] * 3)
    assert one(tiny_llm, **options, spaces_between_special_tokens=False).text.strip() == EOS * 3


def test_bad_words(tiny_llm: LLM, tiny_oracle: Oracle) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "allowed_token_ids": letters(tiny_llm)[:4]}
    text = one(tiny_llm, **options).text
    for words in ([text[0]], [text[:2]], [text[3:6]], [text[0], text[1:3], text[4:9]]):
        completion = one(tiny_llm, **options, bad_words=words)
        assert not any(word in completion.text for word in words)
        assert completion.text != text
        assert completion.token_ids == tiny_oracle.greedy(PROMPT, SamplingParams(**options, bad_words=words))


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_output_kinds(tiny_llm: LLM, kind: RequestOutputKind) -> None:
    options: dict[str, Any] = {"seed": 3, "max_tokens": 12, "logprobs": 1, "allowed_token_ids": letters(tiny_llm)}
    options["stop"] = ["zzzz", "qqqq"]
    prompts = [PROMPT, [9, 10]]
    final = [run(tiny_llm, [p], SamplingParams(**options))[0].outputs[0] for p in prompts]
    streamed: dict[str, list[CompletionOutput]] = {}
    for output in tiny_llm.stream(prompts, SamplingParams(**options, output_kind=kind)):
        streamed.setdefault(output.request_id, []).append(output.outputs[0])
        assert output.finished == (output.outputs[0].finish_reason is not None)
    for whole, parts in zip(final, [streamed[i] for i in sorted(streamed, key=int)], strict=True):
        assert [p.finish_reason for p in parts] == [None] * (len(parts) - 1) + ["length"]
        assert len(parts) == (1 if kind is RequestOutputKind.FINAL_ONLY else 12)
        if kind is RequestOutputKind.DELTA:
            assert [len(p.token_ids) for p in parts] == [len(p.logprobs or ()) for p in parts] == [1] * 12
            assert "".join(p.text for p in parts) == whole.text
            assert [t for p in parts for t in p.token_ids] == whole.token_ids
        else:
            last = parts[-1]
            assert (last.text, last.token_ids, last.stop_reason) == (whole.text, whole.token_ids, whole.stop_reason)
            assert last.cumulative_logprob == pytest.approx(whole.cumulative_logprob, abs=TOLERANCE)
            assert all(whole.text.startswith(p.text) for p in parts)
            assert all(whole.token_ids[: len(p.token_ids)] == p.token_ids for p in parts)
    assert not tiny_llm.engine.has_unfinished


def test_what_is_new_of_a_prompt_comes_once(tiny_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0, output_kind=RequestOutputKind.DELTA)
    outputs = list(tiny_llm.stream([PROMPT], params))
    assert [len(output.prompt_logprobs or ()) for output in outputs] == [len(PROMPT), 0, 0]


def test_leaving_a_stream_early_aborts_it(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream([PROMPT, [9]], SamplingParams(max_tokens=50))
    next(stream)
    assert tiny_llm.engine.has_unfinished
    stream.close()
    assert not tiny_llm.engine.has_unfinished and not tiny_llm.engine.scheduler.has_unfinished
    tiny_llm.engine.scheduler.check_integrity()


def test_a_stream_begins_with_its_call(tiny_llm: LLM) -> None:
    """What is wrong is said at once; what nobody reads is aborted when it is closed or forgotten."""
    with pytest.raises(ValueError, match="99999"):
        tiny_llm.stream([[99999]])
    for end in (lambda stream: stream.close(), lambda stream: None):
        stream = tiny_llm.stream([PROMPT], SamplingParams(max_tokens=50))
        assert tiny_llm.engine.has_unfinished
        end(stream)
        del stream
        assert not tiny_llm.engine.has_unfinished


def test_a_call_from_another_thread_is_refused(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even before the first one has a request in the engine."""
    params = SamplingParams(temperature=0, max_tokens=4)
    expected = tokens_of(run(tiny_llm, [PROMPT], params))
    refused: list[str] = []

    def call() -> None:
        with pytest.raises(RuntimeError) as error:
            tiny_llm.generate([[9]], params, use_tqdm=False)
        refused.append(str(error.value))

    def add_request(*arguments: Any, **request: Any) -> None:
        monkeypatch.undo()
        other = Thread(target=call)
        other.start()
        other.join()
        tiny_llm.engine.add_request(*arguments, **request)

    monkeypatch.setattr(tiny_llm.engine, "add_request", add_request)
    assert tokens_of(run(tiny_llm, [PROMPT], params)) == expected
    assert len(refused) == 1 and "in another call" in refused[0] and "AsyncLLM" in refused[0]


def test_one_call_at_a_time(tiny_llm: LLM) -> None:
    """A second call is refused, and takes nothing from the first one's outputs."""
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = tokens_of(run(tiny_llm, [PROMPT], params))
    stream = tiny_llm.stream([PROMPT], params)
    streamed = [next(stream)]
    with pytest.raises(RuntimeError, match="stream"):
        tiny_llm.generate([[9]], params, use_tqdm=False)
    streamed += stream
    assert len(streamed) == 12
    assert tokens_of(streamed[-1:]) == expected
    assert len(run(tiny_llm, [[9]], params)) == 1


# -- log-probabilities -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2, 20, 25, -1])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs(tiny_llm: LLM, tiny_oracle: Oracle, count: int, temperature: float) -> None:
    """Raw ones, whatever the temperature and the penalties do to the choice."""
    prompt = list(range(40, 90))
    params = SamplingParams(
        temperature=temperature, seed=1, max_tokens=6, logprobs=count, prompt_logprobs=count, presence_penalty=1.0
    )
    (output,) = run(tiny_llm, [prompt], params)
    (completion,) = output.outputs
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    tokens = [*prompt, *completion.token_ids]
    entries = [*output.prompt_logprobs, *completion.logprobs]
    assert entries[0] is None and len(entries) == len(tokens)
    expected = tiny_oracle.logprobs(tokens)
    for token, entry, raw in zip(tokens[1:], entries[1:], expected, strict=False):
        assert entry is not None
        num_top = len(raw) if count < 0 else count
        assert set(np.argsort(-raw)[:num_top]) | {token} == set(entry)
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(raw[other], abs=TOLERANCE)
            assert np.sum(raw > raw[other] + TOLERANCE) < logprob.rank <= np.sum(raw > raw[other] - TOLERANCE)
    total = sum(entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_no_logprobs_unless_asked_for(tiny_llm: LLM) -> None:
    (output,) = run(tiny_llm, [PROMPT], SamplingParams(max_tokens=2))
    (completion,) = output.outputs
    assert output.prompt_logprobs is completion.logprobs is completion.cumulative_logprob is None


def test_logprobs_of_different_widths_in_one_batch(tiny_llm: LLM) -> None:
    widths = [0, None, 3, -1, 1]
    outputs = run(tiny_llm, [PROMPT] * 5, [SamplingParams(temperature=0, max_tokens=2, logprobs=w) for w in widths])
    for width, output in zip(widths, outputs, strict=True):
        logprobs = output.outputs[0].logprobs
        if width is None:
            assert logprobs is None
        else:
            assert logprobs is not None
            assert [len(entry) for entry in logprobs] == [288 if width < 0 else max(width, 1)] * 2


# -- programs ----------------------------------------------------------------------------------------------------------


def test_nothing_compiles_after_warm_up(tiny_llm: LLM, tiny_model: Path) -> None:
    """Not the engine's own programs, and not any small one that an eager operation would make."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    before = tiny_llm.compiled_programs()
    rng = np.random.default_rng(1)
    options: list[dict[str, Any]] = [*EDITS.values(), {"temperature": 0.9, "top_k": 5}, {"top_p": 0.5, "min_p": 0.1}]
    options += [{"logprobs": w, "prompt_logprobs": v} for w, v in ((0, 3), (25, 0), (-1, -1), (5, None))]
    many = [SamplingParams(max_tokens=int(rng.integers(1, 20)), n=1 + i % 2, **o) for i, o in enumerate(options * 2)]
    prompts = [rng.integers(0, 288, rng.integers(1, 100)).tolist() for _ in many]
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        run(tiny_llm, prompts, many)
        assert not compiled
        jax.jit(lambda x: x + 1)(np.int32(1))
        assert compiled  # that is what the event is called
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert tiny_llm.compiled_programs() == before
    assert before and all(record.seconds > 0 and record.started >= 0 for record in before)


def test_a_shape_that_was_not_compiled_is_an_error(tiny_llm: LLM) -> None:
    """Not a slow step: the engine would rather stop than compile while it serves."""
    runner, before = tiny_llm.engine.runner, tiny_llm.compiled_programs()
    missing = replace(runner.config.layouts[0], num_tokens=3, num_seqs=3)
    with pytest.raises(RuntimeError, match=r"decode\[tokens=3, seqs=3\] was not compiled at warm-up"):
        runner.step_program(missing, runner.num_blocks)
    assert tiny_llm.compiled_programs() == before


def test_metrics(tiny_llm: LLM) -> None:
    before = tiny_llm.get_metrics()
    prompts, generated = before.num_prompt_tokens, before.num_generation_tokens
    finished = dict(before.num_finished)
    (output,) = run(tiny_llm, [list(range(50))], SamplingParams(max_tokens=7, ignore_eos=True))
    after = tiny_llm.get_metrics()
    assert (after.num_prompt_tokens - prompts, after.num_generation_tokens - generated) == (50, 7)
    assert after.num_finished == finished | {"length": finished["length"] + 1}
    assert 0 < after.host_share < 1
    m = output.metrics
    assert m is not None and m.first_scheduled_time and m.first_token_time and m.last_token_time and m.finished_time
    assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.last_token_time <= m.finished_time
