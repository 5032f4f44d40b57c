"""The same model in other ways: ``--variant "-tp 2 --dtype float32"`` on top of what the command line says."""

from __future__ import annotations

import shlex

import typer

from jaxserve.cli.command import add_command
from jaxserve.cli.options import EngineFlags


def engine_flags(text: str, base: EngineFlags) -> EngineFlags:
    """Options as on the command line, those of ``base`` where ``text`` does not say. ValueError for any others."""
    found: list[EngineFlags] = []

    def variant(engine: EngineFlags = base) -> None:
        found.append(engine)

    app = typer.Typer(add_completion=False, context_settings={"help_option_names": []})
    add_command(app, variant)
    try:
        app(shlex.split(text), standalone_mode=False)
    except typer.TyperException as error:
        raise ValueError(f"--variant {text!r}: {error.format_message()}") from None
    return found[0]
