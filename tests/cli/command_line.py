"""What the tests of the command line share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = ["--temperature", "0", "--max-tokens", "4", "--ignore-eos"]


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]
"""(arguments, stdin="") -> Result"""
