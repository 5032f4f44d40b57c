"""Plans that people who serve models would expect, and what must hold of every plan."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve import model_configs
from jaxserve.models.registry import decoder_config, load_hf_config
from jaxserve.models.shape import model_shape
from sharding.hardware import GPUS, Cluster
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape
from sharding.planner import Limits, Plan, Ranking, Rejection, Workload, fewest_gpus, meshes, rank, score


@cache
def shape(name: str) -> ModelShape:
    directory = model_configs.find(name)
    assert directory is not None
    return model_shape(decoder_config(load_hf_config(directory)), "bfloat16", "bfloat16")


def ranking(name: str, gpus: str, objective: str = "throughput", work: Workload | None = None) -> Ranking:
    return rank(shape(name), Cluster.parse(gpus), work or Workload(), objective)  # pyright: ignore[reportArgumentType]


def best(name: str, gpus: str, objective: str = "throughput") -> str:
    plans = ranking(name, gpus, objective).plans
    return str(plans[0].mesh) if plans else "none"


# -- known answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpus", "objective", "expected"),
    [
        ("llama-2-13b", "4xh100", "latency", "dp=1,pp=1,cp=1,tp=4"),
        ("llama-3.1-70b", "8xh100", "latency", "dp=1,pp=1,cp=1,tp=8"),
        ("llama-3.1-70b", "1xh100", "throughput", "none"),
        ("llama-3.1-405b", "8xh100", "latency", "none"),
        ("llama-3.1-405b", "8xb200", "latency", "dp=1,pp=1,cp=1,tp=8"),
        ("llama-3.1-405b", "16xh100", "latency", "dp=1,pp=2,cp=1,tp=8"),
        ("llama-3.1-405b", "16xh100", "throughput", "dp=1,pp=2,cp=1,tp=8"),
        ("llama-3.1-8b", "8xh100", "throughput", "dp=8,pp=1,cp=1,tp=1"),
        ("qwen2.5-0.5b", "8xl40s", "throughput", "dp=8,pp=1,cp=1,tp=1"),
        ("qwen2.5-7b", "1xa100", "throughput", "dp=1,pp=1,cp=1,tp=1"),
    ],
)
def test_known_answers(name: str, gpus: str, objective: str, expected: str) -> None:
    assert best(name, gpus, objective) == expected


def test_70b_fits_four_h100() -> None:
    plans = ranking("llama-3.1-70b", "4xh100").plans
    assert "dp=1,pp=1,cp=1,tp=4" in {str(p.mesh) for p in plans}


@pytest.mark.parametrize("name", model_configs.names())
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_tp_stays_inside_a_host(name: str, objective: str) -> None:
    found = ranking(name, "16xh100", objective)
    for plan in found.plans:
        assert plan.mesh.tp * plan.mesh.cp <= 8
    reasons = {r.reason for r in found.rejected if r.mesh.tp == 16}
    assert all(
        reason.startswith(("tp=16 crosses hosts of 8", "tp=16 does not fit 14 query heads")) for reason in reasons
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("llama-2-13b", 13.02),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-72b", 72.71),
    ],
)
def test_shipped_shapes_have_the_published_parameters(name: str, billions: float) -> None:
    assert shape(name).num_params / 1e9 == pytest.approx(billions, rel=1e-3)


# -- rejections --------------------------------------------------------------------------------------------------------


def test_rejections_carry_the_numbers() -> None:
    cluster = Cluster.parse("16xh100")

    def why(name: str, mesh: str, work: Workload | None = None, limits: Limits | None = None) -> str:
        outcome = score(shape(name), cluster, MeshConfig.parse(mesh), work or Workload(), "throughput", limits)
        assert isinstance(outcome, Rejection)
        assert "\n" not in outcome.reason
        return outcome.reason

    reason = why("llama-3.1-70b", "dp=16")
    assert reason.startswith("does not fit: 131.4 GiB of weights per GPU, 7")
    assert reason.endswith("pp·tp of 2 or more would")
    assert why("qwen2.5-0.5b", "tp=16") == "tp=16 does not fit 14 query heads; at most tp=14 does"
    assert why("llama-2-13b", "pp=64") == "pp=64 does not fit 40 layers; at most pp=40 does"
    assert why("llama-3.1-405b", "tp=16").startswith("tp=16 crosses hosts of 8: never proposed; its collectives take ")
    assert "over NVLink 4" in why("llama-3.1-405b", "tp=16")
    reason = why("llama-3.1-70b", "dp=8,tp=2", limits=Limits(max_model_len=100_000))
    assert reason.startswith("no room for one sequence of 100000 tokens: 15.3 GiB of KV per GPU, ")
    assert why("llama-3.1-8b", "dp=2,tp=8", Workload(rate=1e4)).startswith("cannot keep up: 10000 requests/s asked, ")


def test_windows_that_do_not_divide_into_stages() -> None:
    windowed = replace(shape("llama-3.1-8b"), windows=(None, 1024) * 16)
    assert windowed.fit_to(MeshConfig(pp=4)).stage_windows(MeshConfig(pp=4)) == {None: 4, 1024: 4}
    uneven = replace(windowed, windows=(None, None, 1024, 1024) * 8)
    with pytest.raises(ValueError, match=r"pp=16 puts layers of different windows .*; pp that fits: 1, 2, 3.*, 8"):
        uneven.fit_to(MeshConfig(pp=16))


def test_the_fewest_gpus() -> None:
    assert fewest_gpus(shape("llama-3.1-405b"), Cluster.parse("h100")) == 11
    assert fewest_gpus(shape("llama-3.1-70b"), Cluster.parse("h100")) == 2


# -- workloads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"input_len": 0},
        {"output_len": -1},
        {"rate": 0.0},
        {"concurrency": 0},
        {"rate": float("inf")},
        {"rate": 1, "concurrency": 1},
    ],
)
def test_workloads_refuse(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="workload"):
        Workload(**options)  # pyright: ignore[reportArgumentType]


def test_the_cluster_must_compute_in_the_dtype() -> None:
    with pytest.raises(ValueError, match="a100 does not compute in float8"):
        rank(replace(shape("llama-3.1-8b"), dtype="float8"), Cluster.parse("a100"), Workload())


def test_a_workload_must_fit_its_own_limit() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=1000: .* 1024 \+ 256 tokens"):
        rank(shape("llama-3.1-8b"), Cluster.parse("a100"), Workload(), limits=Limits(max_model_len=1000))


def test_a_rate_is_met_with_no_more_sequences_than_it_takes() -> None:
    cluster, mesh = Cluster.parse("8xh100"), MeshConfig(dp=8)
    plans = [score(shape("llama-3.1-8b"), cluster, mesh, Workload(rate=rate)) for rate in (1.0, 40.0, 120.0)]
    assert all(isinstance(p, Plan) for p in plans)
    found = [p for p in plans if isinstance(p, Plan)]
    assert [p.batch for p in found] == sorted({p.batch for p in found})
    assert found[0].batch == 1
    for plan, rate in zip(found, (1.0, 40.0, 120.0), strict=True):
        assert plan.tokens_per_second == rate * 256 <= plan.max_tokens_per_second
        assert plan.batch / plan.request_seconds(Workload()) * 8 >= rate


def test_concurrency_is_dealt_to_the_replicas() -> None:
    cluster = Cluster.parse("8xh100")
    few, many, all_ = (
        score(shape("llama-3.1-8b"), cluster, MeshConfig(dp=8), Workload(concurrency=n)) for n in (2, 20, 10**6)
    )
    assert isinstance(few, Plan) and isinstance(many, Plan) and isinstance(all_, Plan)
    assert (few.batch, many.batch, all_.batch) == (1, 3, 256)
    assert few.tokens_per_second < many.tokens_per_second < all_.tokens_per_second == all_.max_tokens_per_second


def test_a_pipeline_costs_latency_and_its_padding_shows() -> None:
    plans = {str(p.mesh): p for p in ranking("llama-3.1-405b", "16xh100", "latency").plans}
    assert plans["dp=1,pp=4,cp=1,tp=4"].time_per_token > plans["dp=1,pp=2,cp=1,tp=8"].time_per_token
    assert plans["dp=1,pp=4,cp=1,tp=4"].padding == pytest.approx(2 / 128, rel=0.05)  # 126 layers in 4 stages of 32
    assert plans["dp=1,pp=2,cp=1,tp=8"].padding < 0.001


# -- every plan --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 64))
def test_meshes_are_all_and_each_once(num_devices: int) -> None:
    found = list(meshes(num_devices))
    assert len(set(found)) == len(found)
    assert all(m.num_devices == num_devices for m in found)
    if num_devices in (8, 16):
        assert len(found) == {8: 20, 16: 35}[num_devices]


@given(
    name=st.sampled_from(model_configs.names()),
    gpu=st.sampled_from(sorted(GPUS)),
    count=st.sampled_from([1, 2, 6, 8, 16]),
    objective=st.sampled_from(["latency", "throughput"]),
    work=st.builds(Workload, st.integers(1, 4000), st.integers(1, 500), st.none() | st.floats(0.1, 50)),
)
def test_plans_are_possible(name: str, gpu: str, count: int, objective: str, work: Workload) -> None:
    found = ranking(name, f"{count}x{gpu}", objective, work)
    every = [o.mesh for o in (*found.plans, *found.rejected)]
    assert sorted(map(str, every)) == sorted(map(str, meshes(count)))
    for plan in found.plans:
        assert 0 < plan.memory.total <= GPUS[gpu].memory_bytes
        assert plan.kv_tokens >= plan.mesh.dp * work.length
        assert 1 <= plan.batch <= 256
        assert min(plan.ttft, plan.time_per_token) > 0
        assert 0 < plan.tokens_per_second <= plan.max_tokens_per_second * (1 + 1e-9)
        assert 0 <= plan.padding < 1
    scores = [p.request_seconds(work) if objective == "latency" else -p.max_tokens_per_second for p in found.plans]
    assert scores == sorted(scores)


@given(count=st.sampled_from([1, 4, 8]), input_len=st.integers(1, 3000), output_len=st.integers(1, 300))
def test_twice_the_memory_bandwidth_never_hurts(count: int, input_len: int, output_len: int) -> None:
    gpu, work = GPUS["h200"], Workload(input_len, output_len, concurrency=16)
    faster = replace(gpu, memory_bandwidth=2 * gpu.memory_bandwidth)
    for mesh in (MeshConfig(dp=count), MeshConfig(tp=count), MeshConfig(pp=count)):
        slow, fast = (score(shape("llama-3.1-8b"), Cluster(g, count), mesh, work) for g in (gpu, faster))
        assert isinstance(slow, Plan) and isinstance(fast, Plan)
        assert fast.time_per_token <= slow.time_per_token * (1 + 1e-9)
        assert fast.ttft <= slow.ttft * (1 + 1e-9)


# -- shipped configs ---------------------------------------------------------------------------------------------------


def test_configs_are_found_by_name() -> None:
    found = model_configs.find("Llama-3.1-70B")
    assert found is not None and found.name == "llama-3.1-70b"
    assert json.loads((found / "config.json").read_text())["num_hidden_layers"] == 80
    for name in ("llama-4", "", ".", "..", "../demo_model", "meta-llama/Llama-3.1-70B"):
        assert model_configs.find(name) is None
