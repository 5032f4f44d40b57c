"""What stands between two tokens is counted right, and a scheduler that does not keep to its limits is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import Call

from jaxserve import LLM, SamplingParams
from jaxserve.config import SchedulerConfig
from jaxserve.evaluation import mixed_load
from jaxserve.evaluation.engines import Loaded
from jaxserve.evaluation.mixed_load import Setting
from jaxserve.evaluation.timeline import Timeline, TimelineScheduler, engine_of

ROOM = 132
"""Tokens of a step: the longest sequence, and a token of each of the others."""
LIMITS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": ROOM,
    "token_buckets": (16, ROOM),
    "decode_buckets": (4,),
    "num_gpu_blocks_override": 130,
}
MIX = (
    *("--shorts", "3", "--short-prompt", "6", "--short-answer", "12"),
    *("--longs", "2", "--long-prompt", "90", "--long-answer", "3", "--repeats", "1"),
)
SETTINGS = ("--setting", "whole", "--setting", "chunked:16", "--setting", "chunked:32/16")


@pytest.fixture(scope="module")
def llm(make_llm: Callable[..., LLM], odd_model: Path) -> LLM:
    return make_llm(odd_model, **LIMITS)


@pytest.fixture
def flags(odd_model: Path, tmp_path: Path) -> list[str | Path]:
    small = ("--max-model-len", "128", "--max-num-seqs", "4", "--skip-tokenizer-init")
    return ["--model", odd_model, "--out", tmp_path, *small]


@pytest.fixture
def loaded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script finds its engine loaded, with one step program per kind of step."""
    monkeypatch.setattr(import_module("mixed_workload"), "open_llm", lambda options: Loaded(llm, 0.0, 0.0))


def timeline(llm: LLM, setting: Setting) -> Timeline:
    """A short request of 4 prompt tokens decodes for a while, then a prompt of 90 tokens comes."""
    prompts = [np.random.default_rng(i).integers(0, 90, length).tolist() for i, length in enumerate((4, 90))]
    scheduler = TimelineScheduler(replace(llm.engine.scheduler.config, **setting.limits))
    engine = engine_of(llm, scheduler)

    def add(i: int, num_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(f"r{i}", prompts[i], params)

    add(0, 20)
    for _ in range(5):
        engine.step()
    add(1, 2)
    while engine.has_unfinished:
        engine.step()
    scheduler.check_integrity()
    return Timeline.of(scheduler, prompts)


@pytest.mark.parametrize(
    ("setting", "pieces"),
    [("whole", [90]), ("chunked:16", [15] * 6), ("chunked:32/12", [12] * 7 + [6])],
)
def test_what_stands_between_two_tokens(llm: LLM, setting: str, pieces: list[int]) -> None:
    found = timeline(llm, Setting.parse(setting, ROOM))
    gaps = found.gaps(0, 20)
    assert len(gaps) == 19 and all(gap.steps == 1 and not gap.preempted for gap in gaps)
    assert [gap.prompt_tokens for gap in gaps if gap.prompts] == pieces
    assert all(gap.prompts in ({"r1"}, set()) and (gap.prompt_tokens > 0) == bool(gap.prompts) for gap in gaps)
    assert [tokens for _, _, tokens in found.prefills(1)] == pieces
    assert max(step.num_tokens for step in found.steps) == pieces[0] + 1
    assert max(step.largest_piece for step in found.steps) == pieces[0]
    times = found.tokens(0, 20)
    assert times == sorted(times) and [gap.end for gap in gaps] == times[1:]
    assert all(found.begin(i) <= step.landed for i, step in enumerate(found.steps))


@pytest.mark.usefixtures("loaded")
def test_mixed_workload(call: Call, flags: list[str | Path], tmp_path: Path) -> None:
    code, out, err = call("mixed_workload", *flags, *MIX, *SETTINGS, "--most-slowdown", "1e9", "--json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(out) == result and result["passed"] and len(result["checks"]) == 1 + 3 * 2 + 2 + 2
    figures = {f["name"]: f["value"] for f in result["figures"]}
    assert figures["whole: tokens of the fullest step"] >= 90 and figures["whole: prompts split over steps"] == 0
    assert figures["chunked:16: tokens of the fullest step"] == 16
    assert figures["chunked:16: prompt tokens between two tokens of a short request"] <= 16
    assert figures["chunked:32/16: most tokens of a prompt beside decodes"] <= 16
    assert {"chunked:16, short: first token, p99", "chunked:16, long: whole answer, median"} < set(figures)
    assert any("predicted for 1×H100" in name for name in figures)
    samples = result["samples"]
    assert set(samples["runs"]) == {"whole", "chunked:16", "chunked:32/16"} and len(samples["short alone"]) == 1
    due = [[a["due"] for a in runs[0]["answers"]] for runs in samples["runs"].values()]
    assert due[0] == due[1] == due[2] and len(due[0]) == 5
    for runs in samples["runs"].values():
        chunks = [chunk for step in runs[0]["steps"] for chunk in step["chunks"]]
        assert [sum(c[2] for c in chunks if c[0] == i and c[4]) for i in range(5)] == [6, 6, 6, 90, 90]
    page = (tmp_path / "report.html").read_text()
    assert "class='failed'" not in page and "class=failed" not in page
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {f"{name}{dark}.png" for name in ("timeline", "short", "long") for dark in ("", "-dark")}


class Heedless(TimelineScheduler):
    """Fills steps as far as the programs go, and cuts prompts that are to stay whole."""

    def __init__(self, config: SchedulerConfig) -> None:
        tokens = ROOM if config.enable_chunked_prefill else 16
        super().__init__(replace(config, max_num_batched_tokens=tokens, enable_chunked_prefill=True))


@pytest.mark.usefixtures("loaded")
def test_a_scheduler_that_ignores_its_limits_is_found(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_load, "TimelineScheduler", Heedless)
    code, _, err = call("mixed_workload", *flags, *MIX, *SETTINGS[:4], "--most-slowdown", "0.001")
    assert code == 1
    assert "FAILED: chunked:16: no step computes more than 16 tokens: seen: " in err
    assert "FAILED: whole: no prompt is split over steps: seen: " in err
    assert "FAILED: chunked:16: p99 between tokens of short requests is at most 0.001 times that alone" in err
    page = (tmp_path / "report.html").read_text()
    for red in ("chunked:16: tokens of the fullest step", "whole: prompts split over steps"):
        assert f"<tr class='failed'><td>{red}</td>" in page
    assert "<tr class='failed'><td>whole: tokens of the fullest step" not in page
    assert page.count("<tr class=failed><td>") == 2 + page.count("<tr class=failed><td>FAILED")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "chunked"], "--setting chunked: it is whole, chunked:TOKENS"),
        (["--setting", "chunked:2"], "max_num_batched_tokens=2 is less than max_num_seqs=4"),
        (["--setting", "whole", "--scheduling-policy", "fair"], "scheduling_policy='fair' shares steps out in chunks"),
        (["--max-num-batched-tokens", "64"], "--max-num-batched-tokens: say it with --setting"),
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill: say it with --setting"),
        (["--record", "x.rec"], "--record: each setting has a scheduler of its own"),
        (["--long-prompt", "500"], "requests are up to 503 tokens, the longest sequence is 128"),
        (["--gpu", "abacus"], "Invalid value for '--gpu'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    call: Call, flags: list[str | Path], arguments: list[str], message: str
) -> None:
    code, _, err = call("mixed_workload", *flags, *MIX, *arguments)
    assert code == 2 and len(err.splitlines()) == 1 and message in err, err
