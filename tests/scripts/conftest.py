"""Scripts run in the tests' own process, on recordings of a tiny model that they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from recorded_runs import TIGHT, Call, Recorded, record

from jaxserve import LLM
from jaxserve.models.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(scope="session")
def swapping_llm(make_llm: Callable[..., LLM], odd_model: Path) -> LLM:
    return make_llm(odd_model, **TIGHT)


@pytest.fixture(scope="session")
def recorded(swapping_llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """With steps overlapping, and preempted requests recomputed."""
    return record(swapping_llm, tmp_path_factory.mktemp("recorded") / "run.rec", async_scheduling=True)


@pytest.fixture
def slow_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline's second stage does more than it should, with the same result."""
    real = Decoder.transform

    def slowed(self: Decoder, x: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        if self.config.num_stages > 1:
            times = jnp.where(jax.lax.axis_index("pp") == 1, 100, 0)
            waste = jax.lax.fori_loop(0, times, lambda _, y: jnp.sin(y), jnp.ones((1 << 16,), x.dtype))
            x = jnp.where(waste[0] > 2, waste[0], x)  # never
        return real(self, x, *arguments, **options)

    monkeypatch.setattr(Decoder, "transform", slowed)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """(script, *arguments) -> exit code, stdout, stderr"""

    def call(script: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        try:
            code = import_module(script).main() or 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        written = capsys.readouterr()
        return code, written.out, written.err

    return call
