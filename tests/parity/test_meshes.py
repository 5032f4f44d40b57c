"""Models that a mesh does not divide give the numbers of Hugging Face transformers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import log_softmax

from jaxserve.build import ModelFiles, load_model
from jaxserve.engine_args import EngineArgs
from jaxserve.layers.attention import dense_causal_attention
from sharding import MeshConfig, ShardingRules, build_mesh

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 2e-4
"""As in test_parity."""

CASES = {
    "llama": (4, 5, 6),  # six query heads of two KV heads
    "olmo2": (3, 4, 5, 6),  # the same, with one norm over all heads
    "qwen2": (3, 4, 5),  # with biases
    "mistral": (4, 5),  # with a window and heads of 24
    "phi3": (5,),  # from fused weights
    "gpt2": (3,),  # four heads, a bias everywhere
    "gpt_neox": (3,),
    "gpt_neox_sequential": (2,),  # three heads
    "opt": (3,),
    "opt_proj": (3,),
    "gemma2": (3, 4),  # soft-caps
    "gemma3_text": (3,),  # norms of heads that add one to their weights
    "qwen3_window": (3,),
    "llama_tied": (3,),
    "llama_headdim80": (2, 3),  # one KV head
    "gemma2_nosoftcap": (3,),  # one KV head, copied and filled up
}


@pytest.mark.parametrize(("case", "tp"), [(case, tp) for case, sizes in CASES.items() for tp in sizes])
def test_same_numbers_as_transformers(case: str, tp: int) -> None:
    expected = np.load(FIXTURES / case / "expected.npz")
    prompts = [expected[f"prompt_{i}"] for i in range(3)]
    logprobs = all_logprobs(FIXTURES / case, tp, prompts)
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(logprobs[i, : len(prompt)], expected[f"logprobs_{i}"], rtol=0, atol=TOLERANCE)


def all_logprobs(directory: Path, tp: int, prompts: list[np.ndarray]) -> np.ndarray:
    """[prompt, position, V], of the whole prompts at once."""
    args = EngineArgs(model=directory, dtype="float32", use_tqdm_on_load=False)
    files = ModelFiles.find(args)
    decoder, mesh = files.decoder.fit_to(tp), build_mesh(MeshConfig(tp=tp))
    assert decoder != files.decoder
    graph, params = load_model(files, args, decoder, mesh, ShardingRules())
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return model.unembed(model(tokens, positions, dense_causal_attention(decoder)))

    return log_softmax(np.asarray(forward(params, tokens)))[..., : decoder.vocab_size]
