"""The command line. Each command is one module; what they share is in ``command``, ``options`` and ``output``.

Nothing here imports jax or transformers until a command runs: ``--help`` answers at once.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from jaxserve.cli.command import add_command, examples, run
from jaxserve.commands.audit import audit
from jaxserve.commands.bench import latency, startup, throughput
from jaxserve.commands.chat import chat
from jaxserve.commands.convert import convert
from jaxserve.commands.generate import generate
from jaxserve.commands.info import info
from jaxserve.commands.plan import plan
from jaxserve.evaluation.scaling import scaling

app = typer.Typer(
    name="jaxserve",
    help="LLM inference as one SPMD program. [bold]jaxserve COMMAND --help[/bold] shows options and examples.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog=examples('jaxserve generate "Once upon a time"', "jaxserve chat", "jaxserve info -tp 2"),
)
bench = typer.Typer(help="Measure this engine on this machine.", rich_markup_mode="rich")

add_command(app, generate)
add_command(app, chat)
add_command(app, convert)
add_command(app, info)
add_command(app, plan)
add_command(app, audit)
add_command(bench, throughput)
add_command(bench, latency)
add_command(bench, startup)
add_command(bench, scaling)
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"jaxserve {version('jaxserve')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.callback(invoke_without_command=True)
def bench_root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The entry point."""
    run(app)
