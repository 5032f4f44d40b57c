"""One measurement for each of several values of a parameter.

``--sweep max_num_seqs=8,16,32`` sets any option of the command, by the name it has on the command line or in ``LLM``;
several ``--sweep`` make every combination.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from jaxserve.cli.output import progress

TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """A field of one of the command's groups of options."""

    group: str
    field: str
    types: tuple[type, ...]
    option: OptionInfo
    inverted: bool = False
    """``enable_x`` of a field ``no_enable_x``."""

    def value(self, text: str) -> Any:
        """ValueError for what it cannot be."""
        if NoneType in self.types and text == "none":
            return None
        if bool in self.types:
            return TRUTH[text.lower()] != self.inverted
        kind = next(kind for kind in self.types if kind is not NoneType)
        if get_origin(kind) is list:
            return [text]
        value = kind(text)
        if self.option.min is not None and value < self.option.min:
            raise ValueError(f"it is at least {self.option.min}")
        return value


@dataclass(frozen=True)
class Setting:
    """One value of everything that is swept."""

    texts: dict[str, str]
    """As they were given."""
    groups: dict[str, Any]
    """The command's options with these values."""

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={text}" for name, text in self.texts.items())

    @property
    def prefix(self) -> str:
        """Of the names of its figures."""
        return f"{self.name}: " if self.texts else ""


def settings(sweeps: Sequence[str], groups: Mapping[str, Any]) -> list[Setting]:
    """Every combination of the values; the groups as they are where nothing is swept. ``groups``: dataclasses of
    options. ValueError for a name or a value that there is not."""
    known = parameters(groups)
    swept = dict(_parse(text, known) for text in sweeps)
    if len(swept) < len(sweeps):
        raise ValueError("--sweep: each parameter can be swept once")
    combinations = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    return [Setting(texts, _applied(groups, texts, known)) for texts in combinations]


def parameters(groups: Mapping[str, Any]) -> dict[str, Parameter]:
    """By the names that they may have: ``tensor_parallel_size`` and ``tp``, ``no_enable_x`` and ``enable_x``."""
    found: dict[str, Parameter] = {}
    for group, options in groups.items():
        hints = get_type_hints(type(options), include_extras=True)
        for field in fields(options):
            annotation, option = get_args(hints[field.name])[:2]
            parameter = Parameter(group, field.name, get_args(annotation) or (annotation,), option)
            for name in (field.name, *(d.lstrip("-").replace("-", "_") for d in option.param_decls or ())):
                found[name] = parameter
                if name.startswith("no_"):
                    found[name.removeprefix("no_")] = replace(parameter, inverted=True)
    return found


def _parse(text: str, known: Mapping[str, Parameter]) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if name not in known:
        names = sorted({p.field.removeprefix("no_") for p in known.values()})
        raise ValueError(f"--sweep {text}: {name!r} is no parameter; there are {', '.join(names)}")
    parts = [part.strip() for part in values.split(";" if ";" in values else ",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--sweep {text}: it is NAME=VALUE,VALUE,... (or with ; between), each value once")
    return name, parts


def _applied(groups: Mapping[str, Any], texts: Mapping[str, str], known: Mapping[str, Parameter]) -> dict[str, Any]:
    changed = dict(groups)
    for name, text in texts.items():
        parameter = known[name]
        try:
            value = parameter.value(text)
        except (ValueError, KeyError) as error:
            reason = str(error) if "least" in str(error) else f"it is {_kind(parameter)}"
            raise ValueError(f"--sweep {name}={text}: {reason}") from None
        changed[parameter.group] = replace(changed[parameter.group], **{parameter.field: value})
    return changed


def _kind(parameter: Parameter) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "none"}
    return " or ".join(names.get(kind, kind.__name__) for kind in parameter.types)


@dataclass(frozen=True)
class Measured[C]:
    """What was measured of several settings, and what ended that before the last: Ctrl-C, or an error of one of them.
    So an hour's work is not lost with it."""

    settings: Sequence[Setting]
    done: list[C]
    """Of the first of them."""
    stopped: BaseException | None = None

    @property
    def where(self) -> str:
        """In which of several it was stopped."""
        return f"ended in {self.settings[len(self.done)].name}, after {len(self.done)} of {len(self.settings)} settings"


def each[C](cases: Sequence[Setting], measure: Callable[[Setting], C]) -> Measured[C]:
    """One after the other, as far as it goes."""
    done: list[C] = []
    try:
        for case in progress("settings", cases) if len(cases) > 1 else cases:
            done += [measure(case)]
    except (Exception, KeyboardInterrupt) as stopped:
        return Measured(cases, done, stopped)
    return Measured(cases, done)


def prepare[C](cases: Sequence[Setting], make: Callable[[Setting], C]) -> dict[str, C]:
    """Something for each of them, by name; a ValueError says for which it could not be made."""
    made: dict[str, C] = {}
    for case in cases:
        try:
            made[case.name] = make(case)
        except ValueError as error:
            raise ValueError(f"{case.prefix}{error}") from None
    return made
