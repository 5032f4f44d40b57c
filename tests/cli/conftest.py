"""Commands run in the tests' own process, on an engine that they share."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TEMPLATE, Result, Run

import jaxserve.evaluation.engines
import jaxserve.llm
from jaxserve import LLM
from jaxserve.commands import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the entry point in this process: (arguments, stdin) -> exit code and what was written."""

    def run(*arguments: str | Path, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["jaxserve", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            main()
        written = capsys.readouterr()
        return Result(int(exit_.value.code or 0), written.out, written.err)

    return run


@pytest.fixture
def made(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Commands get the shared engine; the options that they asked for one with are here."""
    asked: list[dict[str, Any]] = []

    def make(**options: Any) -> LLM:
        asked.append(options)
        return tiny_llm

    monkeypatch.setattr(jaxserve.llm, "LLM", make)
    monkeypatch.setattr(jaxserve.evaluation.engines, "LLM", make)
    return asked


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return path
