"""Every supported architecture and option gives the numbers of Hugging Face transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.hf_library import transformers_class
from jaxserve.layers.rope import frequencies
from jaxserve.models import hf
from jaxserve.outputs import RequestOutput

FIXTURES = Path(__file__).parent / "fixtures"
FREQUENCIES: list[dict[str, Any]] = json.loads((FIXTURES / "rope_frequencies.json").read_text())
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
TOLERANCE = 2e-4
"""Of log-probabilities; a mistake in a model moves them by a hundred times this."""


def test_there_are_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize(
    "entry", FREQUENCIES, ids=lambda e: f"{e['config']['rope_parameters']['rope_type']}-{e['length']}"
)
def test_same_frequencies_as_transformers(entry: dict[str, Any]) -> None:
    """Positions multiply what they are off by. Computed on the device (a dynamic rope in a long sequence), a power is
    off by a last bit; otherwise only small ones are."""
    config = transformers_class("AutoConfig").for_model("llama", **entry["config"])
    rope = hf.rope(config, hf.head_dim(config))
    length = jnp.full((1, 1), entry["length"], jnp.int32)
    ours = jax.jit(lambda length: frequencies(rope, length))(length)[0, 0]
    on_device = rope.kind == "dynamic" and entry["length"] > rope.original_max_position
    np.testing.assert_allclose(ours, np.float32(entry["frequencies"]), rtol=0, atol=2e-7 if on_device else 4e-9)


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_transformers(case: str) -> None:
    """Three prompts at once: the longest is computed in chunks, beside decoding steps of the others."""
    expected = np.load(FIXTURES / case / "expected.npz")
    llm = LLM(
        FIXTURES / case,
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        token_buckets=(32,),
        decode_buckets=(4,),
        max_model_len=64,
        num_gpu_blocks_override=20,
        use_tqdm_on_load=False,
    )
    params = SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=-1, logprobs=-1)
    outputs = llm.generate([expected[f"prompt_{i}"].tolist() for i in range(3)], params, use_tqdm=False)
    for i, output in enumerate(outputs):
        assert output.outputs[0].token_ids == expected[f"greedy_{i}"].tolist(), f"prompt {i}"
        np.testing.assert_allclose(
            logprobs_after_prompt_tokens(output), expected[f"logprobs_{i}"], rtol=0, atol=TOLERANCE
        )


def logprobs_after_prompt_tokens(output: RequestOutput) -> np.ndarray:
    """[positions, V]: the last row is of the first token that was generated."""
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert output.outputs[0].logprobs is not None
    entries = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    return np.array([[entry[token].logprob for token in range(len(entry))] for entry in entries if entry])
