"""The command line, as a user types it: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxserve.cli.measure as measure
import jaxserve.llm
from jaxserve import LLM, SamplingParams
from jaxserve.build import ModelFiles, load_model
from jaxserve.cli import main
from jaxserve.cli.bench import parse_range
from jaxserve.cli.chat import Conversation
from jaxserve.cli.options import EngineFlags, cache_directory
from jaxserve.cli.output import bytes_text, count_text, jsonable, seconds_text
from jaxserve.engine_args import EngineArgs
from jaxserve.sampling_params import RequestOutputKind
from jaxserve.weights.orbax import is_orbax
from sharding import MeshConfig, ShardingRules, build_mesh

COMMANDS = [["generate"], ["chat"], ["convert"], ["info"], ["bench", "throughput"], ["bench", "latency"]]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the entry point in this process: (arguments, stdin) -> exit code and what was written."""

    def run(*arguments: str | Path, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["jaxserve", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            main()
        written = capsys.readouterr()
        return Result(int(exit_.value.code or 0), written.out, written.err)

    return run


@pytest.fixture
def made(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Commands get the shared engine; the options that they asked for one with are here."""
    asked: list[dict[str, Any]] = []

    def make(**options: Any) -> LLM:
        asked.append(options)
        return tiny_llm

    monkeypatch.setattr(jaxserve.llm, "LLM", make)
    monkeypatch.setattr(measure, "LLM", make)
    return asked


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return path


# -- help and errors -----------------------------------------------------------------------------------------------


def test_help_loads_neither_jax_nor_transformers() -> None:
    check = "import sys, jaxserve.cli; print(*{'jax', 'transformers', 'numpy', 'orbax'} & set(sys.modules))"
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
        (["info", "-pp", "2"], "pipeline_parallel_size=2 is not supported yet"),
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
        (["bench", "throughput", "--num-prompts", "0"], "--num-prompts"),
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


def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(run: Run, tiny_model: Path) -> None:
    result = run("info", "--model", tiny_model, "-tp", "3")
    assert result.code == 2
    assert "tensor_parallel_size=3 does not fit this model: 8 query heads, 2 KV heads" in result.err


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


def test_sampling_flags_reach_the_request(
    run: Run, made: list[dict[str, Any]], tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingParams] = []
    monkeypatch.setattr(tiny_llm, "generate", lambda prompts, params, **_: seen.append(params) or [])
    flags = "--max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --presence-penalty 1 -n 2 --logprobs 3"
    flags += " --frequency-penalty 0.25 --repetition-penalty 1.5 --stop a --stop b --ignore-eos"
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
    )
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
    engine = "-tp 2 --max-num-seqs 2 --max-num-batched-tokens 16 --max-model-len 32 --num-gpu-blocks-override 8"
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    command = [sys.executable, "-m", "jaxserve", "generate", "--model", tiny_model, "hello", *GREEDY, "--json"]
    done = subprocess.run(
        [*command, *engine.split(), "--compilation-cache-dir", cache], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = tiny_llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids
    assert json.loads(done.stdout)[0]["outputs"][0]["token_ids"] == expected


# -- chat ----------------------------------------------------------------------------------------------------------


def test_chat_answers_lines_in_one_conversation(
    run: Run, made: list[dict[str, Any]], template: Path, tiny_llm: LLM
) -> None:
    result = run("chat", "--chat-template", template, *GREEDY, "--json", stdin="hello\n\nbad\n/reset\nhello\n")
    assert result.code == 0
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [a["num_tokens"] for a in answers] == [4, 4, 4]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = {"role": "user", "content": "hello"}
    second = [first, {"role": "assistant", "content": answers[0]["content"]}, {"role": "user", "content": "bad"}]
    for messages, answer in (([first], answers[0]), (second, answers[1]), ([first], answers[2])):
        expected = tiny_llm.chat(messages, params, chat_template=TEMPLATE, use_tqdm=False)[0].outputs[0].text
        assert answer["content"] == expected


def test_chat_streams_plain_text(run: Run, made: list[dict[str, Any]], template: Path, tiny_llm: LLM) -> None:
    script = "/system be brief\nhello\n/what\n/exit\nnever asked\n"
    result = run("chat", "--chat-template", template, *GREEDY, "--system", "be long", stdin=script)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = tiny_llm.chat(messages, params, chat_template=TEMPLATE, use_tqdm=False)[0].outputs[0].text
    assert result.out == expected + "\n"
    assert "(system message set)" in result.err
    assert "unknown command /what" in result.err


def test_chat_needs_a_template(run: Run, made: list[dict[str, Any]]) -> None:
    result = run("chat", stdin="hello\n")
    assert result.code == 2
    assert result.err == ("error: the tokenizer has no chat template; pass chat_template, or a plain prompt instead\n")


@pytest.fixture
def conversation(tiny_llm: LLM) -> Iterator[Conversation]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    yield Conversation(tiny_llm, params, TEMPLATE)
    assert not tiny_llm.engine.has_unfinished


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(conversation: Conversation) -> None:
    answer = conversation.ask("hello")
    said = "".join(next(answer).text for _ in range(3))
    answer.close()
    assert conversation.turns == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]


def test_the_oldest_turns_make_room(conversation: Conversation) -> None:
    for _ in range(4):
        list(conversation.ask("hello " * 8))
    assert conversation.forgotten >= 2
    assert conversation.turns[0]["role"] == "user"
    assert len(conversation.turns) + conversation.forgotten == 8


def test_a_question_that_can_never_fit_is_an_error_and_not_remembered(conversation: Conversation) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        list(conversation.ask("x" * 200))
    assert (conversation.turns, conversation.forgotten) == ([], 0)


# -- info, convert -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=4"])
def test_info_counts_what_the_devices_would_hold(mesh: str, run: Run, odd_model: Path) -> None:
    result = run("info", "--model", odd_model, "--mesh", mesh, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    config = MeshConfig.parse(mesh)
    args = EngineArgs(model=odd_model, use_tqdm_on_load=False)
    files = ModelFiles.find(args)
    _, params = load_model(files, args, files.decoder.fit_to(config.tp), build_mesh(config), ShardingRules())
    held = dict.fromkeys(range(config.num_devices), 0)
    for shard in (s for x in jax.tree.leaves(params) for s in x.addressable_shards):
        held[shard.device.id] += shard.data.nbytes
    assert [d["weight_bytes"] for d in report["mesh"]["devices"]] == list(held.values())
    assert report["mesh"]["balanced"]
    assert report["model"]["num_parameters"] * 4 == report["model"]["weight_bytes"]
    # 2 layers, K and V, 8 entries of 4 bytes: two heads on one device, one of four copies on four.
    assert {d["kv_bytes_per_token"] for d in report["mesh"]["devices"]} == {128 if mesh else 256}


def test_info_for_people(run: Run, odd_model: Path) -> None:
    result = run("info", "--model", odd_model, "-tp", "4")
    assert result.code == 0
    for expected in ("LlamaForCausalLM", "8 query, 2 KV, of 8", "each KV head is held 2 times", "padded by 1", "tp=4"):
        assert expected in result.out


def test_convert_writes_a_checkpoint_once(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    destination = tmp_path / "converted"
    result = run("convert", tiny_model, destination, "--dtype", "bfloat16", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["weight_bytes"] == 2 * report["num_parameters"]
    assert is_orbax(destination)
    assert json.loads((destination / "config.json").read_text())["dtype"] == "bfloat16"
    assert (destination / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert not list(destination.glob("*.safetensors*"))
    again = run("convert", tiny_model, destination)
    assert (again.code, "is not an empty directory" in again.err) == (2, True)


# -- bench ---------------------------------------------------------------------------------------------------------


def test_throughput(run: Run, made: list[dict[str, Any]], tiny_model: Path) -> None:
    options = ["--model", tiny_model, "--num-prompts", "6", "--input-len", "3-40", "--output-len", "2-9"]
    report = json.loads(run("bench", "throughput", *options, "--repeats", "2", "--json").out)
    assert len(report["runs"]) == 2
    assert report["preemptions"] == 0
    assert 0 < report["host_share"] < 1
    assert 0 < report["padding_share"] < 1
    assert report["output_tokens_per_second"] > 0
    assert report["programs"] > 0
    assert made[0]["skip_tokenizer_init"]
    text = run("bench", "throughput", *options, "--repeats", "1").out
    assert "6 requests" in text
    assert "tok/s" in text


def test_latency_and_its_floor(
    run: Run, made: list[dict[str, Any]], tiny_llm: LLM, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "read_bandwidth", lambda device: 1e9)
    options = ["--model", tiny_model, "--input-len", "8", "--output-len", "5", "--repeats", "2"]
    report = json.loads(run("bench", "latency", *options, "--json").out)
    arrays = {x.shape: x.nbytes for x in jax.tree.leaves(tiny_llm.engine.runner.params)}
    total = sum(x.nbytes for x in jax.tree.leaves(tiny_llm.engine.runner.params))
    embedding = (tiny_llm.engine.runner.decoder.vocab_size, 64)
    assert report["weight_bytes_read"] == total - arrays[embedding]
    assert report["floor_seconds"] == report["weight_bytes_read"] / 1e9
    assert 0 < report["token_seconds_median"] <= report["token_seconds_p90"]
    assert len(report["ttft"]) == 2
    assert "× the floor" in run("bench", "latency", *options).out


def test_read_bandwidth_is_measured() -> None:
    assert measure.read_bandwidth(jax.devices()[0], 1 << 22) > 1e8


def test_ranges() -> None:
    assert parse_range("--input-len", "128") == (128, 128)
    assert parse_range("--input-len", "1-2") == (1, 2)
    for wrong in ("", "0", "-3", "3-", "a", "5-4"):
        with pytest.raises(ValueError, match="--input-len"):
            parse_range("--input-len", wrong)


def test_numbers_for_people() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 1 << 30)] == ["0 B", "1023 B", "1.5 KiB", "1.0 GiB"]
    assert [count_text(n) for n in (7, 1234, 7_241_732, 2e9)] == ["7", "1.23 k", "7.24 M", "2.00 B"]
    assert [seconds_text(s) for s in (2e-5, 0.0123, 3)] == ["20.0 µs", "12.30 ms", "3.00 s"]
    assert jsonable({1: [float("-inf"), (2, None)]}) == {"1": [None, [2, None]]}
