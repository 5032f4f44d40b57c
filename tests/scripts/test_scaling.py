"""Scaling runs pass what is right, find what is planted, and show what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import Call
from test_evaluation import plant, scaled, written

from jaxserve import LLM
from jaxserve.evaluation.command import begin
from jaxserve.evaluation.engines import Loaded, on_mesh, open_llm, own_files
from jaxserve.evaluation.mesh_runs import MeshRun, answers_figure, same_tokens
from jaxserve.evaluation.predictions import Forecast, predict, prediction_table
from jaxserve.evaluation.profile import Operation, typical_seconds
from jaxserve.evaluation.result import Result
from sharding.cost_model import Step
from sharding.mesh import MeshConfig
from sharding.planner import Workload

SMALL = (
    *(
        "--skip-tokenizer-init",
        "--compilation-cache-dir",
        "none",
        "--block-size",
        "4",
        "--max-num-batched-tokens",
        "32",
    ),
    *("--requests", "4", "--input-len", "6", "--output-len", "5", "--repeats", "1"),
)


@pytest.fixture
def small(odd_model: Path, tmp_path: Path) -> list[str | Path]:
    return ["--model", odd_model, "--out", tmp_path, *SMALL]


def test_scaling(call: Call, small: list[str | Path], odd_model: Path, tmp_path: Path) -> None:
    code, out, err = call("scaling", *small, "--axis", "tp", "--axis", "dp", "--devices", "2", "--gpu", "H200")
    assert (code, err) == (0, "") and "passed  the tokens are those of one device" in out
    result, page = written(tmp_path)
    assert result["passed"] and result["simulated"] and "simulated" in page and "class='failed'" not in page
    figures = {f["name"]: f for f in result["figures"]}
    for mesh in ("tp=2", "dp=2"):
        assert figures[f"{mesh}: strong scaling, speed-up"]["simulated"]
        assert figures[f"{mesh}: answers equal to one device's"]["value"] == 8
        efficiency = figures[f"{mesh}: weak scaling, efficiency"]["value"]
        assert efficiency == pytest.approx(figures[f"{mesh}: weak scaling, speed-up"]["value"] / 2)
    assert not figures["one device: strong scaling, output"]["simulated"]
    assert figures["dp=2: weak scaling, speed-up predicted for H200"]["value"] == pytest.approx(2, rel=0.05)
    assert figures["dp=2: communication over links of H200"]["value"] == 0
    # The compiled step has the collectives that the cost model counts, so the links' share of it is the same.
    step = Forecast.of({"model": odd_model}, "h200", MeshConfig(tp=2)).step(Step.decode(8, 1))
    share = figures["tp=2: communication over links of H200"]["value"]
    assert share == pytest.approx(step.communication / step.seconds, rel=0.01)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}{dark}.png" for name in ("speed_up", "communication") for dark in ("", "-dark")
    }


@pytest.mark.slow
def test_impossible_sizes_are_shown(call: Call, small: list[str | Path], tmp_path: Path) -> None:
    code, out, _ = call("scaling", *small, "--axis", "pp", "--devices", "4", "--uneven-stages", "3", "--json")
    assert code == 0
    result, page = written(tmp_path)
    assert json.loads(out)["passed"] and "has 2 layers" in result["samples"]["impossible"]["pp=4"]
    assert "Not measured" in page and any(f["name"].startswith("pp=2: slowest stage") for f in result["figures"])


@pytest.mark.usefixtures("slow_second_stage")
def test_scaling_finds_a_slowed_stage(call: Call, small: list[str | Path], tmp_path: Path) -> None:
    code, out, err = call("scaling", *small, "--axis", "pp", "--devices", "2", "--uneven-stages", "3")
    assert code == 1 and err.startswith("FAILED: pp=2: stages take alike: stage 1 takes"), out
    assert "<tr class='failed'><td>pp=2: slowest stage over the quickest" in written(tmp_path)[1]


BENCHMARK = ("-tp", "2", "--clients", "2")


def test_distributed_benchmark(call: Call, small: list[str | Path], tmp_path: Path) -> None:
    code, out, err = call("distributed_benchmark", *small, *BENCHMARK, "--json")
    assert (code, err) == (0, "")
    result, page = written(tmp_path)
    assert json.loads(out)["passed"] and result["simulated"] and result["mesh"]["tp"] == 2
    assert "class='failed'" not in page and "class=failed" not in page
    figures = {f["name"]: f for f in result["figures"]}
    whole, half = (figures[f"{mesh}: weights on the fullest device"]["value"] for mesh in ("one device", "tp=2"))
    assert 0.4 < half / whole < 0.7
    assert figures["tp=2: collectives per layer, decode[tokens=8, seqs=8]"]["value"] == 2
    assert figures["tp=2, concurrent: first token, median"]["simulated"]
    assert not figures["one device, concurrent: first token, median"]["simulated"]
    assert not figures["tp=2: predicted for 2×H100: decode step"]["simulated"]
    assert figures["tp=2: load time"]["simulated"] and figures["greedy tokens that differ"]["value"] == 0
    answers = [a for run in result["samples"]["concurrent"]["tp=2"] for a in run["answers"]]
    assert [a["call"] for a in answers] == [*range(6)] and all(len(a["tokens"]) == 5 for a in answers)


def test_distributed_benchmark_finds_a_wrong_weight(
    call: Call, small: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the mesh only: one device is right."""
    change: Callable[[LLM], None] = scaled("layers.1.mlp.down", 2.0)

    def opened(options: dict[str, Any]) -> Loaded:
        loaded = open_llm(options)
        if loaded.llm.engine.runner.mesh.size > 1:
            change(loaded.llm)
        return loaded

    plant(monkeypatch, "distributed_benchmark", "open_llm", opened)
    code, _, err = call("distributed_benchmark", *small, *BENCHMARK)
    assert code == 1 and "FAILED: log-probabilities are the checkpoint's" in err
    assert "FAILED: the tokens are those of one device: tp=2 answers" in err and "offline batch" not in err
    page = written(tmp_path)[1]
    assert "<tr class='failed'><td>largest log-probability error" in page
    assert "<tr class='failed'><td>tp=2: answers equal to one device" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("distributed_benchmark", "-pp", "3"), "this model has 2 layers"),
        (("scaling", "--axis", "cp"), "--axis cp: it is one of tp, pp, dp"),
        (("scaling", "--gpu", "h1000"), "known: a100, h100, h200, b200, l40s"),
        (("scaling", "--devices", "2", "--least-efficiency", "0.5"), "simulated devices have none worth judging"),
        (("scaling", "--input-len", "200"), "the longest sequence has 128"),
    ],
)
def test_what_cannot_be_asked(call: Call, small: list[str | Path], arguments: tuple[str, ...], said: str) -> None:
    script, *rest = arguments
    code, _, err = call(script, *small, *rest)
    assert code == 2 and len(err.splitlines()) == 1 and said in err


def test_efficiency_is_judged_on_real_devices(
    call: Call, small: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if these were: two that share the cores of a machine are never three times as fast."""

    def on_gpus(*arguments: Any) -> Result:
        result = begin(*arguments)
        result.environment["platform"] = "gpu"
        return result

    plant(monkeypatch, "jaxserve.evaluation.command", "begin", on_gpus)
    code, _, err = call("scaling", *small, "--axis", "dp", "--devices", "2", "--least-efficiency", "1.5")
    assert code == 1 and err.startswith("FAILED: dp=2: weak scaling is efficient: ") and "150% wanted" in err
    assert "<tr class='failed'><td>dp=2: weak scaling, efficiency" in written(tmp_path)[1]


def test_each_of_several_engines_has_files_of_its_own() -> None:
    options = {"trace": "dir/t.json", "record": None, "mesh": "dp=2"}
    found = on_mesh(options, MeshConfig(pp=2, tp=2))
    assert found["trace"] == "dir/t-pp=2,tp=2.json" and found["record"] is None
    assert own_files(options, "-tp 2 --dtype float32")["trace"] == "dir/t--tp_2_--dtype_float32.json"


def test_ties_are_no_other_tokens() -> None:
    def run(name: str, tokens: list[list[int]], ties: frozenset[int] = frozenset()) -> MeshRun:
        return MeshRun(name, MeshConfig(), 1.0, 1.0, tokens, {0: 1}, {0: 1}, 1, [], ties)

    first, tied = run("one", [[1, 2], [3]]), run("two", [[1, 9], [3]], frozenset({0}))
    check = same_tokens([first, tied])
    assert check.passed and check.detail == "they are; 1 more from a token on where two are within 0.25 nats"
    assert answers_figure(tied, first).value == 2
    check = same_tokens([first, tied, run("three", [[1, 9], [4]], frozenset({0}))])
    assert not check.passed and check.figures == ("three: answers equal to one's",)
    assert check.detail.startswith("three answers 1 of 2 prompts differently; 2 more")


def test_stages_are_compared_by_what_they_take_undisturbed() -> None:
    def of(device: int, name: str, *durations: float) -> list[Operation]:
        return [Operation(device, name, "jit_tick", i, float(i), i + d) for i, d in enumerate(durations)]

    disturbed = of(0, "fusion", 0.1, 0.1, 0.1, 0.7) + of(0, "all-reduce.1", 0.2, 0.2)
    assert typical_seconds(disturbed + of(1, "fusion", 0.2, 0.2, 0.2, 0.2)) == pytest.approx({0: 0.4, 1: 0.8})


def test_predictions_say_why_there_is_none(odd_model: Path) -> None:
    workload = Workload(10, 5, concurrency=4)
    meshes = ("tp=1", "tp=2", "tp=16", "pp=3", "dp=12")
    found = [predict({"model": odd_model}, "h200", workload, MeshConfig.parse(mesh)) for mesh in meshes]
    assert [p.plan is not None for p in found] == [True, True, False, False, False]
    assert "tp=16 does not fit" in found[2].reason and "pp=3" in found[3].reason and not found[2].figures()
    table = prediction_table("h200", found)
    assert table.header[-1] == "not, because" and table.rows[2][-1] == found[2].reason
    assert len(prediction_table("h200", found[:2]).header) == len(table.header) - 1
    one, two = (p.decode for p in found[:2])
    assert one.communication == 0 < two.communication and found[1].communication == two.communication / two.seconds
    names = [f.name for f in found[1].figures("here: ")]
    assert names[0] == "here: predicted for 2×H200: throughput" and not any(f.simulated for f in found[1].figures())


def test_a_prompt_passes_all_stages_once() -> None:
    """Chunks follow each other; the last has one tick more for each further stage."""
    options = {"model": "demo", "max_num_batched_tokens": 64}
    forecast = Forecast.of(options, "h100", MeshConfig(pp=2))
    ticks = [forecast.step(Step.prefill(64, i)).seconds for i in (0, 64)]
    assert forecast.prompt(128).seconds == pytest.approx(ticks[0] + 2 * ticks[1])
