"""Options that evaluation scripts and commands share. No jax here, for the sake of --help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from jaxserve.cli.options import Json
from sharding.hardware import GPUS, find_gpu


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Where results go."""

    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="For result.json, report.html and plots; made if missing.")
    ] = Path("report")
    as_json: Json = False


def _known(name: str) -> str:
    """While the command line is read: a wrong name is one line that lists those there are."""
    try:
        return find_gpu(name).name
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class PredictionFlags:
    """For which hardware predicted figures stand beside measured ones."""

    gpu: Annotated[
        str,
        typer.Option("--gpu", metavar="GPU", callback=_known, help=f"Predict for this one, beside: {', '.join(GPUS)}."),
    ] = "h100"


@dataclass(frozen=True)
class Load:
    """Random prompts, all of one length, and answers of one length."""

    requests: int
    """Of strong scaling, in all; of weak scaling, times the factor by which a mesh has more devices."""
    input_len: int
    output_len: int
    repeats: int
    seed: int

    def count(self, factor: int, weak: bool) -> int:
        return self.requests * (factor if weak else 1)


@dataclass(frozen=True)
class Limits:
    """Beyond which checks fail."""

    uneven_stages: float
    """Slowest pipeline stage over the quickest."""
    least_efficiency: float | None
    """Of weak scaling; None = any will do."""


@dataclass(frozen=True, kw_only=True)
class ScalingFlags:
    """Options of a load and its limits."""

    requests: Annotated[
        int, typer.Option(min=1, help="Strong scaling has so many on every mesh, weak scaling times the devices.")
    ] = 8
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16
    repeats: Annotated[int, typer.Option(min=1, help="Of each load on each mesh.")] = 3
    uneven_stages: Annotated[
        float, typer.Option(min=1, help="Slowest pipeline stage over the quickest; more fails.")
    ] = 1.3
    least_efficiency: Annotated[
        float | None, typer.Option(min=0, help="Of weak scaling, on devices that are not simulated; less fails.")
    ] = None

    def load(self, seed: int) -> Load:
        return Load(self.requests, self.input_len, self.output_len, self.repeats, seed)

    def limits(self, simulated: bool) -> Limits:
        """ValueError where speeds of simulated devices are to be judged."""
        if self.least_efficiency is not None and simulated:
            raise ValueError(f"--least-efficiency {self.least_efficiency:g}: simulated devices have none worth judging")
        return Limits(self.uneven_stages, self.least_efficiency)
