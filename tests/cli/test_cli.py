"""The command line, as a user types it: help, errors, options, and ``generate``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from command_line import GREEDY, Result, Run

import jaxserve.llm
from jaxserve import LLM, SamplingParams
from jaxserve.cli.options import EngineFlags, cache_directory
from jaxserve.commands import main
from jaxserve.engine_args import EngineArgs

BENCH = ["throughput", "latency", "startup", "scaling"]
COMMANDS = [["generate"], ["chat"], ["convert"], ["info"], ["plan"], *(["bench", name] for name in BENCH)]


# -- help and errors -----------------------------------------------------------------------------------------------


def test_help_loads_neither_jax_nor_transformers() -> None:
    check = "import sys, jaxserve.commands; print(*{'jax', 'transformers', 'numpy', 'orbax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_and_json(command: list[str], run: Run) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert f"$ jaxserve {' '.join(command)}" in result.out
    assert "--json" in result.out


@pytest.mark.parametrize("arguments", [[], ["bench"], ["--version"]])
def test_without_a_command_it_helps(arguments: list[str], run: Run) -> None:
    result = run(*arguments)
    assert result.code == 0
    assert "jaxserve" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["info", "--nonsense"], "No such option"),
        (["info", "-tp", "two"], "-tp"),
        (["info", "--model", "nowhere"], "model 'nowhere': no such directory"),
        (["info", "--mesh", "foo=2"], "mesh 'foo=2'"),
        (["info", "--mesh", "missing.toml"], "missing.toml: No such file or directory"),
        (["info", "--mesh", "tp=2", "-tp", "4"], "mesh says tp=2"),
        (["info", "--dtype", "int8"], "dtype='int8'"),
        (["info", "-pp", "5"], "pipeline_parallel_size=5: this model has 2 layers"),
        (["info", "--hf-overrides", "{"], "--hf-overrides '{': not JSON"),
        (["info", "--hf-overrides", "[1]"], "it is a JSON object"),
        (["generate", "--prompts-file", "missing.txt"], "missing.txt: No such file or directory"),
        (["generate", "--prompts-file", "missing.txt", "x"], "use one of them"),
        (["generate"], "stdin: no prompts"),
        (["generate", "--temperature", "-1", "x"], "temperature is -1.0"),
        (["generate", "--skip-tokenizer-init", "x"], "prompts are token ids"),
        (["generate", "--load-format", "zip", "x"], "load_format='zip'"),
        (["chat", "--chat-template", "missing.jinja"], "missing.jinja: No such file or directory"),
        (["bench", "throughput", "--input-len", "9-3"], "--input-len '9-3'"),
        (["generate", "--logit-bias", "[1]", "x"], "--logit-bias '[1]': it is a JSON object"),
        (["generate", "--temperature", "abc", "x"], "unable to parse string as a number, got 'abc' (see "),
        (["generate", "--num-gpu-blocks-override", "1", "x"], "num_gpu_blocks_override=1"),
        (["bench", "throughput", "--num-prompts", "0"], "--num-prompts"),
        (["bench", "throughput", "--num-prompts", "0"], "greater than or equal to 1, got '0' (see "),
        (["bench", "latency", "--output-len", "100000"], "the longest sequence is 128 tokens"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, run: Run, tiny_model: Path) -> None:
    has_model = "--model" in arguments or arguments[0] == "nonsense"
    result = run(*arguments, *([] if has_model else ["--model", tiny_model]))
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"prompt": 3', "line 2: not JSON"), ('{"text": "x"}', 'no object with "prompt"'), ("plain", "line 2: not JSON")],
)
def test_a_bad_line_of_jsonl_is_named(line: str, message: str, run: Run) -> None:
    result = run("generate", stdin='{"prompt": "a"}\n' + line)
    assert (result.code, message in result.err) == (2, True)


@pytest.mark.parametrize("name", ["prompts.txt", "stdin", "template.jinja", "lines"])
def test_what_is_no_utf8_is_named(
    name: str,
    made: list[dict[str, Any]],
    template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / name
    file.write_bytes(b"fine\nnot \xe9\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8"))
    arguments, message = {
        "prompts.txt": (["generate", "--prompts-file", file], f"{file}, line 2: no UTF-8 text (byte 0xe9)"),
        "stdin": (["generate"], "stdin, line 2: no UTF-8 text (byte 0xe9)"),
        "template.jinja": (["chat", "--chat-template", file], f"{file}, line 2: no UTF-8 text (byte 0xe9)"),
        "lines": (["chat", "--chat-template", template], "stdin: no UTF-8 text (byte 0xe9)"),
    }[name]
    with pytest.raises(SystemExit):
        main_with(monkeypatch, *map(str, arguments))
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(run: Run, tiny_model: Path) -> None:
    result = run("info", "--model", tiny_model, "-tp", "9")
    assert result.code == 2
    assert "tensor_parallel_size=9 does not fit this model: 8 query heads, 2 KV heads" in result.err


def test_a_traceback_is_shown_on_request(run: Run) -> None:
    result = run("--traceback", "info", "--model", "nowhere")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.endswith('no hub name ("owner/name")\n')


def test_ctrl_c_is_exit_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**options: Any) -> LLM:
        raise KeyboardInterrupt

    monkeypatch.setattr(jaxserve.llm, "LLM", interrupted)
    assert run("generate", "x") == Result(130, "", "interrupted\n")


def test_an_error_inside_a_library_is_a_bug_and_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(jaxserve.llm, "LLM", lambda **options: jnp.zeros((2,)).reshape(3))
    with pytest.raises(TypeError, match="cannot reshape"):
        main_with(monkeypatch, "generate", "x")


def main_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxserve", *arguments])
    main()


# -- options -------------------------------------------------------------------------------------------------------


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAXSERVE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_directory() == Path("/home/somebody/.cache/jaxserve/xla")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/jaxserve/xla")
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", "/own")
    assert cache_directory() == Path("/own/xla")
    assert EngineFlags().engine_options()["compilation_cache_dir"] == "/own/xla"
    assert EngineFlags(compilation_cache_dir="none").engine_options()["compilation_cache_dir"] is None
    assert EngineFlags(compilation_cache_dir="/c").engine_options()["compilation_cache_dir"] == "/c"


def test_without_flags_an_engine_is_what_llm_makes_of_it() -> None:
    args = EngineArgs(**EngineFlags().engine_options())
    assert replace(args, compilation_cache_dir=None) == EngineArgs(model="demo")


def test_engine_flags_reach_the_engine(run: Run, made: list[dict[str, Any]]) -> None:
    flags = {
        "--model": ("model", "m"),
        "--tokenizer": ("tokenizer", "t"),
        "--revision": ("revision", "r"),
        "--dtype": ("dtype", "float32"),
        "--kv-cache-dtype": ("kv_cache_dtype", "bfloat16"),
        "--load-format": ("load_format", "dummy"),
        "--mesh": ("mesh", "tp=2"),
        "-tp": ("tensor_parallel_size", 2),
        "-dp": ("data_parallel_size", 3),
        "-pp": ("pipeline_parallel_size", 1),
        "--seed": ("seed", 7),
        "--max-model-len": ("max_model_len", 99),
        "--max-num-seqs": ("max_num_seqs", 5),
        "--max-num-batched-tokens": ("max_num_batched_tokens", 50),
        "--block-size": ("block_size", 8),
        "--num-gpu-blocks-override": ("num_gpu_blocks_override", 40),
        "--kv-cache-memory-bytes": ("kv_cache_memory_bytes", 1000),
        "--gpu-memory-utilization": ("gpu_memory_utilization", 0.5),
        "--attention-backend": ("attention_backend", "reference"),
        "--matmul-backend": ("matmul_backend", "reference"),
        "--compilation-cache-dir": ("compilation_cache_dir", "/c"),
        "--hf-overrides": ("hf_overrides", {"a": 1}),
    }
    typed = [str(x) for flag, (_, value) in flags.items() for x in (flag, _typed(value))]
    assert run("generate", "hello", *GREEDY, *typed, "--no-enable-chunked-prefill").code == 0
    expected = dict(flags.values()) | {"enable_chunked_prefill": False}
    assert {name: made[0][name] for name in expected} == expected
    EngineArgs(**made[0])


def _typed(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


NO_FLAGS = ("detokenize", "output_kind", "structured_outputs", "extra_args")
"""Sampling parameters that a command sets itself, and those that are not supported."""


def test_sampling_flags_reach_the_request(
    run: Run, made: list[dict[str, Any]], tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingParams] = []
    monkeypatch.setattr(tiny_llm, "generate", lambda prompts, params, **_: seen.append(params) or [])
    flags = "--max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --presence-penalty 1 -n 2 --logprobs 3"
    flags += " --frequency-penalty 0.25 --repetition-penalty 1.5 --stop a --stop b --ignore-eos"
    flags += " --min-tokens 2 --stop-token-id 4 --stop-token-id 5 --bad-word c --bad-word d --allowed-token-id 6"
    flags += ' --allowed-token-id 7 --logit-bias {"6":-2.5} --request-seed 8 --prompt-logprobs 1'
    flags += " --include-stop-str-in-output --no-skip-special-tokens --no-spaces-between-special-tokens"
    assert run("generate", "hello", *flags.split()).code == 0
    assert run("generate", "hello").code == 0
    assert seen[0] == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        stop=["a", "b"],
        ignore_eos=True,
        n=2,
        logprobs=3,
        min_tokens=2,
        stop_token_ids=[4, 5],
        bad_words=["c", "d"],
        allowed_token_ids=[6, 7],
        logit_bias={6: -2.5},
        seed=8,
        prompt_logprobs=1,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )
    assert {f.name for f in fields(SamplingParams)} - set(NO_FLAGS) == {
        name for name in SamplingParams.__slots__ if getattr(seen[0], name) != getattr(SamplingParams(), name)
    }
    assert seen[1] == SamplingParams(max_tokens=64)


# -- generate ------------------------------------------------------------------------------------------------------


def test_generate_as_json(run: Run, made: list[dict[str, Any]], tiny_llm: LLM) -> None:
    result = run("generate", "hello", "bad", *GREEDY, "-n", "2", "--logprobs", "1", "--json")
    assert result.code == 0
    outputs = json.loads(result.out)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = tiny_llm.generate(["hello", "bad"], params, use_tqdm=False)
    assert [o["prompt"] for o in outputs] == ["hello", "bad"]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert [c["token_ids"] for c in ours["outputs"]] == [theirs.outputs[0].token_ids] * 2
        assert ours["outputs"][0]["text"] == theirs.outputs[0].text
        assert len(ours["outputs"][0]["logprobs"]) == 4
    assert result.err.startswith("2 requests, 2 prompt tokens (")
    assert "16 output tokens (" in result.err


def test_generate_for_people(run: Run, made: list[dict[str, Any]]) -> None:
    result = run("generate", "hello", "[bold]bad[/bold]", *GREEDY, "-n", "2", "--logprobs", "2")
    assert result.code == 0
    assert "━━ prompt 2/2\n[bold]bad[/bold]\n━━ completion 1/2 (length, 4 tokens)\n" in result.out
    assert result.out.count("rank 1") == 16
    assert "2 requests" in result.err


def test_log_probabilities_of_the_prompt_for_people(run: Run, made: list[dict[str, Any]], tiny_llm: LLM) -> None:
    result = run("generate", "hello, world", *GREEDY, "--prompt-logprobs", "1")
    prompt, _, completion = result.out.partition("━━ completion")
    num_tokens = len(tiny_llm.get_tokenizer().encode("hello, world"))
    assert result.code == 0 and num_tokens > 2
    assert (prompt.count("  rank "), completion.count("  rank ")) == (num_tokens - 1, 0)


@pytest.mark.parametrize("source", ["argument", "stdin", "file", "dash", "jsonl"])
def test_prompts_come_from_anywhere(source: str, run: Run, made: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("hello\n\nbad\n")
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "hello"}\n{"prompt": "bad"}\n')
    arguments, stdin = {
        "argument": (["hello", "bad"], ""),
        "stdin": ([], "hello\nbad\n"),
        "file": (["--prompts-file", lines], ""),
        "dash": (["--prompts-file", "-"], "hello\nbad"),
        "jsonl": (["--prompts-file", records], ""),
    }[source]
    outputs = json.loads(run("generate", *arguments, *GREEDY, "--json", stdin=stdin).out)
    assert [o["prompt"] for o in outputs] == ["hello", "bad"]


def test_token_ids_in_and_out_without_a_tokenizer(run: Run, made: list[dict[str, Any]]) -> None:
    result = run("generate", *GREEDY, "--skip-tokenizer-init", stdin='{"prompt_token_ids": [3, 4]}')
    assert result.code == 0
    prompt, completion = result.out.splitlines()[1], result.out.splitlines()[3]
    assert prompt == "[3, 4]"
    assert len(json.loads(completion)) == 4


def test_as_a_program_on_two_devices(tiny_model: Path, tiny_llm: LLM, tmp_path: Path) -> None:
    engine = "-tp 2 --max-num-seqs 1 --max-num-batched-tokens 16 --max-model-len 32 --num-gpu-blocks-override 8"
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    command = [sys.executable, "-m", "jaxserve", "generate", "--model", tiny_model, "hello", *GREEDY, "--json"]
    done = subprocess.run(
        [*command, *engine.split(), "--compilation-cache-dir", cache], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = tiny_llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids
    assert json.loads(done.stdout)[0]["outputs"][0]["token_ids"] == expected
