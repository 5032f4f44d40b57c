"""The first layer that differs is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tiny_models import SMALL, scale_weight

from jaxserve import LLM
from jaxserve.layer_digest import first_difference
from jaxserve.runner import ModelRunner

PROMPT = list(range(1, 30))


@pytest.fixture
def loaded(deep_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """(**options) -> an engine that has its weights, and none of the programs of its steps: digests have their own."""
    monkeypatch.setattr(ModelRunner, "warm_up", lambda *_, **__: None)
    return partial(LLM, deep_model, skip_tokenizer_init=True, use_tqdm_on_load=False, **SMALL)


def test_meshes_agree_layer_by_layer(loaded: Callable[..., LLM]) -> None:
    expected = loaded().layer_digests(PROMPT)
    assert [d.layer for d in expected] == [-1, 0, 1, 2, 3, 4, 5]
    assert len({d.rms for d in expected}) == 7
    for mesh in ("tp=2,dp=2", "pp=2,tp=2"):
        assert first_difference(expected, loaded(mesh=mesh).layer_digests(PROMPT)) is None


def test_a_changed_weight_shows_in_its_layer(loaded: Callable[..., LLM]) -> None:
    llm = loaded()
    expected = llm.layer_digests(PROMPT)
    scale_weight(llm, "layers.3.mlp.down", 1.01)
    found = first_difference(expected, llm.layer_digests(PROMPT))
    assert found is not None and found[0].layer == 3
