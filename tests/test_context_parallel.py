"""Ranks that share a context: each holds every other block of a sequence, and together they give the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_equivalence import assert_same, workload
from tiny_models import run, tokens_of, with_blocks, write_llama

from jaxserve import LLM, RequestOutput, SamplingParams

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, odd_model: Path) -> list[RequestOutput]:
    llm = make_llm(odd_model)
    return [run(llm, [prompt], params)[0] for prompt, params in zip(*workload(), strict=True)]


@pytest.mark.parametrize(("mesh", "blocks"), [("cp=2", 13), ("cp=4", 9), ("cp=2,tp=2", 13), ("cp=2,pp=2", 13)])
def test_the_same_tokens_on_every_mesh(
    make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], mesh: str, blocks: int
) -> None:
    """With so few blocks that somebody is preempted."""
    llm = make_llm(odd_model, mesh=mesh, num_gpu_blocks_override=blocks)
    assert_same(run(llm, *workload()), alone)
    assert llm.get_metrics().num_preemptions > 0


def test_swapped_and_found_again(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    swapping = {"num_gpu_blocks_override": 13, "swap_space": 0.01, "preemption_mode": "swap"}
    llm = make_llm(odd_model, mesh="cp=2", num_scheduler_steps=4, **swapping)
    for _ in range(2):
        assert_same(run(llm, *workload()), alone)
    assert llm.get_metrics().scheduler.num_swapped_out > 0


def test_a_context_longer_than_the_blocks_of_one_device(make_llm: MakeLLM, odd_model: Path) -> None:
    """Nine blocks of four tokens on each of four devices hold a sequence of 120 tokens, which one device refuses."""
    prompt, params = list(range(1, 100)), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with pytest.raises(ValueError, match="has 8"):
        run(with_blocks(make_llm(odd_model), 9), [prompt], params)
    expected = run(make_llm(odd_model), [prompt], params)
    llm = make_llm(odd_model, mesh="cp=4", num_gpu_blocks_override=9)
    assert tokens_of(run(llm, [prompt], params)) == tokens_of(expected)


def test_blocks_are_dealt_out(make_llm: MakeLLM, odd_model: Path) -> None:
    """Each rank's cache holds its own part of a prompt, four tokens of eight, and zeros besides."""
    llm = make_llm(odd_model, mesh="cp=2", num_gpu_blocks_override=40)
    state = llm.engine.runner.state
    assert state is not None
    before = [np.asarray(shard.data) for shard in state.keys[0].addressable_shards]
    run(llm, [list(range(1, 17))], SamplingParams(temperature=0, max_tokens=1))
    state = llm.engine.runner.state
    assert state is not None
    after = [np.asarray(shard.data) for shard in state.keys[0].addressable_shards]
    changed = [(a != b).any(axis=(1, 2, 3)) for a, b in zip(after, before, strict=True)]
    written = [set(np.nonzero(c)[0].tolist()) - {0} for c in changed]
    assert len(written) == 2 and written[0] == written[1] and len(written[0]) == 2
    block = min(written[0])
    assert (after[0][block] != after[1][block]).any()
    assert state.keys[0].dtype == jnp.float32


def test_windows_are_refused(tmp_path: Path) -> None:
    write_llama(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=9)
    with pytest.raises(NotImplementedError, match=r"decode_context_parallel_size=2.*window"):
        LLM(tmp_path, skip_tokenizer_init=True, use_tqdm_on_load=False, max_model_len=64, mesh="cp=2")
