"""GPUs and links by name, and which ranks of a mesh share a host."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sharding.aot import target_config
from sharding.hardware import GB, GIB, GPUS, INFINIBAND_NDR, LINK_FRACTION, NVLINK4, PCIE5, Cluster, find_gpu
from sharding.mesh import MeshConfig


@pytest.mark.parametrize(
    ("text", "hosts", "expected"),
    [
        ("8xh200", None, ("h200", 8, 1)),
        ("h200:8", None, ("h200", 8, 1)),
        (" 4 x H100-SXM ", None, ("h100", 4, 1)),
        ("A100-SXM-80GB:2", None, ("a100", 2, 1)),
        ("b200", None, ("b200", 1, 1)),
        ("16xh100", None, ("h100", 8, 2)),
        ("8xl40s", 3, ("l40s", 8, 3)),
        ("4xh100", 2, ("h100", 4, 2)),
    ],
)
def test_parse(text: str, hosts: int | None, expected: tuple[str, int, int]) -> None:
    cluster = Cluster.parse(text, hosts)
    assert (cluster.gpu.name, cluster.gpus_per_host, cluster.hosts) == expected
    assert cluster.num_gpus == expected[1] * expected[2]


@pytest.mark.parametrize(
    ("text", "hosts", "message"),
    [
        ("8xv100", None, "GPU 'v100' is not known; known: a100, h100, h200, b200, l40s"),
        ("0xh100", None, "at least one"),
        ("eight h100", None, 'write "8xh200" or "h200:8"'),
        ("", None, 'write "8xh200" or "h200:8"'),
        ("12xh100", None, "hosts of 8 each"),
        ("16xh100", 2, "a host has 1 to 8"),
        ("8xh100", 0, "at least one"),
    ],
)
def test_parse_refuses(text: str, hosts: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Cluster.parse(text, hosts)
    assert "\n" not in str(error.value)


def test_figures_are_of_the_right_size() -> None:
    gib = {"a100": 80, "h100": 80, "h200": 140, "b200": 179, "l40s": 45}
    assert {name: round(gpu.memory_bytes / GIB) for name, gpu in GPUS.items()} == gib
    for gpu in GPUS.values():
        peaks = gpu.peak_flops
        assert peaks["bfloat16"] == peaks["float16"]
        assert 1.8 < peaks["bfloat16"] / peaks["float32"] < 2.2
        assert 1.9 < peaks["int8"] / peaks["bfloat16"] < 2.1
        assert gpu.intra.bandwidth > gpu.inter.bandwidth
        assert gpu.intra.latency < gpu.inter.latency
        assert gpu.flops("bfloat16") < peaks["bfloat16"]
    assert find_gpu("h100").intra.achievable == 450 * GB * LINK_FRACTION


def test_an_a100_has_no_float8() -> None:
    with pytest.raises(
        ValueError, match="a100 does not compute in float8; it does in bfloat16, float16, float32, int8"
    ):
        find_gpu("a100").flops("float8")


@pytest.mark.parametrize(
    ("mesh", "axes", "size", "per_host"),
    [
        ("tp=8,dp=2", ("tp",), 8, 8),
        ("tp=16", ("tp",), 16, 8),
        ("pp=2,tp=8", ("pp",), 2, 1),
        ("pp=4,tp=4", ("pp",), 4, 2),
        ("pp=4,tp=4", ("pp", "tp"), 16, 8),
        ("pp=2,tp=8", ("pp", "tp"), 16, 8),
        ("dp=2,cp=2,tp=4", ("cp",), 2, 2),
        ("dp=2,pp=2,cp=2,tp=2", ("pp",), 2, 2),
        ("dp=2,pp=2,cp=2,tp=2", ("dp",), 2, 1),
    ],
)
def test_where_ranks_lie(mesh: str, axes: tuple[str, ...], size: int, per_host: int) -> None:
    span = Cluster.parse("16xh100").span(MeshConfig.parse(mesh), axes)
    assert (span.size, span.per_host, span.hosts) == (size, per_host, size // per_host)


def test_groups_that_straddle_hosts_go_at_the_slow_pace() -> None:
    cluster = Cluster.parse("8xh100", 3)
    assert cluster.span(MeshConfig(dp=8, tp=3), ("tp",)).per_host == 1
    assert cluster.span(MeshConfig(dp=2, tp=12), ("tp",)).per_host == 1


def test_links_that_a_mesh_names() -> None:
    cluster, links = Cluster.parse("16xh100"), (("tp", "nvlink"), ("pp", "infiniband"))
    mesh = MeshConfig(pp=2, tp=8, links=links)
    both = cluster.span(mesh, ("pp", "tp"))
    assert (both.intra, both.inter) == (NVLINK4, INFINIBAND_NDR)
    rack = cluster.span(MeshConfig(tp=16, links=(("tp", "nvlink"),)), ("tp",))
    assert (rack.hosts, rack.inter) == (2, NVLINK4)
    slow = cluster.span(MeshConfig(dp=2, pp=2, tp=4, links=(("pp", "pcie"),)), ("pp", "tp"))
    assert (slow.size, slow.intra) == (8, PCIE5)
    with pytest.raises(ValueError, match="l40s has no nvlink"):
        Cluster.parse("8xl40s").span(MeshConfig(tp=8, links=(("tp", "nvlink"),)), ("tp",))


def test_planning_does_not_load_jax() -> None:
    check = "import sys, sharding.planner; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_compiler_is_told_what_a_gpu_is() -> None:
    text = target_config(find_gpu("h200"))
    for line in (
        'name: "NVIDIA H200"',
        "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }",
        "device_memory_size: 150754820096",
        "memory_bandwidth: 4800000000000",
        "shared_memory_per_core: 233472",
        "shared_memory_per_block_optin: 232448",
    ):
        assert line in text
    assert "{ major: 8 minor: 9 feature_extension: NONE }" in target_config(find_gpu("l40s"))
    for gpu in GPUS.values():  # fused multiply-adds of the plain units are well below the peak of the others
        assert 2 * gpu.chip.num_sms * gpu.chip.fp32_units * gpu.chip.clock_ghz * 1e9 < gpu.peak_flops["bfloat16"]
