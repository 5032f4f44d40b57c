"""Costs against numbers worked out by hand, against the engine's own, and properties that any cost has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.build import GPU_RESERVE_BYTES
from jaxserve.engine_args import EngineArgs
from jaxserve.models.config import DecoderConfig, LayerConfig
from sharding import cost_model
from sharding.collectives import Kind, collective, direct, ring
from sharding.cost_model import (
    Group,
    MemoryPerGpu,
    Step,
    attended,
    attention_work,
    bubble,
    communication_time,
    dense_work,
    keys_read,
    kv_tokens,
    layer_collectives,
    layer_time,
    memory_per_gpu,
    payload_bytes,
    schedule_grid,
    tick_time,
    vocabulary_work,
)
from sharding.hardware import COLLECTIVE_SECONDS, GPUS, Cluster, Link, Span
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape, vocabulary_shards

ONE = MeshConfig()
SMALL = ModelShape(
    num_layers=2, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=8, intermediate_size=96, vocab_size=100
)
LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = ModelShape(80, 8192, 64, 8, 128, 28672, 128256)
FAST = Link("test", 1e9 / 0.8, 1e-6)  # 1 GB/s achievable
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute")

# -- shapes ------------------------------------------------------------------------------------------------------------


def test_parameters_by_hand() -> None:
    # QKV 64*(8+2*2)*8, output 8*8*64; gate, up, down 3*64*96; two tables 100*64.
    assert SMALL.attention_params == 6144 + 4096
    assert SMALL.stored_mlp_params == SMALL.active_mlp_params == 18432
    assert SMALL.num_params == 2 * (10240 + 18432) + 2 * 6400
    assert replace(SMALL, gated=False, tied=True).num_params == 2 * (10240 + 12288) + 6400


@given(
    kv_heads=st.integers(1, 12),
    group=st.integers(1, 8),
    ffn=st.integers(1, 300),
    vocab=st.integers(1, 500),
    tp=st.integers(1, 16),
)
def test_a_shape_fits_a_mesh_as_the_decoder_does(kv_heads: int, group: int, ffn: int, vocab: int, tp: int) -> None:
    decoder = DecoderConfig(vocab, 64, ffn, kv_heads * group, kv_heads, 8, (LayerConfig(),) * 2, 64)
    shape = ModelShape(2, 64, kv_heads * group, kv_heads, 8, ffn, vocab)
    if tp > kv_heads * group:
        with pytest.raises(ValueError, match=f"tp={tp} does not fit {kv_heads * group} query heads"):
            shape.fit_to(MeshConfig(tp=tp))
        return
    theirs, ours = decoder.fit_to(tp), shape.fit_to(MeshConfig(tp=tp))
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_heads, theirs.num_kv_heads)
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.vocab_size == theirs.vocab_size + theirs.vocab_padding


@given(layers=st.integers(1, 12), pp=st.integers(1, 14), period=st.integers(1, 4))
def test_stages_agree_where_the_decoders_do(layers: int, pp: int, period: int) -> None:
    windows = tuple(None if i % period == 0 else 16 for i in range(layers))
    decoder = DecoderConfig(64, 64, 64, 8, 8, 8, tuple(LayerConfig(window=w) for w in windows), 64)
    shape = ModelShape(layers, 64, 8, 8, 8, 64, 64, windows=windows)
    try:
        staged = decoder.staged(pp)
    except ValueError:
        with pytest.raises(ValueError, match=f"pp={pp} "):
            shape.fit_to(MeshConfig(pp=pp))
        return
    fitted, mesh = shape.fit_to(MeshConfig(pp=pp)), MeshConfig(pp=pp)
    assert fitted.layers_per_stage(mesh) == staged.layers_per_stage
    assert fitted.stage_windows(mesh) == Counter(layer.window for layer in staged.stage_layers)


def test_weights_and_kv_are_divided() -> None:
    mesh = MeshConfig(dp=3, pp=2, tp=4)
    fitted = SMALL.fit_to(mesh)
    assert fitted.num_kv_heads == 4  # each of the two is there twice
    layer = (2 * 64 * (8 + 4) * 8 + 18432) // 4
    assert fitted.vocab_size == 104
    assert fitted.params_per_gpu(mesh) == layer + 2 * 104 * 64 // 8
    assert fitted.kv_bytes_per_gpu(mesh, 10) == 1 * 10 * 2 * 1 * 8 * 2
    assert fitted.kv_bytes_per_gpu(replace(mesh, cp=2), 10) == 1 * 10 * 2 * 1 * 8 * 2 / 2
    assert fitted.kv_bytes_per_gpu(mesh, 10) / 10 * mesh.tp * mesh.pp == 2 * SMALL.kv_bytes_per_gpu(ONE, 10) / 10


def test_windows_bound_the_cache() -> None:
    shape = replace(SMALL, windows=(None, 4))
    token = 2 * 2 * 8 * 2
    assert shape.kv_bytes_per_gpu(ONE, 3) == 2 * 3 * token
    assert shape.kv_bytes_per_gpu(ONE, 10) == (10 + 4) * token


@pytest.mark.parametrize("option", [{"dtype": "int4"}, {"kv_dtype": "fp8"}, {"windows": (1,)}])
def test_shapes_refuse(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"int4|fp8|1 windows for 2 layers"):
        replace(SMALL, **option)  # pyright: ignore[reportArgumentType]


# -- work --------------------------------------------------------------------------------------------------------------


def test_work_by_hand() -> None:
    decode, mesh = Step.decode(batch=4, context=10), MeshConfig(tp=2)
    assert dense_work(SMALL, 4, mesh).flops == 2 * 4 * 28672 / 2
    assert dense_work(SMALL, 4, mesh).bytes == 28672 * 2 / 2
    assert attention_work(SMALL, decode, mesh).flops == 4 * (4 * 10) * 8 * 8 / 2
    assert attention_work(SMALL, decode, mesh).bytes == (4 * 10 + 4) * (2 * 2 * 8 * 2) / 2
    assert attention_work(SMALL, decode, mesh, window=3).bytes == (4 * 3 + 4) * (2 * 2 * 8 * 2) / 2
    chunk = Step.prefill(6, num_cached=10)
    assert attention_work(SMALL, chunk, ONE).flops == 4 * (11 + 12 + 13 + 14 + 15 + 16) * 8 * 8
    assert attention_work(SMALL, chunk, ONE).bytes == (16 + 6) * (2 * 2 * 8 * 2)
    assert vocabulary_work(SMALL, decode, mesh).flops == 2 * 4 * 6400 / 2
    assert vocabulary_work(SMALL, decode, mesh).bytes == (6400 / 2 + 4 * 64) * 2


@given(st.integers(0, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_are_those_of_a_mask(num_tokens: int, num_cached: int, window: int | None) -> None:
    positions = range(num_cached, num_cached + num_tokens)
    seen = [range(max(0, i + 1 - (window or i + 1)), i + 1) for i in positions]
    assert attended(num_tokens, num_cached, window) == sum(map(len, seen))
    if num_tokens:
        assert keys_read(num_tokens, num_cached, window) == len(set().union(*seen))


def test_a_mixed_step_is_the_sum_of_its_parts() -> None:
    decode, chunk = Step.decode(3, 20), Step.prefill(16)
    both = decode + chunk
    assert (both.num_rows, both.num_seqs) == (19, 4)
    parts = [attention_work(SMALL, step, ONE) for step in (decode, chunk)]
    assert attention_work(SMALL, both, ONE).flops == sum(p.flops for p in parts)
    assert attention_work(SMALL, both, ONE).bytes == sum(p.bytes for p in parts)


def test_a_step_is_its_layers_and_what_is_around_them() -> None:
    cluster, step = Cluster(GPUS["h100"], 1), Step.decode(8, 500)
    layer, tick = layer_time(LLAMA_8B, step, ONE, cluster), tick_time(LLAMA_8B, step, ONE, cluster)
    weights = 2 * (LLAMA_8B.num_params - LLAMA_8B.unembedding_params) + 2 * 8 * 4096
    kv = 32 * (8 * 500 + 8) * 2 * 8 * 128 * 2
    assert tick.memory == pytest.approx((weights + kv) / (0.8 * 3.35e12))
    assert tick.launches == pytest.approx((32 * 10 + 20) * 2e-6)
    assert tick.seconds > 32 * layer.seconds
    assert tick.bound_by == "memory"


def test_prefill_is_bound_by_compute() -> None:
    cluster, step = Cluster(GPUS["h100"], 1), Step.prefill(2048)
    tick = tick_time(LLAMA_8B, step, ONE, cluster)
    dense = 2 * 2048 * 32 * (LLAMA_8B.attention_params + LLAMA_8B.stored_mlp_params)
    attention = 32 * 4 * (2048 * 2049 / 2) * 4096
    assert tick.compute == pytest.approx((dense + attention) / (0.7 * 989e12), rel=0.01)
    assert tick.bound_by == "compute"


# -- communication -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_rings_by_hand(ranks: int) -> None:
    n = 1e6
    times = {kind: ring(kind, n, ranks, FAST) for kind in KINDS}
    assert times["all_reduce"].bandwidth == pytest.approx(2 * (ranks - 1) / ranks * n / 1e9)
    assert times["all_reduce"].latency == pytest.approx(2 * (ranks - 1) * 1e-6)
    assert times["all_gather"] == times["reduce_scatter"]
    assert times["all_gather"].seconds * 2 == pytest.approx(times["all_reduce"].seconds)
    assert times["permute"].bandwidth == pytest.approx(n / 1e9)
    assert direct("all_reduce", n, ranks, FAST).bandwidth == pytest.approx((ranks - 1) * n / 1e9)
    assert direct("all_to_all", n, ranks, FAST).bandwidth == pytest.approx((ranks - 1) / ranks * n / 1e9)


def test_small_all_reduces_are_direct_and_large_ones_rings() -> None:
    span = Span(8, 8, FAST, FAST)
    for n, better in ((100, direct), (10**8, ring)):
        expected = better("all_reduce", n, 8, FAST).seconds + COLLECTIVE_SECONDS
        assert collective("all_reduce", n, span).seconds == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_crossing_hosts_costs_more(kind: Kind) -> None:
    gpu = GPUS["h100"]
    for n in (100, 10**5, 10**8):
        inside, across = (collective(kind, n, Span(8, r, gpu.intra, gpu.inter)).seconds for r in (8, 4))
        spread = collective(kind, n, Span(8, 1, gpu.intra, gpu.inter)).seconds
        assert inside < across
        assert inside < spread


def test_one_rank_does_not_communicate() -> None:
    assert collective("all_reduce", 10**9, Span(1, 1, FAST, FAST)).seconds == 0
    assert payload_bytes(SMALL, Step.decode(4, 10), MeshConfig(dp=8)) == {}


def test_payload_by_hand() -> None:
    step = Step.decode(4, 10) + Step.prefill(6)
    rows, seqs, row = 10, 5, 64 * 2
    mesh = MeshConfig(dp=2, tp=2)
    expected = 2 * 2 * rows * row + rows * row + 2 * seqs * 8
    assert payload_bytes(SMALL.fit_to(mesh), step, mesh) == {("tp",): expected}
    mesh = MeshConfig(pp=2)
    handed = rows * row + seqs * row  # to the next stage; the last stage's to all
    vocabulary = rows * row + 2 * seqs * 8
    assert payload_bytes(SMALL.fit_to(mesh), step, mesh) == {("pp",): handed + vocabulary}
    mesh = MeshConfig(cp=2, tp=2)
    merged = 2 * rows * (8 // 2) * (4 + 4 * (8 + 1))
    assert payload_bytes(SMALL.fit_to(mesh), step, mesh) == {("tp",): expected, ("cp",): merged}
    mesh = MeshConfig(pp=2, tp=2)
    assert payload_bytes(SMALL.fit_to(mesh), step, mesh) == {
        ("tp",): 2 * 1 * rows * row,
        ("pp", "tp"): vocabulary,
        ("pp",): handed,
    }


@pytest.mark.parametrize("gpu", ["a100", "h100", "h200", "b200"])
def test_decode_waits_for_latency_and_prefill_for_bandwidth(gpu: str) -> None:
    cluster, mesh = Cluster(GPUS[gpu], 8), MeshConfig(tp=8)
    for step, is_decode in ((Step.decode(1, 1000), True), (Step.decode(8, 1000), True), (Step.prefill(2048), False)):
        time = communication_time(layer_collectives(LLAMA_70B, step, mesh), mesh, cluster)
        assert (time.latency > time.bandwidth) == is_decode


# -- pipeline ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 6))
def test_the_bubble_is_what_the_grid_shows(stages: int, microbatches: int, rounds: int) -> None:
    grid = schedule_grid(stages, microbatches, rounds)
    cells = [cell for row in grid for cell in row]
    assert bubble(stages, microbatches, rounds) == Fraction(cells.count(None), len(cells))
    if rounds == 1:
        assert bubble(stages, microbatches) == Fraction(stages - 1, microbatches + stages - 1)
    for row, after in pairwise(grid):
        assert after[1:] == row[:-1]  # a microbatch goes on to the next stage a tick later
    assert all(row.count(m) == rounds for row in grid for m in range(microbatches))


@given(st.integers(1, 9), st.integers(0, 5))
def test_a_full_pipeline_has_no_bubble_once_filled(stages: int, more: int) -> None:
    grid = schedule_grid(stages, stages + more, rounds=4)
    ticks = len(grid[0])
    assert all(None not in row[stages - 1 : ticks - stages + 1] for row in grid)


def test_a_pipeline_that_is_not_full_idles() -> None:
    assert bubble(4, 1, rounds=1000) == pytest.approx(3 / 4, abs=1e-3)
    assert bubble(4, 4, rounds=1000) == pytest.approx(0, abs=1e-3)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_by_hand() -> None:
    mesh = MeshConfig(tp=8)
    memory = memory_per_gpu(LLAMA_70B, mesh, GPUS["h100"], num_slots=256, num_rows=2048)
    assert memory.weights == LLAMA_70B.num_params // 8 * 2
    assert memory.sampler == 256 * 128256 // 8 * 8
    assert memory.total == int(81_559 * 2**20 * 0.92)
    token = 80 * 2 * 1 * 128 * 2
    assert kv_tokens(LLAMA_70B, mesh, memory, sequence=1000) == memory.kv // token


def test_the_engine_and_the_planner_leave_the_same_free() -> None:
    assert EngineArgs.gpu_memory_utilization == cost_model.MEMORY_UTILIZATION
    assert GPU_RESERVE_BYTES == cost_model.RESERVE_BYTES


def test_what_does_not_fit_has_no_cache() -> None:
    memory = memory_per_gpu(LLAMA_70B, ONE, GPUS["h100"], num_slots=1, num_rows=1)
    assert memory.kv == 0
    assert memory.needed == memory.total > GPUS["h100"].memory_bytes
    assert MemoryPerGpu(1, 2, 3, 4, 5).needed == 10


# -- properties --------------------------------------------------------------------------------------------------------

sizes = st.integers(0, 10**9)
spans = st.sampled_from([Span(p, r, g.intra, g.inter) for g in GPUS.values() for p in (2, 4, 8) for r in (1, 2, p)])
meshes = st.sampled_from([MeshConfig(pp=pp, cp=cp, tp=tp) for pp in (1, 2) for cp in (1, 2) for tp in (1, 4)])
groups = st.builds(Group, st.integers(1, 64), st.integers(1, 512), st.integers(0, 4096))


@given(st.sampled_from(KINDS), sizes, sizes, spans)
def test_more_bytes_take_no_less_time(kind: Kind, a: int, b: int, span: Span) -> None:
    low, high = sorted((a, b))
    assert 0 < collective(kind, low, span).seconds <= collective(kind, high, span).seconds * (1 + 1e-12)


@given(st.sampled_from(KINDS), sizes, spans)
def test_faster_links_never_hurt(kind: Kind, num_bytes: int, span: Span) -> None:
    before = collective(kind, num_bytes, span).seconds
    for name in ("intra", "inter"):
        link: Link = getattr(span, name)
        faster = replace(span, **{name: replace(link, bandwidth=2 * link.bandwidth)})
        assert collective(kind, num_bytes, faster).seconds <= before * (1 + 1e-12)


@given(groups, st.integers(0, 1000), meshes, st.sampled_from([None, 300]))
def test_longer_contexts_take_no_less_time(group: Group, more: int, mesh: MeshConfig, window: int | None) -> None:
    cluster, shape = Cluster(GPUS["h100"], 8), replace(LLAMA_8B.fit_to(mesh), windows=(window,) * 32)
    longer = replace(group, num_cached=group.num_cached + more)
    times = [tick_time(shape, Step((g,)), mesh, cluster).seconds for g in (group, longer)]
    assert 0 < times[0] <= times[1] * (1 + 1e-12)


@given(groups, meshes)
def test_better_gpus_never_hurt(group: Group, mesh: MeshConfig) -> None:
    gpu, shape, step = GPUS["h100"], LLAMA_8B.fit_to(mesh), Step((group,))
    before = tick_time(shape, step, mesh, Cluster(gpu, 8)).seconds
    more_flops = {name: 2 * x for name, x in gpu.peak_flops.items()}
    for better in (
        replace(gpu, memory_bandwidth=2 * gpu.memory_bandwidth),
        replace(gpu, peak_flops=more_flops),
        replace(gpu, intra=replace(gpu.intra, bandwidth=2 * gpu.intra.bandwidth)),
    ):
        assert tick_time(shape, step, mesh, Cluster(better, 8)).seconds <= before * (1 + 1e-12)


@given(meshes, st.sampled_from(sorted(GPUS)), st.integers(1, 512), st.integers(1, 8192))
def test_memory_never_exceeds_the_gpu_where_it_fits(mesh: MeshConfig, gpu: str, num_slots: int, num_rows: int) -> None:
    shape = LLAMA_8B.fit_to(mesh)
    memory = memory_per_gpu(shape, mesh, GPUS[gpu], num_slots, num_rows)
    assert memory.kv == 0 or memory.total <= GPUS[gpu].memory_bytes
    held = kv_tokens(shape, mesh, memory, 100) * shape.kv_bytes_per_gpu(mesh, 100) / 100
    assert held <= memory.kv
    assert vocabulary_shards(mesh) == mesh.pp * mesh.tp
