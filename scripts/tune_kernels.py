"""Find the sizes of tiles that are fastest on this machine's GPU, and write them where the kernels look them up.

Of each kernel and shape class that has no entry yet, the heuristic's sizes and those around them are timed; sizes with
which the kernel does not compile, or gives another result than the heuristic's, are left out. The file is written
after every shape, so that a run that was stopped goes on where it was. ``pallas_kernels/tuning.py`` reads it.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxserve.cli.command import epilog, one_line, run_script
from jaxserve.cli.output import progress, seconds_text

TOLERANCE = 0.02
"""As in ``bench_kernels``."""
WARPS, STAGES, BANDS = (4, 8), (2, 3, 4, 5), (8, 32)


@dataclass(frozen=True)
class Subject:
    """One kernel at one shape class. ``work``: of sizes -> what is timed; ``heuristic``: the sizes without tuning."""

    tunable: Any
    shape: Mapping[str, object]
    heuristic: Any
    around: Mapping[str, Sequence[int]]
    """Of each size that may change, what else it may be."""
    work: Callable[[Any], Any]
    refuses: Callable[[Any], str | None]
    """(platform) -> why the kernel cannot run there."""

    @property
    def name(self) -> str:
        return self.tunable.name(**self.shape)

    def candidates(self) -> Iterator[Any]:
        """All combinations that the kernel takes, the heuristic's first."""
        yield self.heuristic
        for values in itertools.product(*self.around.values()):
            sizes = replace(self.heuristic, **dict(zip(self.around, values, strict=True)))
            if sizes != self.heuristic and self._takes(sizes):
                yield sizes

    def _takes(self, sizes: Any) -> bool:
        try:
            self.tunable.sizes(self.name, asdict(sizes))
        except ValueError:
            return False
        return True


# -- what there is to tune ---------------------------------------------------------------------------------------------


def subjects(only: Sequence[str] = ()) -> list[Subject]:
    """Of the shapes that are measured, each class once."""
    from kernel_cases import AttentionCase, DequantCase, GroupedCase, KvWriteCase, cases

    makers = {AttentionCase: _attention, KvWriteCase: _kv_write, GroupedCase: _grouped, DequantCase: _dequant}
    found: dict[tuple[str, str], Subject] = {}
    for case in cases():
        for subject in makers.get(type(case), lambda case: ())(case):
            found.setdefault((subject.tunable.kernel, subject.name), subject)
    words = [word.lower() for word in only]
    kept = [s for (kernel, name), s in found.items() if not words or any(w in f"{kernel} {name}" for w in words)]
    if not kept:
        raise ValueError(f"--only {' '.join(only)}: no such kernel or shape")
    return kept


def _refusal(case: Any, implementation: str) -> Callable[[Any], str | None]:
    return lambda platform: case.refusals(platform)[implementation]


def _attention(case: Any) -> Iterator[Subject]:
    """Of steps of one kind of work, so that what is timed is what is tuned."""
    from pallas_kernels.paged_attention import mosaic, triton

    if len(case.step.groups) > 1:
        return
    tiling, h, one = triton.Tiling(), case.heads, case.shape.one_token_each
    field = "decode" if one else "many"
    cut = getattr(tiling, field)
    shape = {"tokens": cut.tokens, "head_dim": h.head_dim, "group": h.group}

    def in_triton(tile: Any) -> Any:
        tiled = replace(tiling, **{field: replace(cut, tile=tile)})
        return case.work_of(triton.implementation("candidate", triton.refuses, tiled))

    yield Subject(
        triton.TUNED,
        shape | {"dtype": "bfloat16", "kv_dtype": case.kv_dtype},
        triton.tile_for(h.head_dim, h.group, "bfloat16", cut.tokens),
        {"keys": (32, 64, 128), "num_warps": WARPS, "num_stages": STAGES},
        in_triton,
        _refusal(case, "triton"),
    )
    kind = "decode" if one else "prefill"
    yield Subject(
        mosaic.TUNED,
        {"kind": kind, "head_dim": h.head_dim},
        mosaic.ahead_for(kind, h.head_dim),
        {"keys": (64, 128), "stages": (2, 3, 4)},
        lambda ahead: case.work_of(mosaic.make(mosaic.Config(ahead=ahead))),
        _refusal(case, "mosaic"),
    )


def _kv_write(case: Any) -> Iterator[Subject]:
    from pallas_kernels.kv_write import triton

    h = case.heads
    heuristic = triton.tile_of(case.tokens, h.kv_heads, h.group, h.head_dim)
    yield Subject(
        triton.TUNED,
        {"tokens": case.tokens, "kv_heads": h.kv_heads, "group": h.group, "head_dim": h.head_dim},
        heuristic,
        {"tokens": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8)},
        lambda tile: case.work_of(partial(triton.write, tile=tile)),
        _refusal(case, "triton"),
    )


def _grouped(case: Any) -> Iterator[Subject]:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import mosaic, triton

    itemsize = jnp.dtype(case.weight_dtype).itemsize
    sizes = {"depth": case.depth, "columns": case.columns}
    rows = triton.tile_rows(case.num_rows, case.num_experts)

    def of(module: Any) -> Callable[[Any], Any]:
        def work(tiles: Any) -> Any:
            implementation = module.implementation("candidate", module.refuses, tiles)
            return case.work_of(implementation.plan, implementation.product)

        return work

    yield Subject(
        triton.TUNED,
        {"rows": rows, **sizes, "itemsize": itemsize},
        triton.tiles_for(rows, case.depth, case.columns, itemsize),
        {"columns": (64, 128, 256), "depth": (32, 64, 128), "num_warps": WARPS, "num_stages": (3, 4), "band": BANDS},
        of(triton),
        _refusal(case, "triton"),
    )
    rows = mosaic.tile_rows(case.num_rows, case.num_experts)
    yield Subject(
        mosaic.TUNED,
        {"rows": rows, **sizes},
        mosaic.tiles_for(rows, case.columns),
        {"columns": (64, 128, 256), "num_stages": STAGES, "band": BANDS},
        of(mosaic),
        _refusal(case, "mosaic"),
    )


def _dequant(case: Any) -> Iterator[Subject]:
    from pallas_kernels.dequant_matmul import triton

    yield Subject(
        triton.TUNED,
        {"rows": case.rows, "depth": case.depth, "columns": case.columns, "group": case.group or 0},
        triton.tiles_for(case.rows, case.depth, case.columns, case.group),
        {"columns": (64, 128), "depth": (64, 128, 256), "num_warps": WARPS, "num_stages": (3, 4)},
        lambda tiles: case.work_of(partial(triton.product, tiles=tiles)),
        _refusal(case, "triton"),
    )


# -- measuring ---------------------------------------------------------------------------------------------------------


def tune(subject: Subject) -> dict[str, Any]:
    """The entry of a file: of all candidates that are right, the fastest."""
    import jax
    from gpu_timing import relative_error, time_work

    heuristic = subject.work(subject.heuristic)
    expected = heuristic.result()
    own = best = time_work(heuristic).seconds
    sizes, failed = subject.heuristic, 0
    for candidate in progress(subject.name, list(subject.candidates())[1:]):
        try:
            work = subject.work(candidate)
            if relative_error(work.result(), expected) > TOLERANCE:
                failed += 1
                continue
            seconds = time_work(work).seconds
        except Exception as error:  # does not compile, or does not fit
            failed += 1
            print(f"  left out {asdict(candidate)}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
            continue
        if seconds < best:
            sizes, best = candidate, seconds
    print(f"  {seconds_text(own)} -> {seconds_text(best)} with {asdict(sizes)}; {failed} candidates left out")
    return {"sizes": asdict(sizes), "seconds": best, "heuristic_seconds": own, "jax": jax.__version__}


def tune_all(chosen: Sequence[Subject], path: Path, again: bool, measure: Callable[[Subject], dict[str, Any]]) -> None:
    """Those that the file does not have yet, or all of them ``again``; the file grows with each."""
    from pallas_kernels.tuning import load

    # A copy: what was loaded belongs to the kernels.
    entries = {kernel: dict(found) for kernel, found in (load(path).items() if path.exists() else ())}
    for subject in chosen:
        of_kernel = entries.setdefault(subject.tunable.kernel, {})
        print(f"{subject.tunable.kernel}: {subject.name}")
        if subject.name in of_kernel and not again:
            print("  there already")
            continue
        of_kernel[subject.name] = measure(subject)
        write(path, entries)


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Whole or not at all: a run may be stopped at any time."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(entries, indent=1) + "\n")
    unfinished.replace(path)


@epilog(
    "python scripts/tune_kernels.py",
    "python scripts/tune_kernels.py --only grouped_matmul --again",
    "python scripts/tune_kernels.py --dry-run",
)
def tune_kernels(
    *,
    only: Annotated[list[str] | None, typer.Option(help="Kernels or shapes with this word; can be repeated.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what the file has already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates and measure nothing.")] = False,
    directory: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the files. [the kernels' own]")] = None,
) -> None:
    """Time candidates for the sizes of the kernels' tiles on this machine's GPU, and write the fastest to the GPU's
    file. A run that was stopped goes on where it was."""
    from gpu_timing import capability_of, the_device
    from kernel_cases import Platform

    from pallas_kernels.tuning import DIRECTORY, gpu_name

    chosen = subjects(only or [])
    if dry_run:
        _list(chosen)
        return
    device = the_device(small=False)
    platform = Platform("gpu", capability_of(device))
    able = [subject for subject in chosen if subject.refuses(platform) is None]
    path = (directory or DIRECTORY) / f"{gpu_name(device.device_kind)}.json"
    tune_all(able, path, again, tune)
    print(f"{path}: the kernels read it when they are imported the next time")


def _list(chosen: Sequence[Subject]) -> None:
    total = 0
    for subject in chosen:
        candidates = list(subject.candidates())
        total += len(candidates)
        print(f"{subject.tunable.kernel}: {subject.name}: {len(candidates)} candidates")
        for sizes in candidates:
            print("  " + " ".join(f"{name}={value}" for name, value in asdict(sizes).items()))
    print(f"{total} candidates of {len(chosen)} shapes")


def main() -> None:
    run_script(tune_kernels)


if __name__ == "__main__":
    main()
