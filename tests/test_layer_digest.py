"""The first layer that differs is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
from tiny_models import write_llama

from jaxserve import LLM
from jaxserve.layer_digest import first_difference

PROMPT = list(range(1, 30))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("digest"), num_hidden_layers=5)


def test_meshes_agree_layer_by_layer(make_llm: Callable[..., LLM], deep_model: Path) -> None:
    expected = make_llm(deep_model).layer_digests(PROMPT)
    assert [d.layer for d in expected] == [-1, 0, 1, 2, 3, 4, 5]
    assert len({d.rms for d in expected}) == 7
    for mesh in ("tp=2,dp=2", "pp=2,tp=2"):
        assert first_difference(expected, make_llm(deep_model, mesh=mesh).layer_digests(PROMPT)) is None


def test_a_changed_weight_shows_in_its_layer(deep_model: Path) -> None:
    llm = LLM(
        deep_model,
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        max_model_len=64,
        max_num_seqs=4,
        decode_buckets=(4,),
        max_num_batched_tokens=32,
        token_buckets=(32,),
    )
    expected = llm.layer_digests(PROMPT)
    runner = llm.engine.runner
    place = next(i for i, x in enumerate(runner.params) if x is runner.named_params["layers.3.mlp.down"])
    runner.params[place] = runner.params[place] * jnp.float32(1.01)
    found = first_difference(expected, llm.layer_digests(PROMPT))
    assert found is not None and found[0].layer == 3
