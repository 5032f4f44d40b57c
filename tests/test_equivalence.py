"""A request gets the same tokens alone, in a crowd, in any chunks, after preemption, on any mesh, by any kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import PROMPT, Oracle, run, tokens_of, write_llama

from jaxserve import LLM, RequestOutput, SamplingParams
from pallas_kernels import native

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


def test_one_step_after_the_other(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    llm = make_llm(odd_model, async_scheduling=False)
    assert make_llm(odd_model).engine.async_scheduling and not llm.engine.async_scheduling
    assert_same(answers(llm), alone)
    assert llm.get_metrics().num_late_rows == 0


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_with_several_steps_in_one(
    make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], async_scheduling: bool
) -> None:
    llm = make_llm(odd_model, num_scheduler_steps=8, async_scheduling=async_scheduling, num_gpu_blocks_override=200)
    assert_same(answers(llm), alone)
    before = llm.get_metrics().num_steps
    (output,) = run(llm, [PROMPT], SamplingParams(temperature=0, max_tokens=34, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 34
    assert llm.get_metrics().num_steps - before == 1 + 5  # the prompt with its first token, then 8 + 8 + 8 + 8 + 1


@pytest.mark.parametrize("caching", [True, False])
def test_with_prefixes_in_common(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], caching: bool) -> None:
    """The same workload twice: the second time most prompts are found, whole blocks of them."""
    llm = make_llm(odd_model, enable_prefix_caching=caching, num_gpu_blocks_override=200)
    llm.reset_prefix_cache()
    for found in (False, True):
        outputs = answers(llm)
        assert_same(outputs, alone)
        cached = [o.num_cached_tokens for o in outputs if o.prompt_logprobs is None]
        assert (sum(cached) > 100) == (found and caching)
        assert all(n % 4 == 0 and n < len(o.prompt_token_ids) for o in outputs for n in [o.num_cached_tokens])
        assert all(o.num_cached_tokens == 0 for o in outputs if o.prompt_logprobs is not None)


@pytest.mark.parametrize(
    "options", [{}, {"async_scheduling": False}, {"tensor_parallel_size": 2, "data_parallel_size": 2}]
)
def test_swapped_to_host_memory(
    make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], options: dict[str, Any]
) -> None:
    llm = make_llm(
        odd_model,
        num_gpu_blocks_override=21,
        swap_space=0.01,
        preemption_mode="swap",
        enable_prefix_caching=False,
        **options,
    )
    assert_same(answers(llm), alone)
    counters, swapped = llm.get_metrics().scheduler, llm.engine.runner.swapped
    assert counters.num_swapped_out == counters.num_preemptions > 0
    assert counters.num_blocks_moved > 0
    assert swapped is not None and swapped.num_bytes == 0


@pytest.mark.parametrize("policy", ["priority", "fair"])
def test_under_other_policies(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], policy: str) -> None:
    llm = make_llm(odd_model, scheduling_policy=policy, num_gpu_blocks_override=21)
    prompts, params = workload()
    ranks, tenants = [-i % 5 for i in range(len(prompts))], ["ab"[i % 2] for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False, priority=ranks, tenant=tenants)
    assert_same(outputs, alone)
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("kinds", [pytest.param("ss", marks=pytest.mark.slow), "fs"])
def test_layers_with_windows(make_llm: MakeLLM, tmp_path_factory: pytest.TempPathFactory, kinds: str) -> None:
    """Layers that look back on nine tokens hold few blocks, and the tokens are those of a run that lacks none."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9}
    directory = write_llama(tmp_path_factory.mktemp("windows"), layer_types=[names[kind] for kind in kinds], **mistral)
    prompts, _ = workload()
    params = [SamplingParams(temperature=0, max_tokens=10 + i, ignore_eos=True) for i in range(len(prompts))]
    roomy = make_llm(directory, enable_prefix_caching=False, num_gpu_blocks_override=400)
    expected = [run(roomy, [prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    oracle = Oracle(roomy)
    assert tokens_of(expected) == [oracle.greedy(*pair) for pair in zip(prompts, params, strict=True)]
    windows, few = {"ss": ([9], 13), "fs": ([None, 9], 22)}[kinds]
    tight = make_llm(directory, num_gpu_blocks_override=few, swap_space=0.01, preemption_mode="swap")
    assert [g.window for g in tight.engine.scheduler.replicas[0].kv.groups] == windows
    assert_same(run(tight, prompts, params), expected)
    assert tight.get_metrics().scheduler.num_swapped_out > 0
    caches = make_llm(directory, num_gpu_blocks_override=400)
    for prompt, p, answer in zip(prompts, params, expected, strict=True):
        for _ in range(2):
            assert_same(run(caches, [prompt], p), [answer])
    assert caches.get_metrics().scheduler.prefix_cache_hits > 100


def test_with_blocks_of_another_size(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    assert_same(answers(make_llm(odd_model, block_size=16, num_gpu_blocks_override=20)), alone)


@pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))
def test_bfloat16_on_one_cpu(make_llm: MakeLLM, odd_model: Path) -> None:
    """As in float32, since the kernels in C++ add up in an order that depends on nothing but the request: a logit that
    is rounded otherwise moves by a thousandth and more."""
    llm = make_llm(odd_model, dtype="bfloat16")
    assert [k.name for k in llm.engine.runner.kernels[:2]] == ["native", "native"]
    expected = [run(llm, [prompt], params)[0] for prompt, params in zip(*workload(), strict=True)]
    chunked = make_llm(odd_model, dtype="bfloat16", max_num_batched_tokens=17, token_buckets=(17,))
    for outputs in (answers(llm), answers(chunked)):
        assert tokens_of(outputs) == tokens_of(expected)
        for output, other in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(logprobs(output), logprobs(other), atol=1e-5)


def test_logits_of_bfloat16_are_not_rounded_to_it(make_llm: MakeLLM, odd_model: Path) -> None:
    """Whatever multiplies: between tokens that are alike they would be ties."""
    for options in ({}, {"matmul_backend": "reference"}):
        runner = make_llm(odd_model, dtype="bfloat16", **options).engine.runner
        hidden = jax.random.normal(jax.random.key(0), (1, 3, runner.decoder.hidden_size), jnp.bfloat16)
        logits = runner.model().unembed(hidden, runner.kernels.matmul)
        assert logits.dtype == jnp.float32
        assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


def test_by_the_reference_kernel(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput]) -> None:
    llm = make_llm(odd_model, attention_backend="reference")
    assert llm.engine.runner.kernels.attention.name == "reference"
    assert make_llm(odd_model).engine.runner.kernels.attention.name == ("cpu" if native.refusal() else "native")
    assert_same(answers(llm), alone)


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (3, 1), (5, 1), (8, 1)])
def test_on_any_mesh(make_llm: MakeLLM, odd_model: Path, alone: list[RequestOutput], tp: int, dp: int) -> None:
    """103 tokens of vocabulary are padded; the two KV heads are copied for four or eight ranks, filled up with a third
    for three, and both for five; few blocks, so that some replica preempts."""
    llm = make_llm(odd_model, tensor_parallel_size=tp, data_parallel_size=dp, num_gpu_blocks_override=21)
    assert dict(llm.engine.runner.mesh.shape) == {"dp": dp, "pp": 1, "cp": 1, "tp": tp}
    assert len(llm.engine.scheduler.replicas) == dp
    assert_same(answers(llm), alone)
    assert llm.get_metrics().num_preemptions > 0
