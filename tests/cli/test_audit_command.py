"""``jaxserve audit``, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from tiny_models import LLAMA

from pallas_kernels import native
from sharding import aot, cost_model

SMALL = ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a config."""
    directory = tmp_path_factory.mktemp("eight_heads")
    (directory / "config.json").write_text(json.dumps(LLAMA | {"num_key_value_heads": 8, "vocab_size": 104}))
    return directory


def report(run: Run, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    result = run("audit", *arguments, *SMALL, "--json")
    assert (result.code, result.err) == (code, "")
    return json.loads(result.out)


def test_simulated_devices(run: Run, model: Path) -> None:
    result = run("audit", "--model", model, "-tp", "2", "-dp", "2", *SMALL)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines() if line.strip()]
    assert lines[0] == "eight_heads0 on 4 simulated CPU devices, dp=2,tp=2"
    assert lines[2:4] == [f"attention {'cpu' if native.refusal() else 'native'}", "products reference"]
    assert lines[5] == "decode[tokens=4, seqs=4]"
    assert "all-reduce tp mlp 1 per layer 1.0 KiB 2.0 KiB" in lines
    assert "all-reduce tp attention 1 per layer 8.0 KiB 16.0 KiB" in lines
    assert sum(line.startswith("as budgeted: ") for line in lines) == 2
    assert lines[-1].startswith("step[tokens=32, seqs=4] ")


def test_json(run: Run, model: Path) -> None:
    found = report(run, "--model", model, "--mesh", "pp=2", "--decode", "--tokens", "2")
    assert (found["mesh"], found["target"]) == ({"dp": 1, "pp": 2, "cp": 1, "tp": 1}, None)
    (program,) = found["programs"]
    assert program["name"] == "tick[tokens=2, seqs=2]"
    assert (program["broken"], program["launches"], found["memory"]) == ([], None, None)
    (permute,) = (c for c in program["collectives"] if c["op"] == "collective-permute")
    assert (permute["axes"], permute["num_bytes"], permute["count"], permute["per_layer"]) == (
        ["pp"],
        2 * 64 * 4,
        1,
        None,
    )
    assert {"state.keys[0]", "state.values[0]", "state.activations"} <= set(program["aliased"])
    assert program["memory"]["total"] > found["weight_bytes"] > 0


def test_kernels_and_sizes_are_those_asked_for(run: Run) -> None:
    """Of a model and a mesh that have others by default."""
    options = ["--attention-backend", "reference", "--matmul-backend", "reference", "--block-size", "8"]
    found, default = (report(run, "--decode", "--tokens", "1", *more) for more in (options, []))
    assert (found["attention"], found["matmul"]) == ("reference", "reference")
    assert found["num_blocks"] == [1 + 2 * (default["num_blocks"][0] - 1)]
    assert default["matmul"] == ("reference" if native.refusal() else "native")


def test_a_broken_budget_is_exit_code_1(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "layer_collectives", lambda *_: [])
    result = run("audit", "--model", model, "-tp", "2", "--decode", *SMALL)
    assert (result.code, result.err) == (1, "")
    assert "BROKEN: not expected: 1 × all-reduce over tp in layer_0/mlp, 1,024 bytes" in result.out


def test_rules_of_ones_own_have_no_budget(run: Run, model: Path, tmp_path: Path) -> None:
    mesh = tmp_path / "mesh.toml"
    mesh.write_text("[axes]\ntp = 2\n[rules]\nmlp = []\n")
    result = run("audit", "--model", model, "--mesh", mesh, "--decode", *SMALL)
    assert result.code == 0
    assert "not held against a budget: the mesh file has rules of its own" in result.out


@needs_compiler
@pytest.mark.usefixtures("optimized")
def test_a_target(run: Run, model: Path) -> None:
    target = ["--model", model, "-tp", "2", "--target", "2xh200", "--dtype", "bfloat16", "--decode"]
    found = report(run, *target)
    (program,) = found["programs"]
    assert (found["target"], found["attention"]) == ("2 × h200", "triton")
    assert {c["per_layer"] for c in program["collectives"] if c["where"] in ("attention", "mlp")} == {1}
    assert program["broken"] == []
    assert program["launches"]["graphs"] > 0
    memory = found["memory"]
    assert memory["fits"] and memory["tokens"] == memory["tokens_per_replica"] == 4 * 64
    assert memory["kv"] == int(memory["limit"] * 0.92) - memory["step"] - memory["reserve"]
    result = run("audit", *target, *SMALL, "--gpu-memory-utilization", "0.003")
    assert result.code == 1
    assert "DOES NOT FIT: no room for one sequence of 64 tokens" in result.out
    assert "attention  triton" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "8xv100"], "GPU 'v100' is not known"),
        (["--target", "h200:2", "-tp", "4"], "mesh dp=1,pp=1,cp=1,tp=4 needs 4 GPUs, the target has 2"),
        (["--tokens", "64"], "tokens=64: steps of this kind have at most max_num_batched_tokens=32 rows"),
        (["--decode", "--tokens", "8"], "tokens=8: steps of this kind have at most max_num_seqs=4 rows"),
        (["--model", "llama-5"], "model 'llama-5': no such directory"),
        (["-tp", "16"], "tensor_parallel_size=16 does not fit this model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, run: Run, model: Path) -> None:
    result = run("audit", "--model", model, *SMALL, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


def test_what_is_missing_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "missing", lambda: "compiling for GPUs needs this and that")
    result = run("audit", "--target", "h200:8")
    assert (result.code, result.err) == (2, "error: compiling for GPUs needs this and that\n")
