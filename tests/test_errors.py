"""What cannot be served is refused with one line that says why, and leaves the engine as it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import PROMPT, Oracle, interrupted, one, run, tokens_of, with_blocks

from jaxserve import LLM, SamplingParams
from jaxserve.engine_args import EngineArgs
from jaxserve.interrupts import Uninterrupted

BAD_CALLS: dict[str, tuple[Any, Any, list[str]]] = {
    "no tokens": ([[]], None, ["empty"]),
    "no text": ("", None, ["empty"]),
    "one of many is empty": ([PROMPT, []], None, ["empty"]),
    "too long": ([[1] * 128], None, ["128", "127", "max_model_len"]),
    "token id too large": ([[1, 288]], None, ["288", "287"]),
    "negative token id": ([[1, -1]], None, ["-1"]),
    "too few params": ([PROMPT] * 3, [SamplingParams()] * 2, ["2 sampling_params", "3 prompts"]),
    "unknown key": ({"prompt": "a", "images": []}, None, ["images"]),
    "two prompts in one": ({"prompt": "a", "prompt_token_ids": [1]}, None, ["prompt"]),
    "stop token outside": (PROMPT, SamplingParams(stop_token_ids=[288]), ["stop_token_ids", "288"]),
    "bias outside": (PROMPT, SamplingParams(logit_bias={300: 1.0}), ["logit_bias", "300"]),
    "too many logprobs": (PROMPT, SamplingParams(logprobs=289), ["logprobs", "289", "288"]),
    "nothing may be sampled": (
        PROMPT,
        SamplingParams(allowed_token_ids=[7], stop_token_ids=[7], min_tokens=2),
        ["allowed_token_ids", "min_tokens=2"],
    ),
    "bytes": (b"Q: hi", None, ["b'Q: hi'", "text, token ids"]),
    "bytes among others": ([PROMPT, b"Q: hi"], None, ["prompts[1]", "b'Q: hi'", "token ids"]),
    "a set has no order": ({5, 6}, None, ["prompts {5, 6}"]),
    "text for token ids": ({"prompt_token_ids": "Q: hi"}, None, ["prompt_token_ids 'Q: hi'", "list of token ids"]),
    "token ids for text": ({"prompt": [1, 2]}, None, ["'prompt' [1, 2]", "prompt_token_ids"]),
    "a prompt in a prompt": ({"prompt": {"prompt": "x"}}, None, ["'prompt' {'prompt': 'x'}", "text"]),
    "a picture": ({"prompt": "a", "multi_modal_data": {"image": 1}}, None, ["'multi_modal_data' is not supported"]),
    "no Unicode": ("ab\udcff", None, [r"'ab\udcff'", "no valid Unicode text", "character 3"]),
    "which one is too long": ([PROMPT, [1] * 128], None, ["prompts[1]", "128"]),
    "which one is no prompt": ([PROMPT, PROMPT, {"text": "a"}], None, ["prompts[2]", "'text'"]),
    "a prompt of great length": ({"text": "a" * 10_000}, None, ["aaa...: it holds", "'text' is not supported"]),
    "params as a dict": (PROMPT, {"temperature": 0}, ["sampling_params {'temperature': 0}", "SamplingParams"]),
    "which params": ([PROMPT] * 2, [SamplingParams(), None], ["sampling_params[1] None", "SamplingParams"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_and_the_engine_stays_usable(tiny_llm: LLM, case: str) -> None:
    prompts, params, words = BAD_CALLS[case]
    steps = tiny_llm.get_metrics().num_steps
    with pytest.raises(ValueError) as error:
        tiny_llm.generate(prompts, params, use_tqdm=False)
    assert_one_line(error.value, *words)
    assert tiny_llm.get_metrics().num_steps == steps
    assert one(tiny_llm, temperature=0).token_ids


def test_bad_words_that_leave_nothing_to_sample(tiny_llm: LLM) -> None:
    allowed = tiny_llm.get_tokenizer().encode("ab")
    params = SamplingParams(allowed_token_ids=[*allowed, 7], bad_words=["a", "b"], stop_token_ids=[7], min_tokens=1)
    with pytest.raises(ValueError) as error:
        tiny_llm.generate(PROMPT, params, use_tqdm=False)
    assert_one_line(error.value, "allowed_token_ids", "bad_words and min_tokens=1")
    params = SamplingParams(allowed_token_ids=allowed, bad_words=["a"], max_tokens=3)
    assert tokens_of(run(tiny_llm, [PROMPT], params)) == [allowed[1:] * 3]


def assert_one_line(error: BaseException, *words: str) -> None:
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("prompt", [5, None, [1.5, 2], [[1.5, 2]], [[True]], [None], [["a"]]], ids=str)
def test_what_is_no_prompt_is_refused(tiny_llm: LLM, prompt: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        tiny_llm.generate(prompt, use_tqdm=False)
    assert_one_line(error.value, "prompt")


def test_an_array_of_token_ids_is_a_prompt(tiny_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    expected = tokens_of(run(tiny_llm, [PROMPT], params))
    assert tokens_of(run(tiny_llm, [np.array(PROMPT)], params)) == expected
    assert tokens_of(run(tiny_llm, np.array(PROMPT), params)) == expected


def test_a_request_that_the_blocks_can_never_hold(tiny_llm: LLM) -> None:
    llm = with_blocks(tiny_llm, 9)
    with pytest.raises(ValueError) as error:
        llm.generate([[1] * 30], SamplingParams(max_tokens=20), use_tqdm=False)
    assert_one_line(error.value, "30 prompt tokens", "max_tokens=20", "13 KV blocks of 4", "has 8")
    assert len(one(llm, [1] * 30, max_tokens=2, ignore_eos=True).token_ids) == 2
    assert len(one(llm, [1] * 10, max_tokens=22, ignore_eos=True).token_ids) == 22


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_interrupted_call_leaves_nothing_behind(tiny_llm: LLM, tiny_oracle: Oracle, steps: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, presence_penalty=1.0)
    with interrupted(tiny_llm, steps):
        tiny_llm.generate([PROMPT] * 7, params, use_tqdm=False)
    assert not tiny_llm.engine.has_unfinished and not tiny_llm.engine.scheduler.has_unfinished
    tiny_llm.engine.scheduler.check_integrity()
    assert tokens_of(run(tiny_llm, [PROMPT] * 5, params)) == [tiny_oracle.greedy(PROMPT, params)] * 5


@pytest.fixture
def sigint() -> Iterator[None]:
    """As at a terminal: a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["step_program", "_write_slot_program"])
@pytest.mark.usefixtures("sigint")
def test_ctrl_c_after_arrays_were_given_away(
    tiny_llm: LLM, tiny_oracle: Oracle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has taken the state, and what it returned is nowhere yet: the signal waits until it is."""
    params, runner = SamplingParams(temperature=0, max_tokens=6, presence_penalty=1.0), tiny_llm.engine.runner
    find = getattr(runner, name)

    def then_a_signal(*asked: Any) -> Any:
        program = find(*asked)

        def run_and_signal(*arrays: Any) -> Any:
            outputs = program(*arrays)
            signal.raise_signal(signal.SIGINT)
            return outputs

        return run_and_signal

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, name, then_a_signal)
        tiny_llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert tokens_of(run(tiny_llm, [PROMPT] * 3, params)) == [tiny_oracle.greedy(PROMPT, params)] * 3


@pytest.mark.usefixtures("sigint")
def test_the_second_ctrl_c_does_not_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
        signal.raise_signal(signal.SIGINT)
        done.append("second")
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_only_the_main_thread_waits_with_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def other() -> None:
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]


UNSUPPORTED: dict[str, Any] = {
    "enable_lora": True,
    "quantization": "awq",
    "speculative_config": {"num_speculative_tokens": 2},
    "enable_expert_parallel": True,
    "trust_remote_code": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_arguments_are_refused_by_name(tiny_model: Path, name: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        LLM(tiny_model, **{name: UNSUPPORTED[name]})
    assert_one_line(error.value, name, "not supported")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_paralel_size": 2}, ["tensor_paralel_size", "tensor_parallel_size"]),
        ({"dtype": "float8"}, ["dtype", "float8", "bfloat16"]),
        ({"load_format": "gguf"}, ["load_format", "gguf", "safetensors"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "0"]),
        ({"block_size": -4}, ["block_size", "-4"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization", "1.5"]),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, ["max_num_seqs", "64", "max_num_batched_tokens", "32"]),
        ({"decode_buckets": (2, 1), "max_num_seqs": 2}, ["decode_buckets", "max_num_seqs"]),
        ({"token_buckets": (16,), "max_num_batched_tokens": 32, "max_num_seqs": 2}, ["token_buckets", "32"]),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 32, "max_num_seqs": 2},
            ["enable_chunked_prefill"],
        ),
        ({"attention_backend": "flash"}, ["flash", "reference", "cpu"]),
        ({"kv_cache_memory_bytes": 1000}, ["kv_cache_memory_bytes", "1,000"]),
        ({"num_gpu_blocks_override": 1}, ["num_gpu_blocks_override"]),
        ({"max_model_len": 8, "mesh": "tp=9"}, ["9", "8 query heads", "2 KV heads"]),
        ({"seed": "a"}, ["seed='a'", "a whole number"]),
        ({"seed": 1.5}, ["seed=1.5", "a whole number"]),
        ({"seed": None}, ["seed=None", "a whole number"]),
        ({"max_num_seqs": True}, ["max_num_seqs=True", "a whole number or None"]),
        ({"tensor_parallel_size": "2"}, ["tensor_parallel_size='2'", "a whole number"]),
        ({"async_scheduling": 1}, ["async_scheduling=1", "True or False"]),
        ({"enable_prefix_caching": None}, ["enable_prefix_caching=None", "True or False"]),
        ({"gpu_memory_utilization": "a"}, ["gpu_memory_utilization='a'", "a number"]),
        ({"swap_space": "a"}, ["swap_space='a'", "a number or None"]),
        ({"mesh": {"tp": 2}}, ["mesh={'tp': 2}", "dp=2,tp=2", "TOML", "MeshConfig"]),
        ({"hf_overrides": 5}, ["hf_overrides=5", "a mapping whose keys are texts or None"]),
        ({"hf_overrides": {1: 2}}, ["hf_overrides={1: 2}", "keys are texts"]),
        ({"hf_overrides": {"max_position_embedding": 9}}, ["hf_overrides", "mean 'max_position_embeddings'?"]),
        ({"decode_buckets": (1, 2.5)}, ["decode_buckets=(1, 2.5)", "a list of whole numbers or None"]),
        ({"token_buckets": ()}, ["token_buckets=()", "at least one number"]),
        ({"fairness": {"tenants": 5}}, ["fairness tenants=5", "mapping", "TenantConfig"]),
        ({"fairness": {"tenants": {"a": {"weight": True}}}}, ["tenant weight=True", "a number"]),
        ({"trust_remote_code": 0}, ["trust_remote_code=0", "True or False"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_refused_by_name(tiny_model: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        LLM(tiny_model, use_tqdm_on_load=False, **options)
    assert_one_line(error.value, *words)


@pytest.mark.parametrize("field", [field.name for field in fields(EngineArgs)])
def test_no_argument_takes_just_anything(field: str) -> None:
    value = object()
    options: dict[str, Any] = {"model": "demo", field: value}
    with pytest.raises((ValueError, NotImplementedError)) as error:
        EngineArgs(**options)
    assert_one_line(error.value, f"{field}={value!r}")


@pytest.mark.parametrize("model", [None, "", 5])
def test_what_is_no_name_of_a_model(model: Any) -> None:
    with pytest.raises(ValueError) as error:
        LLM(model)
    assert_one_line(error.value, f"model={model!r}")


def test_numbers_and_lists_of_either_kind_are_taken() -> None:
    EngineArgs(model=Path("demo"), tokenizer=Path("demo"), swap_space=1, gpu_memory_utilization=1)
    EngineArgs(model="demo", decode_buckets=[1, 2])  # pyright: ignore[reportArgumentType]


def test_keys_that_say_nothing_are_ignored(tiny_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    prompt = {"prompt_token_ids": PROMPT, "multi_modal_data": None, "cache_salt": None}
    assert tokens_of(run(tiny_llm, [prompt], params)) == tokens_of(run(tiny_llm, [PROMPT], params))


# -- conversations -----------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
WITH_TOOLS = TEMPLATE + "{% if tools %}{{ tools | length }} tools{% endif %}"
USER = {"role": "user", "content": "hi"}
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_parts_of_text_are_joined(tiny_llm: LLM) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
    prompts = tiny_llm.chat_prompts([[{"role": "user", "content": parts}], [USER]], chat_template=TEMPLATE)
    decode = tiny_llm.get_tokenizer().decode
    assert [decode(prompt) for prompt in prompts] == ["user:hi\nyou;", "user:hi;"]


def test_tools_are_for_templates_that_take_them(tiny_llm: LLM) -> None:
    (prompt,) = tiny_llm.chat_prompts([USER], chat_template=WITH_TOOLS, tools=TOOLS)
    assert tiny_llm.get_tokenizer().decode(prompt) == "user:hi;1 tools"
    with pytest.raises(ValueError, match="takes no tools"):
        tiny_llm.chat_prompts([USER], chat_template=TEMPLATE, tools=TOOLS)
    assert tiny_llm.chat_prompts([USER], chat_template=TEMPLATE, tools=[])


MESSAGES = 'a list of {"role": ..., "content": ...}'


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ("hello", {}, ["messages 'hello'", MESSAGES]),
        (USER, {}, ["messages {'role': 'user', 'content': 'hi'}", MESSAGES]),
        (5, {}, ["messages 5", MESSAGES]),
        ([[]], {}, ["messages []", MESSAGES]),
        (["hello"], {}, ["messages 'hello'", MESSAGES]),
        ([USER, "hello"], {}, ["message 'hello'", MESSAGES]),
        ([{"content": "hi"}], {}, ["message {'content': 'hi'}", MESSAGES]),
        ([{"role": "user"}], {}, ["message {'role': 'user'}", "content is a text, or a list"]),
        ([[USER], [{"role": "user", "content": 5}]], {}, ["messages[1]", "content is a text, or a list"]),
        ([USER | {"content": [PICTURE]}], {}, ["'image_url' is not supported", '{"type": "text"']),
        ([USER | {"content": ["hi"]}], {}, ["content part 'hi'", '{"type": "text"']),
        ([USER | {"content": [{"type": "text", "text": 5}]}], {}, ["'text': 5", '{"type": "text"']),
        ([USER | {"content": "\udcff"}], {}, ["content", "no valid Unicode text"]),
        ([USER], {"chat_template": 5}, ["chat_template=5", "Jinja template, or None"]),
        ([USER], {"chat_template": "file.jinja"}, ["chat_template='file.jinja'", "Jinja template, or None"]),
        ([USER], {"add_generation_prompt": 1}, ["add_generation_prompt=1", "True or False"]),
        ([USER], {"tools": 5}, ["tools=5", "list of mappings"]),
    ],
)
def test_what_is_no_conversation(tiny_llm: LLM, messages: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        tiny_llm.chat_prompts(messages, **{"chat_template": TEMPLATE} | options)
    assert_one_line(error.value, *words)


def test_unsupported_arguments_of_generate(tiny_llm: LLM) -> None:
    with pytest.raises(NotImplementedError, match="lora_request"):
        tiny_llm.generate(PROMPT, use_tqdm=False, lora_request=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotImplementedError, match="structured_outputs"):
        SamplingParams(structured_outputs={"json": {}})  # pyright: ignore[reportArgumentType]


def test_a_model_that_is_not_there() -> None:
    for name in ("no/such/directory", "./nowhere", "just-a-name"):
        with pytest.raises(FileNotFoundError) as error:
            LLM(name)
        assert_one_line(error.value, name)
