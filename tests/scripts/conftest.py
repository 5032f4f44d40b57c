"""Scripts run in the tests' own process, on recordings of a tiny model that they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from recorded_runs import TIGHT, Call, Recorded, record

from jaxserve import LLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(scope="session")
def swapping_llm(make_llm: Callable[..., LLM], odd_model: Path) -> LLM:
    return make_llm(odd_model, **TIGHT)


@pytest.fixture(scope="session")
def recorded(swapping_llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """With steps overlapping, and preempted requests recomputed."""
    return record(swapping_llm, tmp_path_factory.mktemp("recorded") / "run.rec", async_scheduling=True)


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
