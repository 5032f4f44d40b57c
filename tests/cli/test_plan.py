"""``jaxserve plan``, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from tiny_models import write_llama

from jaxserve.batch import BatchLayout
from jaxserve.models.registry import decoder_config, load_hf_config
from jaxserve.models.shape import model_shape
from jaxserve.runner import ModelRunner
from sharding import aot, cost_model
from sharding.mesh import MeshConfig

GPUS = ["--gpus", "8xh200"]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")


def report(run: Run, *arguments: str | Path) -> dict[str, Any]:
    return json.loads(run("plan", *arguments, "--json").out)


def test_a_table_then_why_not_then_the_assumptions(run: Run) -> None:
    result = run("plan", "--model", "llama-3.1-70b", *GPUS, "--top", "3")
    assert (result.code, result.err) == (0, "")
    lines = [line for line in result.out.splitlines() if line.strip()]
    assert lines[0] == "llama-3.1-70b on 8 × h200, for throughput"
    header = next(i for i, line in enumerate(lines) if "KV tokens" in line)
    for column in ("mesh", "memory", "TTFT", "per token", "tokens/s", "bound by"):
        assert column in lines[header]
    rows = lines[header + 2 : header + 5]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert lines[header + 5].startswith("not dp=8; ")
    assert "131.4 GiB of weights per GPU" in lines[header + 5]
    assert lines[-2].startswith("assumed: ")
    assert "Nothing is measured" in lines[-1]


def test_json_has_every_mesh(run: Run) -> None:
    found = report(run, "--model", "Llama-3.1-405B", "--gpus", "8xh100", "--hosts", "2", "--objective", "latency")
    assert found["model"]["num_params"] == pytest.approx(405.85e9, rel=1e-4)
    assert found["cluster"] == {"gpu": "h100", "gpus_per_host": 8, "hosts": 2, "memory_bytes": 81_559 * 2**20}
    assert found["plans"][0]["mesh"] == {"dp": 1, "pp": 2, "cp": 1, "tp": 8}
    assert [p["rank"] for p in found["plans"]] == list(range(1, len(found["plans"]) + 1))
    assert len(found["plans"]) + len(found["rejected"]) == 35
    assert {r["cause"] for r in found["rejected"]} == {"hosts", "memory"}
    memory = found["plans"][0]["memory"]
    assert memory["total"] == sum(memory[part] for part in ("weights", "sampler", "activations", "reserve", "kv"))
    assert found["assumptions"]["memory_fraction"] == 0.8


def test_no_mesh_fits(run: Run) -> None:
    result = run("plan", "--model", "llama-3.1-405b", "--gpus", "8xh100")
    assert result.code == 1
    assert "no mesh fits; the weights alone fill 11 × h100" in result.out
    overloaded = run("plan", "--model", "qwen2.5-7b", *GPUS, "--workload", "1000,200,100000")
    assert overloaded.code == 1
    assert "cannot keep up: 100000 requests/s asked" in overloaded.out


def test_options_reach_the_planner(run: Run) -> None:
    found = report(run, *GPUS, "--workload", "100,20,2.5", "--max-num-seqs", "16", "--max-num-batched-tokens", "64")
    assert found["workload"] == {"input_len": 100, "output_len": 20, "rate": 2.5, "concurrency": None}
    assert found["limits"] == {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": None}
    assert found["plans"][0]["tokens_per_second"] == 50
    found = report(
        run, *GPUS, "--workload", "100,20", "--concurrency", "24", "--dtype", "float32", "--max-model-len", "512"
    )
    assert (found["model"]["dtype"], found["model"]["kv_dtype"]) == ("float32", "float32")
    assert found["limits"]["max_model_len"] == 512
    assert next(p for p in found["plans"] if p["mesh"]["dp"] == 8)["batch"] == 3


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is run again on the same model and mesh gets the steps that were compiled the first time."""
    compiled: dict[tuple[BatchLayout, tuple[int, ...]], Any] = {}
    real = ModelRunner.step_program

    def step_program(runner: ModelRunner, layout: BatchLayout, num_blocks: tuple[int, ...]) -> Any:
        if (layout, num_blocks) not in compiled:
            compiled[layout, num_blocks] = real(runner, layout, num_blocks)
        return compiled[layout, num_blocks]

    monkeypatch.setattr(ModelRunner, "step_program", step_program)


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.usefixtures("optimized", "compiled_once")
def test_the_best_plan_is_verified(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of two layers only, so that half of the memory is that of sampling.
    arguments = ["--model", "qwen2.5-0.5b", "--gpus", "2xh100", "--hf-overrides", '{"num_hidden_layers": 2}']
    limits = ["--mesh", "tp=2", "--max-num-batched-tokens", "512"]
    result = run("plan", *arguments, *limits, "--verify")
    assert result.code == 0, result.out
    assert "tp=2, compiled" in result.out and "OFF" not in result.out
    assert "step[tokens=512, seqs=256] over tp" in result.out
    monkeypatch.setattr(cost_model, "layer_collectives", lambda *_: [])
    result = run("plan", *arguments, *limits, "--verify", "--json")
    assert result.code == 1
    off = [c for c in json.loads(result.out)["verified"] if not c["holds"]]
    assert [c["what"] for c in off] == ["decode[tokens=256, seqs=256] over tp", "step[tokens=512, seqs=256] over tp"]
    assert off[0]["predicted"] < off[0]["compiled"] == (1 + 4) * 256 * 896 * 2


def test_a_given_mesh_alone_with_its_links(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('[axes]\ntp = 8\n[links]\ntp = "pcie"\n')
    arguments = ["--model", "llama-3.1-70b", *GPUS, "--objective", "latency"]
    (fast,) = report(run, *arguments, "--mesh", "tp=8")["plans"]
    found = report(run, *arguments, "--mesh", file)
    (slow,) = found["plans"]
    assert found["rejected"] == []
    assert slow["mesh"] == fast["mesh"] == {"dp": 1, "pp": 1, "cp": 1, "tp": 8}
    assert slow["ttft"] > 1.5 * fast["ttft"]
    wrong = run("plan", *arguments, "--mesh", "tp=4")
    assert wrong.code == 2 and "it has 4 devices, the cluster 8 GPUs" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--gpus'"),
        (["--gpus", "8xv100"], "GPU 'v100' is not known; known: a100, h100, h200, b200, l40s"),
        (["--gpus", "many"], "GPU 'many' is not known"),
        (["--gpus", "16xh100", "--hosts", "2"], "a host has 1 to 8"),
        ([*GPUS, "--objective", "cost"], "--objective 'cost': it is one of latency, throughput"),
        ([*GPUS, "--workload", "1024"], "--workload '1024': prompt tokens, output tokens"),
        ([*GPUS, "--workload", "a,b"], "--workload 'a,b'"),
        ([*GPUS, "--workload", "1,2,3,4"], "--workload '1,2,3,4'"),
        ([*GPUS, "--workload", "0,5"], "workload input_len=0: it is above 0"),
        ([*GPUS, "--workload", "10,5,2", "--concurrency", "2"], "give one of them"),
        ([*GPUS, "--workload", "1000,500"], "sequences of 1500 tokens: this model's are at most 1024 long"),
        ([*GPUS, "--workload", "10,5", "--max-model-len", "12"], "max_model_len=12"),
        ([*GPUS, "--model", "llama-5"], "model 'llama-5': no such directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, run: Run) -> None:
    result = run("plan", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


# -- the planner's numbers are the engine's ----------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "padded heads": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
}


@pytest.mark.parametrize("model", ["demo", *VARIANTS])
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_weights_per_gpu_are_those_that_info_computes(model: str, tp: int, dp: int, run: Run, tmp_path: Path) -> None:
    directory = "demo" if model == "demo" else write_llama(tmp_path, **VARIANTS[model])
    info = json.loads(run("info", "--model", directory, "-tp", str(tp), "-dp", str(dp), "--json").out)
    found = report(run, "--model", directory, "--gpus", f"{tp * dp}xh200", "--workload", "64,32")
    mesh = {"dp": dp, "pp": 1, "cp": 1, "tp": tp}
    (plan,) = (p for p in found["plans"] if p["mesh"] == mesh)
    assert plan["memory"]["weights"] == pytest.approx(info["mesh"]["devices"][0]["weight_bytes"], rel=0.02)
    assert found["model"]["num_params"] == pytest.approx(info["model"]["num_parameters"], rel=0.002)


def test_kv_bytes_are_those_that_info_computes(run: Run) -> None:
    info = json.loads(run("info", "--model", "demo", "-tp", "2", "--kv-cache-dtype", "bfloat16", "--json").out)
    decoder = decoder_config(load_hf_config(Path(info["model"]["directory"])))
    mesh = MeshConfig(tp=2)
    shape = model_shape(decoder, "bfloat16", "bfloat16").fit_to(mesh)
    assert shape.kv_bytes_per_gpu(mesh, 1) == info["mesh"]["devices"][0]["kv_bytes_per_token"]
