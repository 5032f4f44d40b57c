"""chat, info and convert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from command_line import GREEDY, TEMPLATE, Run

from jaxserve import LLM, SamplingParams
from jaxserve.build import ModelFiles, load_model
from jaxserve.cli.output import bytes_text, count_text, jsonable, seconds_text
from jaxserve.commands.chat import Conversation
from jaxserve.engine_args import EngineArgs
from jaxserve.sampling_params import RequestOutputKind
from jaxserve.weights.orbax import is_orbax
from sharding import MeshConfig, ShardingRules, build_mesh

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


def bytes_of_one(params: Any) -> int:
    """Of the model that was laid over a mesh, however often it is there."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=4", "tp=5"])
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
    stored = report["model"]["weight_bytes"]
    assert report["mesh"]["added_weight_percent"] == round(100 * (bytes_of_one(params) / stored - 1), 2)
    # 2 layers, K and V, 8 entries of 4 bytes: two heads on one device, one of the copies on each of several.
    assert {d["kv_bytes_per_token"] for d in report["mesh"]["devices"]} == {128 if mesh else 256}


def test_info_for_people(run: Run, odd_model: Path) -> None:
    result = run("info", "--model", odd_model, "-tp", "4")
    assert result.code == 0
    for expected in ("LlamaForCausalLM", "8 query, 2 KV, of 8", "tp=4", "every device holds the same"):
        assert expected in result.out
    note = "each KV head held 2 times, vocabulary +1: 6.0 % more weight memory, 100 % more KV cache"
    assert note in " ".join(result.out.split())


def test_info_says_what_a_mesh_costs(run: Run, odd_model: Path) -> None:
    expected = {
        "kv_head_copies": 2,
        "kv_head_padding": 1,
        "head_padding": 2,
        "intermediate_padding": 4,
        "vocab_padding": 2,
        "added_kv_percent": 150.0,
    }
    report = json.loads(run("info", "--model", odd_model, "-tp", "5", "--json").out)["mesh"]
    assert {name: report[name] for name in expected} == expected
    shown = " ".join(run("info", "--model", odd_model, "-tp", "5").out.split())
    notes = "each KV head held 2 times, query heads +2, KV heads +1, feed-forward +4, vocabulary +2"
    assert f"{notes}: {report['added_weight_percent']:.1f} % more weight memory" in shown
    assert "more weight memory" not in run("info", "--model", odd_model, "-tp", "1").out


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


# -- what all of them write ----------------------------------------------------------------------------------------


def test_numbers_for_people() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 1 << 30)] == ["0 B", "1023 B", "1.5 KiB", "1.0 GiB"]
    assert [count_text(n) for n in (7, 1234, 7_241_732, 2e9)] == ["7", "1.23 k", "7.24 M", "2.00 B"]
    assert [seconds_text(s) for s in (2e-5, 0.0123, 3)] == ["20.0 µs", "12.30 ms", "3.00 s"]
    assert jsonable({1: [float("-inf"), (2, None)]}) == {"1": [None, [2, None]]}
