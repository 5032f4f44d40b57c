"""The report on a trace: what it shows, and that it finds a trace that is not whole and a stage that is slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import Call
from tiny_models import SMALL, run, write_llama

from jaxserve import LLM, SamplingParams
from jaxserve.evaluation.engine_trace import EngineTraceFile
from jaxserve.trace import ENGINE_TRACK, HOST

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPTS = [[7, 8, 9] * 15, [3, 4], [5] * 33]


def open_llm(model: Path, **options: Any) -> LLM:
    return LLM(model, skip_tokenizer_init=True, use_tqdm_on_load=False, **(SMALL | options))


@pytest.fixture(scope="module")
def trace(odd_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    llm = open_llm(odd_model, trace=path)
    run(llm, PROMPTS, PARAMS)
    return path


def test_report(call: Call, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call("trace_report", trace, "--request", "2", "--out", tmp_path)
    assert (code, err) == (0, "")
    for words in ("Request 2", "33 prompt tokens (0 cached), 5 output tokens; ended: length", "Bottleneck", "dispatch"):
        assert words in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] and result["samples"]["request"] == "2"
    causes = next(t for t in result["tables"] if t["title"] == "What takes the time")
    assert causes["rows"][0][0] == result["samples"]["bottleneck"]
    assert {"time.png", "requests-dark.png"} <= {file.name for file in tmp_path.iterdir()}
    code, out, _ = call("trace_report", trace, "--json", "--out", tmp_path)
    assert code == 0 and json.loads(out)["script"] == "trace_report"


def changed(trace: Path, directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(trace.read_text())
    change(content)
    path = directory / "changed.json"
    path.write_text(json.dumps(content))
    return path


def test_a_trace_that_is_not_whole(call: Call, trace: Path, tmp_path: Path) -> None:
    def lose_the_longest(content: dict[str, Any]) -> None:
        seconds = EngineTraceFile(trace).host_seconds
        longest = max(seconds, key=seconds.__getitem__)
        content["traceEvents"] = [e for e in content["traceEvents"] if e["name"] != longest]

    def stretch(content: dict[str, Any]) -> None:
        """A dispatch, into the middle of the span after it."""
        spans = [e for e in content["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == (HOST, ENGINE_TRACK)]
        first = next(e for e in spans if e["name"] == "dispatch")
        after = min((e for e in spans if e["ts"] >= first["ts"] + first["dur"]), key=lambda e: e["ts"])
        first["dur"] = after["ts"] + after["dur"] / 2 - first["ts"]

    for change, check in ((lose_the_longest, "spans add up to the whole time"), (stretch, "spans nest")):
        code, _, err = call("trace_report", changed(trace, tmp_path, change), "--out", tmp_path / "report")
        assert code == 1 and err.startswith(f"FAILED: {check}")


def test_what_it_cannot_read(call: Call, trace: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"traceEvents": []}')
    wrong = [
        ([tmp_path / "other.json"], "not a trace that an engine wrote"),
        ([tmp_path / "none.json"], "No such file"),
        ([trace, "--request", "9"], "--request 9: not in"),
        ([trace, "--profile", tmp_path], "no profile in it"),
    ]
    for arguments, reason in wrong:
        code, _, err = call("trace_report", *arguments, "--out", tmp_path / "report")
        assert code == 2 and len(err.splitlines()) == 1 and reason in err


@pytest.mark.usefixtures("slow_second_stage")
def test_a_slow_stage(call: Call, tmp_path: Path) -> None:
    """One program runs all stages: only a profile knows which of them the others wait for."""
    path = tmp_path / "trace.json"
    llm = open_llm(write_llama(tmp_path, num_hidden_layers=4), mesh="pp=2", trace=path)
    llm.start_profile(tmp_path / "profile")
    run(llm, PROMPTS, PARAMS)
    llm.stop_profile()
    arguments = [path, "--profile", tmp_path / "profile", "--out", tmp_path / "report", "--uneven", "3"]
    code, _, err = call("trace_report", *arguments)
    assert code == 1 and err.startswith("FAILED: devices compute alike")
    assert "<tr class='failed'><td>device 1: computing" in (tmp_path / "report" / "report.html").read_text()
