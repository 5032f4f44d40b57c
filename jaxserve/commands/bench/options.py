"""The options of ``jaxserve bench``, in groups: what is asked, when, how often, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.options import EngineFlags, Json

if TYPE_CHECKING:
    from jaxserve.build import ModelFiles
    from jaxserve.engine_args import EngineArgs
    from jaxserve.evaluation.datasets import Workload
    from jaxserve.evaluation.serving import Pace

DATASETS = ("random", "sharegpt", "trace", "prefix")
NUM_PROMPTS, INPUT_LEN, OUTPUT_LEN, NUM_PREFIXES, PREFIX_LEN = 64, "128", "64", 8, 64


def _data(*names: str, help: str, metavar: str | None = None, min: int | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, min=min, rich_help_panel="Requests")


@dataclass(frozen=True, kw_only=True)
class DatasetFlags:
    """What is asked."""

    dataset: Annotated[
        str,
        _data(
            *("--dataset", "--dataset-name"),
            metavar="NAME",
            help="random, sharegpt (conversations of a file), trace (requests of a file, with their arrival times) or "
            "prefix (random after common beginnings).",
        ),
    ] = "random"
    dataset_path: Annotated[
        Path | None,
        _data(
            "--dataset-path",
            metavar="FILE",
            help="sharegpt: JSON or JSONL; trace: JSONL, as scripts/simulate_scheduler.py --write-trace writes it.",
        ),
    ] = None
    num_prompts: Annotated[
        int | None, _data("--num-prompts", min=1, help=f"Requests; none = {NUM_PROMPTS}, or all of the file.")
    ] = None
    input_len: Annotated[
        str | None,
        _data(
            *("--input-len", "--random-input-len"),
            metavar="N|A-B",
            help=f"Random prompt tokens, fixed or a range; none = {INPUT_LEN}.",
        ),
    ] = None
    output_len: Annotated[
        str | None,
        _data(
            *("--output-len", "--random-output-len"),
            metavar="N|A-B",
            help=f"Output tokens, fixed or a range; none = {OUTPUT_LEN}, or as the file says. sharegpt: N.",
        ),
    ] = None
    num_prefixes: Annotated[
        int | None, _data("--num-prefixes", min=1, help=f"prefix: different beginnings; none = {NUM_PREFIXES}.")
    ] = None
    prefix_len: Annotated[
        int | None,
        _data("--prefix-len", min=1, help=f"prefix: their tokens, before those of --input-len; none = {PREFIX_LEN}."),
    ] = None

    def check(self) -> None:
        """ValueError for what the dataset does not have."""
        if self.dataset not in DATASETS:
            raise ValueError(f"--dataset {self.dataset}: it is one of {', '.join(DATASETS)}")
        is_file = self.dataset in ("sharegpt", "trace")
        if is_file and self.dataset_path is None:
            raise ValueError(f"--dataset {self.dataset}: --dataset-path FILE says where it is")
        foreign = {
            "--dataset-path": self.dataset_path if not is_file else None,
            "--input-len": self.input_len if is_file else None,
            "--output-len": self.output_len if self.dataset == "trace" else None,
            "--num-prefixes": self.num_prefixes if self.dataset != "prefix" else None,
            "--prefix-len": self.prefix_len if self.dataset != "prefix" else None,
        }
        for name, value in foreign.items():
            if value is not None:
                raise ValueError(f"{name} {value}: --dataset {self.dataset} has no such thing")

    def workload(self, engine: EngineFlags) -> Workload:
        """ValueError, before anything is loaded, for a bad file or for requests that are too long for the engine."""
        from jaxserve.build import ModelFiles
        from jaxserve.engine_args import EngineArgs

        self.check()
        args = EngineArgs.of(**engine.engine_options())
        files = ModelFiles.find(args)
        limit = args.max_model_len or files.decoder.max_position
        made = self._requests(args, files, limit)
        if made.longest > limit:
            raise ValueError(
                f"input and output are up to {made.longest} tokens, the longest sequence is {limit} tokens"
            )
        return made

    def described(self, workload: Workload) -> dict[str, Any]:
        """For reports: what was asked for, also where it was left open."""
        asked: dict[str, Any] = {"dataset": self.dataset, "num_prompts": len(workload.calls)}
        if self.dataset in ("random", "prefix"):
            asked["input_len"] = parse_range("--input-len", self.input_len or INPUT_LEN)
            asked["output_len"] = parse_range("--output-len", self.output_len or OUTPUT_LEN)
        if self.dataset == "prefix":
            asked["num_prefixes"] = self.num_prefixes or NUM_PREFIXES
            asked["prefix_len"] = self.prefix_len or PREFIX_LEN
        if self.dataset_path is not None:
            asked |= {"dataset_path": str(self.dataset_path), "left_out": workload.left_out}
        tokens = {"prompt_tokens": workload.num_prompt_tokens, "output_tokens": workload.num_output_tokens}
        return {"workload": asked, **tokens}

    def _requests(self, args: EngineArgs, files: ModelFiles, limit: int) -> Workload:
        """``limit``: tokens of the longest sequence."""
        from jaxserve.evaluation.datasets import prefix_workload, random_workload, sharegpt_workload, trace_workload
        from jaxserve.tokenizer import load_tokenizer

        vocab_size, seed, path = files.decoder.vocab_size, args.seed, self.dataset_path
        if self.dataset == "trace" and path is not None:
            return trace_workload(path, self.num_prompts, vocab_size, seed)
        if self.dataset == "sharegpt" and path is not None:
            length = None if self.output_len is None else _fixed("--output-len", self.output_len)
            tokenizer = load_tokenizer(args.tokenizer or files.directory)
            return sharegpt_workload(path, self.num_prompts, length, tokenizer, limit, seed)
        count = self.num_prompts or NUM_PROMPTS
        inputs = parse_range("--input-len", self.input_len or INPUT_LEN)
        outputs = parse_range("--output-len", self.output_len or OUTPUT_LEN)
        if self.dataset == "random":
            return random_workload(count, inputs, outputs, vocab_size, seed)
        prefixes = self.num_prefixes or NUM_PREFIXES, self.prefix_len or PREFIX_LEN
        return prefix_workload(count, *prefixes, inputs, outputs, vocab_size, seed)


def _time(*names: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Over time", **more)


@dataclass(frozen=True, kw_only=True)
class PaceFlags:
    """When requests come, and how soon they should be served. Any of it makes them come to ``AsyncLLM``."""

    request_rate: Annotated[
        str | None, _time("--request-rate", metavar="RATE", help="Poisson arrivals per second; inf = all at once.")
    ] = None
    arrivals: Annotated[
        str | None,
        _time("--arrivals", metavar="PROCESS", help="poisson:RATE, uniform:RATE, burst:N@PERIOD (seconds) or all."),
    ] = None
    max_concurrency: Annotated[
        int | None, _time("--max-concurrency", min=1, help="Most requests under way; others wait for a place.")
    ] = None
    goodput: Annotated[
        list[str] | None,
        _time(
            "--goodput",
            metavar="NAME:MS",
            help='Targets: ttft, tpot, e2el, as in "ttft:200 tpot:50"; how many requests meet all of them. '
            "May be repeated.",
        ),
    ] = None
    least_goodput: Annotated[
        float | None,
        _time("--least-goodput", min=0, max=1, help="Share of requests that must meet them, else exit code 1."),
    ] = None

    @property
    def is_given(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def check(self) -> tuple[Pace, dict[str, float]]:
        """Seconds by target; ValueError for what is no pace and no target."""
        from jaxserve.evaluation.serving import Pace, parse_targets

        if self.least_goodput is not None and not self.goodput:
            raise ValueError(f"--least-goodput {self.least_goodput}: --goodput says of what")
        targets = parse_targets(self.goodput) if self.goodput else {}
        return Pace.of(self.request_rate, self.arrivals, self.max_concurrency), targets


@dataclass(frozen=True, kw_only=True)
class RepeatFlags:
    """How often."""

    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Measured runs; the median is shown. None = 3, or 1 where requests come over time."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SingleFlags:
    """The one request of ``latency``."""

    input_len: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 32
    output_len: Annotated[int, typer.Option(min=2, help="Output tokens.")] = 64
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs; the median is shown.")] = 5


@dataclass(frozen=True, kw_only=True)
class StartupFlags:
    """How ``startup`` measures."""

    input_len: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 32
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of a cold and a warm start; the median is shown.")] = 1


@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """What is measured how often, and where results go."""

    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B,...",
            help="Measure with each value of any option here, such as max_num_seqs=8,16; several: all combinations.",
        ),
    ] = None
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also leave result.json, report.html and plots here.")
    ] = None
    as_json: Json = False

    def check(self) -> None:
        """Before hours of work: NotImplementedError or OSError where there could be no report in the end."""
        from jaxserve.evaluation.plots import require_matplotlib

        if self.out is not None:
            require_matplotlib()
            self.out.mkdir(parents=True, exist_ok=True)


def parse_range(name: str, text: str) -> tuple[int, int]:
    """ "128" -> (128, 128), "64-256" -> (64, 256)."""
    low, dash, high = text.partition("-")
    if not low.isdigit() or (dash and not high.isdigit()):
        raise ValueError(f"{name} {text!r}: it is a number of tokens, or a range like 64-256")
    bounds = int(low), int(high or low)
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(f"{name} {text!r}: it begins at 1 or above and does not fall")
    return bounds


def _fixed(name: str, text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ValueError(f"{name} {text!r}: it is a number of tokens here, at least 1")
    return int(text)
