"""Pipeline stages: the same tokens on every mesh with stages, and no more idling than the algebra says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_equivalence import assert_same, workload
from tiny_models import LLAMA, run, tokens_of, write_llama

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.batch import Batch, BatchLayout, Features, relaid
from jaxserve.build import ModelFiles, fit
from jaxserve.engine_args import EngineArgs
from jaxserve.models.registry import decoder_config, load_hf_config
from jaxserve.pipeline import Pipeline
from sharding import MeshConfig
from sharding.padding import stage_starts

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, deep_model: Path) -> list[RequestOutput]:
    llm = make_llm(deep_model)
    return [run(llm, [prompt], params)[0] for prompt, params in zip(*workload(), strict=True)]


MESHES = ["pp=2", "pp=3", "pp=2,tp=2", "dp=2,pp=2,tp=2"]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_same_tokens_on_every_mesh(
    make_llm: MakeLLM, deep_model: Path, alone: list[RequestOutput], mesh: str
) -> None:
    """Every sampling parameter, log-probabilities, prompts in chunks; few blocks, so that somebody is preempted."""
    llm = make_llm(deep_model, mesh=mesh, num_gpu_blocks_override=21)
    assert_same(run(llm, *workload()), alone)
    assert llm.get_metrics().num_preemptions > 0


def test_one_tick_after_the_other(make_llm: MakeLLM, deep_model: Path, alone: list[RequestOutput]) -> None:
    llm = make_llm(deep_model, mesh="pp=2", num_gpu_blocks_override=130, async_scheduling=False)
    for _ in range(2):  # the second time with prefixes of the first
        assert_same(run(llm, *workload()), alone)
    assert llm.get_metrics().scheduler.prefix_cache_hits > 100


def pipeline(llm: LLM) -> Pipeline:
    assert llm.engine._pipeline is not None
    return llm.engine._pipeline


@pytest.mark.parametrize("mesh", ["pp=2", "pp=3"])
def test_the_bubble_of_a_lone_prompt(make_llm: MakeLLM, deep_model: Path, mesh: str) -> None:
    """m chunks through p stages: (p - 1) / (m + p - 1) of the stage ticks are idle."""
    llm = make_llm(deep_model, mesh=mesh, num_gpu_blocks_override=21, async_scheduling=False)
    stages, lines = int(mesh[-1]), pipeline(llm)
    llm.reset_prefix_cache()
    before = lines.num_idle_stage_ticks, lines.num_stage_ticks
    run(llm, [[1] * 75], SamplingParams(max_tokens=1, temperature=0))  # three chunks of 32
    idle, ticks = lines.num_idle_stage_ticks - before[0], lines.num_stage_ticks - before[1]
    assert ticks == stages * (3 + stages - 1)
    assert idle / ticks == (stages - 1) / (3 + stages - 1)


@pytest.mark.parametrize(("mesh", "count"), [("pp=2", 4), ("pp=2", 3), ("pp=3", 4), ("pp=3", 3)])
def test_no_stage_idles_while_enough_requests_decode(
    make_llm: MakeLLM, deep_model: Path, mesh: str, count: int
) -> None:
    llm = make_llm(deep_model, mesh=mesh, num_gpu_blocks_override=130)
    lines, params = pipeline(llm), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for i in range(count):
        llm.engine.add_request(str(i), [i + 1] * 4, params)
    for _ in range(12):
        llm.engine.step()
    before = lines.num_idle_stage_ticks
    for _ in range(60):
        llm.engine.step()
    assert lines.num_idle_stage_ticks == before
    for i in range(count):
        llm.engine.abort(str(i))
    while llm.engine._in_flight is not None:
        llm.engine.step()


def test_weights_and_blocks_are_divided(make_llm: MakeLLM, deep_model: Path) -> None:
    """Five layers on two stages take the place of three each; the vocabulary is laid over both axes."""
    options = ({"matmul_backend": "reference"}, {"mesh": "pp=2,tp=2"})  # weights as they are stored
    whole, staged = (make_llm(deep_model, **o).engine.runner for o in options)
    layer = sum(x.nbytes for name, x in whole.named_params.items() if name.startswith("layers.0."))
    outside = sum(x.nbytes for name, x in whole.named_params.items() if not name.startswith("layers."))
    vectors = 2 * 64 * 4  # two norms of a layer
    held = [sum(shard.data.nbytes for shard in x.addressable_shards if shard.device.id == 0) for x in staged.params]
    assert sum(held) == pytest.approx(3 * ((layer - vectors) / 2 + vectors) + outside / 4, rel=0.02)
    per_device = {
        sum(s.data.nbytes for x in staged.params for s in x.addressable_shards if s.device.id == d) for d in range(4)
    }
    assert len(per_device) == 1
    assert staged.state is not None
    assert whole.state is not None
    assert len(staged.state.keys) == 3
    assert staged.state.keys[0].shape[0] == 2 * staged.num_blocks[0]


@pytest.mark.slow
def test_random_weights_do_not_depend_on_the_stages(make_llm: MakeLLM, deep_model: Path) -> None:
    prompt, params = [1, 2, 3], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = [
        tokens_of(run(make_llm(deep_model, load_format="dummy", mesh=mesh), [prompt], params))
        for mesh in ("pp=1", "pp=2,tp=2")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "pp=6"}, ["pipeline_parallel_size=6", "5 layers"]),
        ({"mesh": "pp=2", "num_scheduler_steps": 4}, ["num_scheduler_steps=4", "stages"]),
        ({"mesh": "pp=2", "swap_space": 1.0}, ["swap_space", "stages"]),
    ],
)
def test_what_does_not_go_with_stages(deep_model: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, NotImplementedError)) as error:
        LLM(deep_model, skip_tokenizer_init=True, use_tqdm_on_load=False, max_model_len=64, **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.slow
def test_layers_of_two_kinds_line_up(tmp_path: Path, make_llm: Callable[..., LLM]) -> None:
    """In stages of two and of four, because stages of three would not."""
    write_llama(
        tmp_path,
        num_hidden_layers=6,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    decoder = decoder_config(load_hf_config(tmp_path))
    assert [decoder.staged(3).layer_at(s, 1) for s in range(3)] == [1, 3, 5]
    staged = decoder.staged(2)
    assert [[staged.layer_at(s, i) for i in range(4)] for s in range(2)] == [[0, 1, 2, 3], [4, 5, None, None]]
    with pytest.raises(ValueError, match="sizes that fit: 1, 2, 3"):
        decoder.staged(4)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts = [list(range(20, 50)), [3, 4]]
    one, two = (
        [o.outputs[0].token_ids for o in make_llm(tmp_path, mesh=mesh).generate(prompts, params, use_tqdm=False)]
        for mesh in ("pp=1", "pp=2")
    )
    assert one == two


def no_longer_than_before(starts: tuple[int, ...]) -> bool:
    sizes = [b - a for a, b in itertools.pairwise(starts)]
    return sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 4), st.integers(1, 24), st.integers(1, 8))
def test_stages_are_as_even_as_kinds_allow(period: int, count: int, stages: int) -> None:
    kinds = tuple(i % period for i in range(count))
    possible = (
        [
            (0, *inner, count)
            for inner in itertools.combinations(range(1, count), stages - 1)
            if all(start % period == 0 for start in inner) and no_longer_than_before((0, *inner, count))
        ]
        if stages <= 4 and count >= stages
        else []
    )
    found = stage_starts(kinds, stages)
    if found is not None:
        assert found[0] == 0 and found[-1] == count and len(found) == stages + 1
        assert no_longer_than_before(found)
        assert all(kinds[start:end] == kinds[: end - start] for start, end in itertools.pairwise(found))
    if stages <= 4:
        assert (found is None) == (not possible)
        longest = [max(b - a for a, b in itertools.pairwise(starts)) for starts in possible]
        assert found is None or max(b - a for a, b in itertools.pairwise(found)) <= min(longest)


def test_stages_have_every_layer_once() -> None:
    decoder = ModelFiles.find(EngineArgs(model="demo")).decoder
    for stages in range(1, 5):
        staged = fit(decoder, MeshConfig(pp=stages))
        places = [staged.layer_at(s, i) for s in range(stages) for i in range(staged.layers_per_stage)]
        assert [p for p in places if p is not None] == list(range(staged.num_layers))
    assert LLAMA["num_hidden_layers"] == 2


def test_a_batch_in_another_layout() -> None:
    rng = np.random.default_rng(0)
    small, large = BatchLayout(4, 4, 6, one_token_each=True), BatchLayout(32, 8, 6)
    batch = Batch(small, rng.integers(0, 9, (2, small.num_words)).astype(np.int32), Features(sampling=True))
    batch.array("cu_q_lens")[:] = [0, 1, 2, 3, 3]
    there = relaid(batch, large)
    assert there.layout == large and there.features == batch.features
    assert there.array("cu_q_lens")[0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert (there.array("repetition_penalty")[:, 4:] == 1).all()
    back = relaid(there, small)
    np.testing.assert_array_equal(back.buffer, batch.buffer)
