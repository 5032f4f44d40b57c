"""Evaluation scripts pass what is right, find what is planted, and leave reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import pytest
from recorded_runs import Call
from tiny_models import scale_weight

from jaxserve import LLM
from jaxserve.config import SchedulerConfig
from jaxserve.evaluation.agreement import LayerErrors
from jaxserve.evaluation.clients import Load
from jaxserve.evaluation.engines import Loaded, open_llm, weight_bytes
from jaxserve.evaluation.environment import git_revision
from jaxserve.evaluation.result import Figure, Result
from jaxserve.evaluation.statistics import jain_index, ratio_interval, statistic
from jaxserve.request import Request
from jaxserve.scheduler import Policy

LIMITS = (
    *("--skip-tokenizer-init", "--compilation-cache-dir", "none", "--block-size", "4", "--max-model-len", "128"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-gpu-blocks-override", "130"),
)
FEW = {"token_buckets": (32,), "decode_buckets": (4,)}


@pytest.fixture
def flags(odd_model: Path, tmp_path: Path) -> list[str | Path]:
    return ["--model", odd_model, "--out", tmp_path, *LIMITS]


def plant(monkeypatch: pytest.MonkeyPatch, script: str, name: str, value: Any) -> None:
    monkeypatch.setattr(import_module(script), name, value)


def few_programs(monkeypatch: pytest.MonkeyPatch, script: str, change: Callable[[LLM], None] | None = None) -> None:
    """Engines of the script have one program of each kind, and are changed once they are loaded."""

    def opened(options: dict[str, Any]) -> Loaded:
        loaded = open_llm(options | FEW)
        if change is not None:
            change(loaded.llm)
        return loaded

    plant(monkeypatch, script, "open_llm", opened)


def written(directory: Path) -> tuple[dict[str, Any], str]:
    """result.json and the report, which needs nothing beside it."""
    result, page = json.loads((directory / "result.json").read_text()), (directory / "report.html").read_text()
    assert result["environment"]["versions"]["jax"] == jax.__version__ and result["seed"] == 0
    for name in [path.name for path in directory.glob("*.png")]:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page and "prefers-color-scheme: dark" in page
    assert "src='http" not in page and "href=" not in page
    return result, page


def scaled(name: str, factor: float) -> Callable[[LLM], None]:
    return lambda llm: scale_weight(llm, name, factor)


def test_verify(call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch, "verify")
    code, out, err = call("verify", *flags, "-tp", "2", "--max-tokens", "6")
    assert (code, err) == (0, "") and "passed  every layer is right" in out
    result, page = written(tmp_path)
    assert result["passed"] and result["mesh"]["tp"] == 2 and result["simulated"] and "simulated" in page
    assert "class='failed'" not in page and "class=failed" not in page
    samples = result["samples"]["logprobs"]
    assert len(samples["served"]) == len(samples["plain"]) > 500 and sum(samples["generated"]) >= 6 * 4 * 5
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}{dark}.png" for name in ("logprobs", "layers") for dark in ("", "-dark")
    }


def test_verify_finds_a_wrong_weight(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_programs(monkeypatch, "verify", scaled("layers.1.mlp.down", 1.01))
    code, out, err = call("verify", *flags, "-tp", "2", "--max-tokens", "6", "--json")
    assert code == 1 and not json.loads(out)["passed"]
    assert "FAILED: every layer is right" in err and "it begins in layer 1" in err
    assert "FAILED: log-probabilities are the checkpoint's" in err
    page = written(tmp_path)[1]
    for red in ("<tr class='failed'><td>worst layer error", "<tr class=failed><td>layer 1</td>", "<p class='failed'>"):
        assert red in page
    assert "<tr class=failed><td>layer 0</td>" not in page


def test_tensor_parallel(call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it should be, and then with a parameter that lies whole on one of two devices."""
    few_programs(monkeypatch, "tensor_parallel")
    arguments = [*flags, "-tp", "2", "--max-tokens", "4"]
    code, _, err = call("tensor_parallel", *arguments)
    assert (code, err) == (0, "")
    result, _ = written(tmp_path)
    figures = {f["name"]: f for f in result["figures"]}
    assert figures["tp=2: collectives per layer, decode[tokens=4, seqs=4]"]["value"] == 2
    assert figures["tp=2: load time"]["simulated"] and not figures["tp=1: load time"]["simulated"]
    assert figures["tp=2: answers equal to tp=1's"]["value"] == 5
    held = result["samples"]["tp=2"]["weights"]
    assert len(held) == 2 and len(set(held.values())) == 1

    def unequal(llm: LLM) -> dict[int, int]:
        runner = llm.engine.runner
        if runner.mesh.size == 2:
            place = max(range(len(runner.params)), key=lambda i: runner.params[i].nbytes)
            runner.params[place] = jax.device_put(runner.params[place], runner.mesh.devices.flat[0])
        return weight_bytes(llm)

    plant(monkeypatch, "jaxserve.evaluation.mesh_runs", "weight_bytes", unequal)
    code, _, err = call("tensor_parallel", *arguments)
    assert code == 1 and err.startswith("FAILED: tp=2: every device holds the same weights")
    page = written(tmp_path)[1]
    assert "<tr class='failed'><td>tp=2: weights on the fullest device" in page
    assert "<tr class='failed'><td>tp=1: weights" not in page


def test_concurrent_requests(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it should be; then with a wrong token."""
    few_programs(monkeypatch, "concurrent_requests")
    script = import_module("concurrent_requests")
    plant(monkeypatch, "concurrent_requests", "SIZES", {"short": (3, 3), "long": (20, 6)})
    arguments = [*flags, "--requests", "8", "--tenants", "2", "--repeats", "1", "--least-fairness", "0.6"]
    loads = ["--load", "closed:3", "--load", "poisson:80%", "--load", "burst:4@0.01"]
    code, _, err = call("concurrent_requests", *arguments, *loads)
    assert (code, err) == (0, "")
    result, _ = written(tmp_path)
    runs = result["samples"]["loads"]
    assert set(runs) == {"closed:3", "poisson:80%", "burst:4@0.01"}
    assert all([a["call"] for a in run["answers"]] == [*range(8)] for of in runs.values() for run in of)
    assert not any(f["simulated"] for f in result["figures"])
    figures = {f["name"] for f in result["figures"]}
    assert {f"{name}: predicted for 1×H100: first token" for name in runs} <= figures
    due = sorted(a["due"] for a in runs["burst:4@0.01"][0]["answers"])
    assert due == pytest.approx([0.0] * 4 + [0.01] * 4)

    real = script.closed_loop

    async def faulty(llm: Any, calls: Any, *rest: Any) -> Load:
        load = await real(llm, calls, *rest)
        first = load.answers[0]
        wrong = replace(first, tokens=[*first.tokens[:-1], first.tokens[-1] ^ 1])
        return replace(load, answers=[wrong, *load.answers[1:]])

    plant(monkeypatch, "concurrent_requests", "closed_loop", faulty)
    code, _, err = call("concurrent_requests", *arguments, "--load", "closed:3")
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith("FAILED: tokens are those of the offline batch: 1 of 8 answers differ, first closed:3")
    assert "<tr class='failed'><td>closed:3: throughput</td>" in written(tmp_path)[1]


class TenantLast(Policy):
    """Serves one tenant when nobody else is there."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config

    def lane(self, request: Request) -> str:
        return request.tenant

    def rank(self, request: Request) -> tuple[Any, ...]:
        return (request.tenant == "tenant 1", request.arrival)


def test_an_unfair_policy_is_found(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many more requests at once than there is room for: who is served last waits for everybody else."""
    few_programs(monkeypatch, "concurrent_requests")
    monkeypatch.setitem(FEW, "decode_buckets", (2,))
    plant(monkeypatch, "concurrent_requests", "SIZES", {"short": (3, 32)})
    load = "burst:40@1000"
    crowd = ["--max-num-seqs", "2", "--requests", "40", "--tenants", "2", "--repeats", "1", "--load", load]
    judged = f"<tr class='failed'><td>{load}: fairness over tenants</td>"
    for policy, expected in (("fair", 0), (f"{__name__}:{TenantLast.__name__}", 1)):
        code, _, err = call("concurrent_requests", *flags, *crowd, "--scheduling-policy", policy)
        assert code == expected
        assert (judged in written(tmp_path)[1]) == bool(code)
        assert err.startswith(f"FAILED: {load}: tenants are served alike: Jain's index" if code else "")
        assert len(err.splitlines()) == code


@pytest.mark.parametrize("load", ["foo:3", "closed:x", "poisson:-1", "burst:4", "poisson:x%"])
def test_loads_are_checked_before_anything_is_loaded(call: Call, flags: list[str | Path], load: str) -> None:
    code, _, err = call("concurrent_requests", *flags, "--load", load)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith(f"error: --load {load}: it is")


def test_compare_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")

    def run(name: str, seconds: list[float], script: str = "x") -> Path:
        result = Result(script, "?", {}, 0, None, {"cores": len(name)})
        how = "by hand"
        result.figures = [
            Figure.of("time", [[s] for s in seconds], "median", "s", how, better="lower"),
            Figure("bytes", 10 * len(name), "B", how, better="lower"),
        ]
        result.write(tmp_path / name)
        return tmp_path / name

    one, same = run("a", [1.0, 1.1, 0.9, 1.05, 0.95] * 4), run("b", [1.02, 1.08, 0.9, 1.07, 0.93] * 4)
    slow = run("cc", [2.0, 2.1, 1.9, 2.2, 1.8] * 4)
    out = tmp_path / "out"
    code, text, _ = call("compare_runs", one, same, "--out", out, "--worse", "1.3")
    assert code == 0 and "no clear difference" in text
    code, text, err = call("compare_runs", one, same, slow, "--out", out, "--worse", "1.3")
    assert code == 1 and "time of cc: 2 times; bytes of cc: 2 times" in err and "cores" in text
    result, page = written(out)
    ratios = {(r["run"], r["figure"]): r for r in result["samples"]["ratios"]}
    low, high = ratios["cc", "time"]["interval"]
    assert 1.7 < low < 2 < high < 2.3 and ratios["cc", "bytes"]["interval"] is None
    assert "<tr class='failed'><td>time, cc" in page and "<tr class='failed'><td>time, b" not in page
    code, _, err = call("compare_runs", one, run("d", [1.0], "y"), "--out", out)
    assert code == 2 and "x and y" in err
    code, _, err = call("compare_runs", one, Path(__file__), "--out", out)
    assert code == 2 and "not JSON" in err


def test_reports_need_matplotlib(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("verify", *flags)
    assert (code, err) == (2, "error: reports need matplotlib: pip install 'jaxserve[plots]'\n")
    assert not list(tmp_path.iterdir())


def test_statistics() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1) and jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert statistic("median", [[1.0, 2.0], [9.0]]) == 2
    groups = [[float(i), float(i + 1)] for i in range(1, 40)]
    twice = [[2 * x for x in group] for group in groups]
    interval = ratio_interval("mean", groups, twice, seed=1)
    assert interval is not None and interval[0] < 2 < interval[1]
    assert interval == ratio_interval("mean", groups, twice, seed=1)
    assert ratio_interval("mean", groups[:2], twice, seed=1) is None
    # What belongs together is drawn together: 100 copies of a value do not make it surer.
    copies = [group * 100 for group in groups]
    assert ratio_interval("mean", copies, twice, seed=1) == pytest.approx(interval)


def test_rounding_sets_what_a_layer_may_be_off() -> None:
    errors = LayerErrors([-1, 0, 1], [0.0, 0.02, 0.05], [0.0, 0.01, 0.01], epsilon=0.0078)
    assert errors.tolerance == pytest.approx(0.03)
    assert errors.first_bad == 2 and errors.name(2) == "final norm" and errors.name(0) == "embedding"


def test_no_repository(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
