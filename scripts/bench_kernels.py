"""Every kernel at the shapes that count, as a share of what the GPU's memory and tensor cores do in the same run.

Of every op and shape, all implementations that the GPU can run, and for attention over sequences of one length also
cuDNN (through jax) and PyTorch, on the same tensors without pages. A result is held against the reference first: of a
wrong one the error is reported, and no time. ``docs/kernels.md`` says how to read the table; ``scripts/gpu_timing.py``
how times are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.command import epilog, one_line, run_script
from jaxserve.cli.output import bytes_text, jsonable, progress, seconds_text

if TYPE_CHECKING:
    from gpu_timing import Limits, Timing, Work
    from kernel_cases import Case, Platform

TOLERANCE = 0.02
"""Of a result, by the norm, relative to the reference: bfloat16 has 8 bits."""


@dataclass(frozen=True)
class Result:
    """One implementation at one shape. ``reason``: why there is no time. Shares of the limits are None where no limits
    were measured."""

    op: str
    case: str
    implementation: str
    num_bytes: float
    num_flops: float
    goal_of: str
    goal: float | None
    error: float | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    of_bandwidth: float | None = None
    of_flops: float | None = None
    reason: str | None = None

    @property
    def share(self) -> float | None:
        """Of the limit that the goal is of."""
        return self.of_bandwidth if self.goal_of == "bandwidth" else self.of_flops


@dataclass(frozen=True)
class Report:
    """Of one run; limits in bytes and FLOP per second, None where they were not measured."""

    device: str
    jax: str
    bandwidth: float | None
    flops: float | None
    results: Sequence[Result]


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """How everything is measured: in ``--small``, once, and without limits."""

    platform: Platform
    limits: Limits | None
    small: bool

    def case(self, case: Case) -> Iterable[Result]:
        """Of all implementations, those that cannot run included."""
        import kernel_rivals

        refusals = case.refusals(self.platform)
        runs = {name: (lambda name=name: self.own(case, name)) for name, reason in refusals.items() if reason is None}
        for name, reason in refusals.items():
            if reason is not None:
                yield self.result(case, name, reason=reason)
        expected = _attempt(case.expected)
        if isinstance(expected, str):
            yield from (self.result(case, name, reason=f"nothing to hold it against: {expected}") for name in runs)
            return
        for name, run in runs.items():
            yield self.checked(case, name, run, expected)
        for name, rival in ({} if self.small else kernel_rivals.of(case)).items():
            yield self.checked(case, name, rival, expected)

    def own(self, case: Case, name: str) -> tuple[Any, Any]:
        work = case.work(name)
        return work.result(), lambda: self.timed(work, slow=name.endswith("reference"))

    def timed(self, work: Work, slow: bool) -> Timing:
        from gpu_timing import time_work

        if self.small:
            return time_work(work, calls=1, repeats=1, repeat_seconds=0.0)
        return time_work(work, calls=1 if slow else 8)

    def checked(self, case: Case, name: str, run: Any, expected: Any) -> Result:
        """``run`` () -> a result, and what times it."""
        from gpu_timing import relative_error

        found = _attempt(run)
        if isinstance(found, str):
            return self.result(case, name, reason=found)
        value, time_it = found
        error = relative_error(value, expected)
        if error > TOLERANCE:
            return self.result(case, name, error=error, reason=f"wrong: off by {error:.2g}")
        del value, found
        timing = _attempt(time_it)
        if isinstance(timing, str):
            return self.result(case, name, error=error, reason=timing)
        times = {"seconds": timing.seconds, "fastest": timing.fastest, "slowest": timing.slowest}
        return self.result(case, name, error=error, **times)

    def result(self, case: Case, name: str, **found: Any) -> Result:
        shares = {}
        if self.limits is not None and found.get("seconds"):
            shares["of_bandwidth"] = case.num_bytes / found["seconds"] / self.limits.bandwidth
            shares["of_flops"] = case.num_flops / found["seconds"] / self.limits.flops
        cost = case.num_bytes, case.num_flops
        return Result(case.op, case.name, name, *cost, case.goal.bound, case.goal.share, **found, **shares)


def _attempt(action: Any) -> Any:
    """What it returns, or in one line why it failed: a kernel that does not compile, or arrays that do not fit, are
    findings, and the others are still to be measured."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def measure(small: bool, only: Sequence[str]) -> Report:
    import jax
    from gpu_timing import capability_of, measure_limits, the_device
    from kernel_cases import Platform, cases, small_cases

    chosen = select(small_cases() if small else cases(), only)
    device = the_device(small)
    on_gpu = device.platform == "gpu"
    limits = measure_limits() if on_gpu and not small else None
    bench = Bench(Platform("gpu" if on_gpu else "cpu", capability_of(device)), limits, small)
    results = [result for case in progress("measuring", chosen) for result in bench.case(case)]
    known = (None, None) if limits is None else (limits.bandwidth, limits.flops)
    return Report(device.device_kind, jax.__version__, *known, results)


def select(known: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """Cases of which op or name contain any of these words; all if there are none."""
    words = [word.lower() for word in only]
    found = [case for case in known if not words or any(word in f"{case.op}: {case.name}".lower() for word in words)]
    if not found:
        raise ValueError(
            f"--only {' '.join(only)}: no such op or shape; there are {', '.join({c.op: 0 for c in known})}"
        )
    return found


# -- output ------------------------------------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    print(f"{report.device}, jax {report.jax}")
    if report.bandwidth is not None and report.flops is not None:
        print(f"copy {report.bandwidth / 1e12:.2f} TB/s, bfloat16 product {report.flops / 1e12:.0f} TFLOP/s: 100 %")
    for op in dict.fromkeys(result.op for result in report.results):
        rows = [_cells(result) for result in report.results if result.op == op and _is_worth_a_row(result)]
        print_rows([op, "by", "time", "bytes", "GFLOP", "% copy", "% product", "goal", "error"], rows)
    if refused := sorted({(r.op, r.implementation, r.reason) for r in report.results if not _is_worth_a_row(r)}):
        print("not here:")
        for op, name, reason in refused:
            print(f"  {op}, {name}: {reason}")


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they have to be, also where the output is no terminal."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    print()
    for i, row in enumerate(table):
        cells = (cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True)))
        print("  " + "  ".join(cells).rstrip())
        if i == 0:
            print("  " + "─" * (sum(widths) + 2 * len(widths) - 2))


def _is_worth_a_row(result: Result) -> bool:
    """Not what was refused before it ran."""
    return result.seconds is not None or result.error is not None


def _cells(result: Result) -> list[str]:
    time = seconds_text(result.seconds) if result.seconds is not None else str(result.reason)
    goal = "" if result.goal is None else f"{result.goal:.0%} of {_limit(result.goal_of)}"
    shares = [_percent(share) for share in (result.of_bandwidth, result.of_flops)]
    error = "" if result.error is None else f"{result.error:.1e}"
    cost = bytes_text(result.num_bytes), f"{result.num_flops / 1e9:,.1f}"
    return [result.case, result.implementation, time, *cost, *shares, goal, error]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _limit(bound: str) -> str:
    return "copy" if bound == "bandwidth" else "product"


@epilog(
    "python scripts/bench_kernels.py",
    "python scripts/bench_kernels.py --only decode --only 'KV write' --json kernels.json --plot kernels.png",
    "python scripts/bench_kernels.py --small",
)
def bench_kernels(
    *,
    only: Annotated[list[str] | None, typer.Option(help="Ops or shapes with this word; can be repeated.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes, on a CPU too: does it run at all?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw shares of the limits.")] = None,
) -> None:
    """Time every kernel on this machine's GPU, as a share of a large copy and a large product timed in the same run.
    Wrong results are reported and not timed."""
    if plot is not None:
        _need_matplotlib()
    for path in (json_file, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: {path.parent} is no directory")
    report = measure(small, only or [])
    if json_file is not None:
        json_file.write_text(json.dumps(jsonable(asdict(report)), indent=1, ensure_ascii=False) + "\n")
    if plot is not None:
        from kernel_plot import draw

        draw(report.results, plot, f"{report.device}, jax {report.jax}")
    print_report(report)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'jaxserve[plots]'") from None


def main() -> None:
    run_script(bench_kernels)


if __name__ == "__main__":
    main()
