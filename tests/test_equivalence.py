"""A request gets the same tokens alone, in a crowd, in any chunks, after preemption, on any mesh, by any kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import run, tokens_of

from jaxserve import LLM, RequestOutput, SamplingParams

MakeLLM = Callable[..., LLM]

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "logprobs": 0, "prompt_logprobs": 2},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.01},
    {
        "temperature": 1.0,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "prompt_logprobs": 0,
    },
    {"temperature": 0, "repetition_penalty": 1.5, "logprobs": 3, "prompt_logprobs": 0},
    {"temperature": 0.7, "allowed_token_ids": range(0, 103, 3), "logit_bias": {9: 2.0}, "logprobs": 0},
    {"temperature": 0, "min_tokens": 12, "logit_bias": {102: 100}},
    {"temperature": 1.2, "n": 2, "top_p": 0.7},
]


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """Sixteen requests of every kind, with prompts from one token to many chunks."""
    rng = np.random.default_rng(5)
    lengths = [1, 5, 17, 40, 3, 8, 60, 2, 25, 4, 16, 33, 1, 12, 9, 50]
    prompts = [rng.integers(0, 103, length).tolist() for length in lengths]
    options = [OPTIONS[i % len(OPTIONS)] for i in range(len(lengths))]
    return prompts, [SamplingParams(seed=i, max_tokens=10 + i, **o) for i, o in enumerate(options)]


def answers(llm: LLM) -> list[RequestOutput]:
    """Of the whole workload at once."""
    return run(llm, *workload())


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, odd_model: Path) -> list[RequestOutput]:
    """Each request on its own: what it must get everywhere."""
    llm = make_llm(odd_model)
    return [run(llm, [prompt], params)[0] for prompt, params in zip(*workload(), strict=True)]


def assert_same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    assert tokens_of(outputs) == tokens_of(expected)
    for output, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(logprobs(output), logprobs(other), atol=1e-4)


def logprobs(output: RequestOutput) -> list[float]:
    """All that the output holds, in order."""
    entries = [*(output.prompt_logprobs or ()), *(e for c in output.outputs for e in c.logprobs or ())]
    return [value.logprob for entry in entries if entry for value in entry.values()]


def test_the_workload_is_worth_something(alone: list[RequestOutput]) -> None:
    tokens = tokens_of(alone)
    assert len(set(map(tuple, tokens))) == len(tokens) == 18
    assert np.mean([len(set(t)) for t in tokens]) > 8
    assert any(logprobs(output) for output in alone)
    assert {c.finish_reason for o in alone for c in o.outputs} == {"stop", "length"}


def test_in_a_crowd(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    assert_same(answers(make_llm(odd_model)), alone)


@pytest.mark.parametrize("tokens", [8, 17, 64])
def test_in_chunks_of_any_size(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], tokens: int) -> None:
    llm = make_llm(odd_model, max_num_batched_tokens=tokens, token_buckets=(tokens,))
    assert_same(answers(llm), alone)


def test_in_steps_of_every_shape(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    llm = make_llm(odd_model, max_num_seqs=6, decode_buckets=(1, 2, 6), token_buckets=(8, 32))
    assert_same(answers(llm), alone)


def test_after_preemption(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    llm = make_llm(odd_model, num_gpu_blocks_override=21)
    outputs = answers(llm)
    assert_same(outputs, alone)
    assert llm.get_metrics().num_preemptions > 0
    preempted = [o for o in outputs if o.metrics and o.metrics.num_preemptions]
    assert any(o.outputs[0].logprobs for o in preempted)
    assert any(o.prompt_logprobs and len(o.prompt_logprobs) > 30 for o in preempted)


def test_with_blocks_of_another_size(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    assert_same(answers(make_llm(odd_model, block_size=16, num_gpu_blocks_override=20)), alone)


def test_by_the_reference_kernel(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    llm = make_llm(odd_model, attention_backend="reference")
    assert llm.engine.runner.attention.name == "reference"
    assert make_llm(odd_model).engine.runner.attention.name == "cpu"
    assert_same(answers(llm), alone)


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
def test_on_any_mesh(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], tp: int, dp: int) -> None:
    """103 tokens of vocabulary are padded, and the two KV heads repeated for four ranks; few blocks, so that some
    replica preempts."""
    llm = make_llm(odd_model, tensor_parallel_size=tp, data_parallel_size=dp, num_gpu_blocks_override=21)
    assert dict(llm.engine.runner.mesh.shape) == {"dp": dp, "pp": 1, "cp": 1, "tp": tp}
    assert len(llm.engine.scheduler.replicas) == dp
    assert_same(answers(llm), alone)
    assert llm.get_metrics().num_preemptions > 0
