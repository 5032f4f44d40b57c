"""How commands write: tables for people, JSON for programs, progress only where somebody watches."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

UNBOUNDED = 240
"""Columns of tables that go to a file or to another program."""
NUMBER = re.compile(r"([-+−±<>≤≥]? ?[\d.,]+( ?[^\s\d]+)?|[-–—]|n/a)?$")
"""A cell with nothing but a number, its unit, or that there is none."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def watched() -> bool:
    """Whether stderr is a terminal, so that a progress bar has a reader."""
    return sys.stderr.isatty()


def progress[T](what: str, items: Sequence[T]) -> Iterable[T]:
    """The items, with a bar while somebody watches."""
    from tqdm import tqdm

    return tqdm(items, desc=what, disable=not watched(), leave=False)


def print_json(value: Any) -> None:
    print(json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False), flush=True)


def jsonable(value: Any) -> Any:
    """Dataclasses as objects, infinite and undefined numbers as null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    power = min(int(math.log(count, 1024)), len(UNITS) - 1) if count >= 1 else 0
    return f"{count:.0f} B" if power == 0 else f"{count / 1024**power:.1f} {UNITS[power]}"


def count_text(count: float) -> str:
    """7_241_732 -> "7.24 M"."""
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    if seconds < 0.001:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _console() -> Any:
    """As wide as the terminal; where nobody reads along, as wide as what is written."""
    from rich.console import Console

    unbounded = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=UNBOUNDED if unbounded else None)


def print_pairs(title: str, pairs: Mapping[str, str]) -> None:
    """A headline, and names beside values."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        grid.add_row(Text("  " + name, style="dim"), Text(value))
    console = _console()
    console.print(Text(title, style="bold"))
    console.print(grid)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of numbers, but for the first one, stand to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    for i, name in enumerate(header):
        numbers = all(NUMBER.match(row[i]) for row in rows)
        table.add_column(name, justify="right" if i and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # no markup in brackets
    _console().print(table)
