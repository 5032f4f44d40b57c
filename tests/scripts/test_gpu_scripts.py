"""The scripts that measure on a GPU, without one: they run, they notice what is wrong, and what they compile for a GPU
is what they mean to time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from bench_gpu import PLANS, beside_floor, cost
from bench_kernels import Bench, Report, Result, print_report
from gpu_timing import Limits, Work, copies, copy_work, gemm_work, relative_error, time_work
from kernel_cases import AttentionCase, GroupedCase, Heads, Platform, cases, small_cases
from kernel_plot import draw
from kernel_rivals import comparable, cudnn, dense
from recorded_runs import Call
from tune_kernels import Subject, subjects, tune_all

from jaxserve import LLM
from jaxserve.weights.loader import abstract_params
from pallas_kernels import dispatch, tuning
from sharding import aot, build_mesh
from sharding.cost_model import Group, Step
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

pytestmark = pytest.mark.slow

LIMITS = Limits(bandwidth=4e12, flops=8e14)


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_small_kernels(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    code, out, err = call("bench_kernels", "--small", "--only", "tails", "--only", "64 × 32", "--json", path)
    assert (code, err) == (0, "")
    report = json.loads(path.read_text())
    done = {(r["op"], r["implementation"]) for r in report["results"] if r["seconds"] is not None}
    assert {("tails of logits", "triton_interpreted"), ("dequantising matmul", "triton_interpreted")} <= done
    assert report["bandwidth"] is None and all(r["of_bandwidth"] is None for r in report["results"])
    assert "tails of logits, triton: it is for NVIDIA GPUs" in out and "% copy" in out


@pytest.mark.parametrize("case", [small_cases()[i] for i in (0, 2, 3)], ids=lambda case: case.name)
def test_each_case_is_right_in_the_interpreter(case: Any) -> None:
    assert relative_error(case.work("triton_interpreted").result(), case.expected()) < 0.01


def test_a_wrong_kernel_is_reported_and_its_time_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = dispatch.TAILS["reference"]
    wrong = replace(reference, name="wrong", count=lambda x: lambda t: reference.count(x)(t) + 1)
    monkeypatch.setattr(dispatch, "TAILS", {"reference": reference, "wrong": wrong})
    found = {r.implementation: r for r in Bench(Platform("cpu", None), None, True).case(small_cases()[-1])}
    assert found["wrong"].seconds is None and "wrong: off by" in str(found["wrong"].reason)
    assert found["reference"].seconds is not None and found["reference"].error == 0


def test_shares_of_the_limits() -> None:
    case = small_cases()[0]
    result = Bench(Platform("gpu", (9, 0)), LIMITS, False).result(case, "triton", seconds=1e-3)
    assert result.of_bandwidth == pytest.approx(case.num_bytes / 1e-3 / 4e12) and result.share == result.of_bandwidth
    assert result.of_flops == pytest.approx(case.num_flops / 1e-3 / 8e14)


def test_bytes_and_flops_of_known_shapes() -> None:
    known = {f"{case.op}: {case.name}": case for case in cases()}
    assert len(known) == len(cases())
    decode = known["paged attention: decode 64 × 8k, 8 × 4 heads"]
    assert decode.num_bytes == 2 * 64 * 8192 * 8 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert decode.num_flops == 4 * 64 * 8192 * 32 * 128
    assert known["paged attention: prefill 8k, 1 × 8 heads"].num_flops == 4 * (8192 * 8193 // 2) * 8 * 128
    mixtral = known["grouped matmul: Mixtral, 4096 tokens, bfloat16"]
    assert mixtral.num_flops == 2 * 8192 * 4096 * 14336 and mixtral.goal.share == 0.6
    goals = [case.goal.share for case in cases() if case.goal.share is not None]
    assert {0.85, 0.7, 0.6} == set(goals)


def test_experts_without_rows_are_not_counted() -> None:
    case = GroupedCase("m", tokens=1, num_experts=64, experts_per_token=2, depth=32, columns=16)
    assert case.num_bytes == 2 * 32 * 16 * 2 + 2 * (32 + 16) * 2 and case.group_sizes.sum() == 2


def test_calls_wait_for_each_other() -> None:
    work = Work(lambda x, w: (x + w, x), lambda: jnp.zeros(4), [jnp.full(4, 1.0), jnp.full(4, 2.0)])
    timing = time_work(work, calls=3, repeats=2, repeat_seconds=0.0)
    assert timing.calls == 3 and 0 < timing.fastest <= timing.seconds <= timing.slowest
    assert copies(1) == 8 and copies(100 << 20) == 3 and copies(1 << 40) == 1


def test_errors_by_norm() -> None:
    one = jnp.ones(4)
    assert relative_error((one, one), (one, one)) == 0
    assert relative_error(one * 1.1, one) == pytest.approx(0.1, rel=1e-3)
    assert relative_error(one * jnp.nan, one) == float("inf") and relative_error(one, one * 0) == 1


def test_the_rivals_layout_is_the_same_attention() -> None:
    """Through XLA: cuDNN is not here."""
    case = AttentionCase("tiny", Step((Group(2, 9),)), Heads(2, 2, 16))
    assert comparable(case) and dense(case)[0].shape == (2, 9, 2, 16)
    with jax.numpy_dtype_promotion("standard"):  # jax's own attention is not strict
        assert relative_error(cudnn(case, "xla")[0], case.expected()) < 0.01
    assert not comparable(replace(case, step=Step.prefill(4, 4)))
    assert not comparable(replace(case, kv_dtype="int8"))


def made_up() -> list[Result]:
    """Figures that nobody measured, to look at the plot with."""
    shapes = [(c.op, c.name, c.goal) for c in cases() if "8 × 4" in c.name or "Mixtral" in c.name][:14]
    shares = {"triton": 0.7, "mosaic": 0.8, "reference": 0.05, "cuDNN": 0.75}
    return [
        Result(op, name, by, 1e9, 1e12, g.bound, g.share, 0.001, 1e-3, of_bandwidth=s + i / 99, of_flops=s - i / 999)
        for i, (op, name, g) in enumerate(shapes)
        for by, s in shares.items()
    ]


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(made_up(), tmp_path / "k.png", "made up")
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    print_report(Report("made up", "0", 4e12, 8e14, made_up()))
    assert "85% of copy" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([replace(made_up()[0], of_bandwidth=None, of_flops=None)], tmp_path / "no.png", "")


# -- programs for a GPU that is not there ------------------------------------------------------------------------------


def compiled_for_h200(work: Work, calls: int) -> str:
    """The optimised program of so many calls, from ENTRY on."""
    from gpu_timing import compiled

    mesh = build_mesh(MeshConfig(), aot.devices(Cluster.parse("h200:1")))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    operands = there(list(work.operands))
    carry = jax.eval_shape(work.carry)
    with jax.set_mesh(mesh), aot.not_cached():
        text = compiled(replace(work, operands=operands), calls, there(carry), aot.COMPILER_OPTIONS).as_text()
    return text[text.index("ENTRY") :]


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize("case", [small_cases()[i] for i in (0, 2, 3, 4, 6)], ids=lambda case: case.op)
def test_programs_have_every_call_and_copy_no_operand(case: Any) -> None:
    work = case.work("triton")
    text = compiled_for_h200(work, 3)
    names = re.findall(r' custom-call\(.*op_name="[^"]*/(\w+)/pallas_call"', text)
    assert names.count({"paged attention": "attend", "KV write": "kv_write"}.get(case.op, names[0])) == 3
    largest = max(x.size for x in jax.tree.leaves((work.operands[0], jax.eval_shape(work.carry))))
    copied = re.findall(r"\[([\d,]+)\]\S* copy\(", text)
    assert all(math.prod(map(int, dims.split(","))) < largest // 4 for dims in copied)


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_limits_do_their_whole_work() -> None:
    copied = compiled_for_h200(copy_work(1 << 20), 1)
    assert len(re.findall(r" fusion\(", copied)) == 1 and "copy(" not in copied
    assert len(re.findall(r"kind=k(?:Custom|Output)|custom-call\(| dot\(", compiled_for_h200(gemm_work(256), 4))) == 4


# -- engine ------------------------------------------------------------------------------------------------------------


def test_small_engine(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    code, out, _ = call("bench_gpu", "--small", "--json", path)
    assert code == 0 and "transformers: not with --small" in out
    rows = json.loads(path.read_text())["rows"]
    assert [(r["what"], r["batch"]) for r in rows] == [("decode", 1), ("decode", 4), ("ttft", 1), ("prefill", 4)]
    assert all(r["tokens_per_second"] > 0 and r["reason"] is None and r["times_floor"] is None for r in rows)
    assert 0 < rows[0]["host_share"] < 1


def test_what_does_not_fit_is_said_with_numbers(tiny_llm: LLM) -> None:
    from bench_gpu import decode

    plan = replace(PLANS[0], budget=64)
    row = decode(tiny_llm, plan, 64, 8192, None)
    assert row.tokens_per_second is None and "64 × " in str(row.reason) and "do not fit" in str(row.reason)
    assert not tiny_llm.engine.has_unfinished


def test_the_floor_of_a_step(tiny_llm: LLM) -> None:
    runner = tiny_llm.engine.runner
    dtype = runner.params[0].dtype
    params = {name: p.get_value() for name, p in abstract_params(runner.decoder, dtype)[1].items()}
    weights = sum(x.size * dtype.itemsize for name, x in params.items() if name != "embedding.weight")
    one, two = (cost(tiny_llm, Step.decode(1, n))[0] for n in (1, 33))
    kv = 2 * runner.decoder.num_layers * runner.decoder.num_kv_heads * runner.decoder.head_dim
    assert two - one == 32 * kv * runner.config.kv_dtype.itemsize
    assert one == pytest.approx(weights, rel=0.05)
    found = beside_floor(tiny_llm, Step.decode(1, 1), 2.0, Limits(bandwidth=one, flops=float("inf")))
    assert found["floor_seconds"] == 1 and found["times_floor"] == 2


def test_engines_of_the_plans_have_room_for_their_points() -> None:
    for plan in PLANS:
        options = plan.options()
        assert options["decode_buckets"][-1] == options["max_num_seqs"] == 256
        assert options["token_buckets"][-1] == plan.budget == options["max_num_batched_tokens"]
        assert 8192 + 64 < options["max_model_len"] < 9500


# -- tuning ------------------------------------------------------------------------------------------------------------


def test_candidates() -> None:
    chosen = subjects()
    assert {s.tunable.kernel for s in chosen} == set(tuning.KERNELS)
    for subject in chosen:
        candidates = list(subject.candidates())
        assert candidates[0] == subject.heuristic and len(set(candidates)) == len(candidates) > 2
        for sizes in candidates:  # what it writes can be read
            assert subject.tunable.sizes(subject.name, sizes.__dict__) == sizes


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    chosen, path = subjects(["kv_write"]), tmp_path / "nvidia_h200.json"
    measured: list[str] = []

    def measure(subject: Subject) -> dict[str, Any]:
        if measured:
            raise KeyboardInterrupt
        measured.append(subject.name)
        return {"sizes": dict(subject.heuristic.__dict__), "seconds": 1.0}

    with pytest.raises(KeyboardInterrupt):
        tune_all(chosen, path, False, measure)
    first = measured.pop()
    tuning.load.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        tune_all([*chosen, chosen[0]], path, True, measure)
    measured.clear()
    tuning.load.cache_clear()
    tune_all(chosen, path, False, measure)
    assert first == chosen[0].name and measured == [chosen[1].name]
    tunable = chosen[0].tunable
    tuning.load.cache_clear()
    entries = tuning.read(tunable.kernel, tunable.kind, tunable.shape, tunable.refuses, tmp_path).entries
    assert set(entries["nvidia_h200"]) == {s.name for s in chosen}


def test_a_dry_run_lists_candidates(call: Call) -> None:
    code, out, _ = call("tune_kernels", "--dry-run", "--only", "kv_write")
    assert code == 0 and "kv_write/triton: tokens=64 kv_heads=8 group=4 head_dim=128: 15 candidates" in out
    assert "30 candidates of 2 shapes" in out


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("bench_kernels", [], "no GPU: jax has cpu devices only"),
        ("bench_kernels", ["--only", "softmax"], "--only softmax: no such op or shape"),
        ("bench_kernels", ["--small", "--json", "no/such/place"], "no/such is no directory"),
        ("bench_gpu", [], "no GPU: jax has cpu devices only"),
        ("bench_gpu", ["--model", "gpt"], "--model gpt: there are llama-3.1-8b, qwen2.5-0.5b"),
        ("tune_kernels", [], "no GPU: jax has cpu devices only"),
        ("tune_kernels", ["--only", "softmax"], "--only softmax: no such kernel or shape"),
    ],
)
def test_errors_are_one_line(call: Call, script: str, flags: list[str], said: str) -> None:
    code, _, err = call(script, *flags)
    assert code == 2 and len(err.splitlines()) == 1 and said in err and err.startswith("error: ")


@pytest.mark.parametrize("script", ["bench_kernels", "bench_gpu", "tune_kernels"])
def test_help_has_examples(call: Call, script: str) -> None:
    code, out, _ = call(script, "--help")
    assert code == 0 and f"python scripts/{script}.py" in out
