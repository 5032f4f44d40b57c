"""Shapes of well-known models: their config.json files, without weights. To plan with, and for dummy weights.

Hyper-parameters are those of the files that were published with the base models; of Llama 3.1 405B the paper's 8 KV
heads ("The Llama 3 Herd of Models", table 3), where the first published file had 16.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.parent.name for path in DIRECTORY.glob("*/config.json"))


def find(name: str) -> Path | None:
    """The directory that holds a config.json, by name in any case ("Llama-3.1-70B"); None if there is none."""
    return DIRECTORY / name.lower() if name.lower() in names() else None
