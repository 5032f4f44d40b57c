"""What makes a function a command: groups of options, examples in the help, errors in one line."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import typer

USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError)
"""What the engine raises for input that it cannot use."""
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "orbax")
"""Errors that are raised in here are bugs of ours, and keep their traceback."""
CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


def examples(*lines: str) -> str:
    """An epilog that shows commands, one per line."""
    escaped = [line.replace("[", r"\[") for line in lines]
    return "\n".join(["[bold]Examples[/bold]", *(f"  [dim]$[/dim] {line}" for line in escaped)])


def epilog[F: Callable[..., None]](*lines: str) -> Callable[[F], F]:
    """Give a command the examples of its ``--help``."""

    def mark(function: F) -> F:
        function.__dict__["epilog"] = examples(*lines)
        return function

    return mark


def add_command(app: typer.Typer, function: Callable[..., None]) -> None:
    """Register a command. A parameter that is annotated with a dataclass stands for all of its fields."""
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation  # pyright: ignore[reportArgumentType]
            parameters += _fields_as_parameters(parameter)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def command(context: typer.Context, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        try:
            function(**values)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except USER_ERRORS as error:
            _report(error, context)

    # What typer reads: the expanded signature, of which get_type_hints must agree.
    command.__dict__["__signature__"] = inspect.Signature([CONTEXT, *parameters])
    command.__annotations__ = {p.name: p.annotation for p in (CONTEXT, *parameters)}
    name = function.__name__.replace("_", "-")
    help_text = inspect.getdoc(function)
    app.command(name, help=help_text, epilog=function.__dict__.get("epilog"))(command)


def run(app: typer.Typer) -> NoReturn:
    """Run the command line: one line on stderr and exit code 2 for a wrong one, 130 after Ctrl-C."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        typer.echo(f"error: {error.format_message()}{_typed(error)}{hint}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _typed(error: Exception) -> str:
    """What was typed instead of the value that an option takes: typer's message leaves it out, but its cause, an error
    of pydantic's, has it."""
    wrong = getattr(error.__cause__, "errors", list)()
    return f", got {str(wrong[0]['input'])!r}" if wrong else ""


def run_script(function: Callable[..., None]) -> NoReturn:
    """Run a script's only command."""
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    add_command(app, function)
    run(app)


def _fields_as_parameters(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """One parameter per field; their defaults are those of the group's default."""
    group: Any = parameter.annotation
    defaults = group() if parameter.default is inspect.Parameter.empty else parameter.default
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(f.name, kind, default=getattr(defaults, f.name), annotation=hints[f.name])
        for f in fields(group)
    ]


def _report(error: Exception, context: typer.Context) -> NoReturn:
    """One line and exit code 2 for what the user can mend; bugs and closed pipes go on."""
    if isinstance(error, BrokenPipeError) or _is_bug(error):
        raise error
    if context.find_root().params.get("traceback"):
        traceback.print_exception(error)
    typer.echo(f"error: {one_line(error)}", err=True)
    raise typer.Exit(2) from None


def one_line(error: Exception) -> str:
    """What an error says, in one line; of the operating system's, the file first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_text(file: str | Path | None) -> str:
    """What is in a file, or on stdin (None); ValueError with its name and the line if it is no UTF-8."""
    name = "stdin" if file is None else str(file)
    try:
        return sys.stdin.read() if file is None else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise no_text(f"{name}, line {line}", error) from None


def no_text(where: str, error: UnicodeDecodeError) -> ValueError:
    """The error for bytes that are no UTF-8."""
    return ValueError(f"{where}: no UTF-8 text (byte {error.object[error.start]:#x})")


def _is_bug(error: Exception) -> bool:
    if not isinstance(error, (ValueError, TypeError)) or error.__traceback__ is None:
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return any(part in LIBRARIES for part in Path(raised_in).parts)
