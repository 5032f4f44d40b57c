"""What a run found, as people and programs read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxserve.cli.output import bytes_text, jsonable, seconds_text
from jaxserve.evaluation.statistics import Groups, statistic

FILE = "result.json"
FORMAT = 1
"""Of ``result.json``: goes up when what is there changes its meaning."""


@dataclass(frozen=True)
class Figure:
    """A number, with the raw values it comes from and how they were measured."""

    name: str
    value: float
    unit: str
    """s, B, tok/s, nats, or "" for counts and shares."""
    how: str
    statistic: str = "mean"
    """Of ``samples``: one of ``statistics.STATISTICS``."""
    samples: Groups = ()
    better: Literal["lower", "higher"] | None = None
    simulated: bool = False
    """Whether it is a speed of devices that share the cores of this machine."""

    @classmethod
    def of(cls, name: str, groups: Groups, of: str, unit: str, how: str, **more: Any) -> Figure:
        """A statistic of ``groups`` of raw values."""
        return cls(name, statistic(of, groups), unit, how, of, groups, **more)

    @property
    def text(self) -> str:
        return value_text(self.value, self.unit)


@dataclass(frozen=True)
class Check:
    """Something that must hold."""

    name: str
    passed: bool
    detail: str
    """What was seen, and what is allowed."""
    figures: tuple[str, ...] = ()
    """Names of the figures that it judges."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    failed: Sequence[int] = ()
    """Rows that a check failed on."""


@dataclass
class Result:
    """Filled while a script runs."""

    script: str
    question: str
    options: dict[str, Any]
    """What was asked for on the command line."""
    seed: int
    mesh: dict[str, int] | None
    environment: dict[str, Any]
    simulated: bool = False
    """Whether several devices are simulated on one CPU: speeds are then no forecast."""
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    """Raw data beside those of the figures."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def failed_figures(self) -> set[str]:
        return {name for check in self.failed for name in check.figures}

    def to_json(self) -> dict[str, Any]:
        return jsonable({"format": FORMAT, "passed": not self.failed} | asdict(self))

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """A ``result.json``, or that of a directory; ValueError for anything else."""
    file = path / FILE if path.is_dir() else path
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{file}: not a result of format {FORMAT}")
    return value


def value_text(value: float, unit: str) -> str:
    if unit == "s":
        return seconds_text(value)
    if unit == "B":
        return bytes_text(value)
    return f"{value:,.4g}" + (f" {unit}" if unit else "")
