"""How good is a model at its tasks, and does another mesh, dtype or KV cache make it worse?

The lm-evaluation-harness asks, a model of its own (``jaxserve.evaluation.lm_eval_model``) answers. Some of the answers
are scored once more without harness and engine, by a plain float32 forward of the same checkpoint. Variants answer the
same cases, and what they lose is told from chance case by case.

    python scripts/evaluate.py --variant "-tp 2" --variant "--dtype float32" --out report
    python scripts/evaluate.py --model path/to/checkpoint -tp 8 --task hellaswag --task json_validity --limit 0
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.evaluation.accuracy_report import Run, fill
from jaxserve.evaluation.command import begin, engine_options, finish
from jaxserve.evaluation.direct import Direct, compare
from jaxserve.evaluation.engines import mesh_of, open_llm, own_files, reserve_devices
from jaxserve.evaluation.flags import ReportFlags
from jaxserve.evaluation.harness import Request, Tasks, require_harness, run_tasks
from jaxserve.evaluation.reference import PlainModel
from jaxserve.evaluation.scorer import Scorer, first_token
from jaxserve.evaluation.tasks import DEMO
from jaxserve.evaluation.variants import engine_flags
from jaxserve.llm import LLM

QUESTION = "How good is this model at its tasks, and does serving it otherwise make it worse?"
BASELINE = "baseline"
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 128, 1024
"""Of a step, where the command line leaves them open."""
NO_ANSWER = ("compilation_cache_dir", "use_tqdm_on_load", "trace", "otlp_traces_endpoint", "record")
"""Options that no answer depends on."""
LOSSY = ("fp8",)
"""KV caches that are meant to lose more than the rounding of the weights' dtype: by how much, the tasks say."""


@epilog(
    "python scripts/evaluate.py",
    "python scripts/evaluate.py --variant '-tp 2' --variant '--dtype float32' --out report",
    "python scripts/evaluate.py -m DIR -tp 8 --task hellaswag --task mmlu --limit 0 --cache answers",
    "python scripts/evaluate.py -m DIR -tp 4 --variant '--kv-cache-dtype fp8' --most-lost 0.01",
)
def evaluate(
    engine: EngineFlags,
    report: ReportFlags,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"Task, group or tag of the harness; repeatable. None: {', '.join(DEMO)}."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Cases of each task, its first ones; 0 = all.")] = 100,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; none = as the task says.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions through the model's chat template.")] = False,
    include_path: Annotated[Path | None, typer.Option(help="A directory with more tasks.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTIONS", help="The same again with these options, like '-tp 2'; repeatable."),
    ] = None,
    most_lost: Annotated[
        float, typer.Option(min=0, help="What a variant may lose: a share of the cases, or bits per byte.")
    ] = 0.0,
    direct: Annotated[int, typer.Option(min=0, help="Requests of each task to score directly too.")] = 3,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep answers here, and do not ask again for those that are.")
    ] = None,
) -> None:
    """Accuracy with standard errors, by the lm-evaluation-harness; the same in other ways, case by case.

    Exit code 1 if answers are not those of direct scoring, or if a variant lost more than --most-lost and chance
    explain.
    """
    require_harness()
    tasks = Tasks(tuple(task or DEMO), limit or None, num_fewshot, include_path, chat)
    ways = {BASELINE: engine} | {text: engine_flags(text, engine) for text in variant or ()}
    options = {name: _options(flags) for name, flags in ways.items()}
    if variant:
        options = {name: own_files(of, name) for name, of in options.items()}
    largest = max((mesh_of(o) for o in options.values()), key=lambda mesh: mesh.num_devices)
    reserve_devices(largest.num_devices)
    asked = {
        "task": " ".join(tasks.names),
        "limit": limit,
        "variants": " | ".join(variant or ()),
        "most_lost": most_lost,
    }
    result = begin("evaluate", QUESTION, options[BASELINE] | asked, engine.seed, largest.sizes)
    manager = tasks.manager()
    runs: list[Run] = []
    plain = None
    for name, flags in ways.items():
        llm = open_llm(options[name]).llm
        outcome = run_tasks(harness_model(llm), tasks, manager, _cache_file(cache, options[name]), flags.seed)
        agreement = None
        if direct and flags.kv_cache_dtype not in LOSSY:
            plain = plain or PlainModel.load(llm.args, 1)
            agreement = compare(_some(outcome.requests, direct), _direct(plain, llm), llm.engine.runner.params[0].dtype)
        runs.append(Run(name, outcome, agreement))
        llm.close()
        del llm
        gc.collect()  # what it held on its devices, before the next one takes its share
    finish(result, fill(result, runs, most_lost), report)


def _options(flags: EngineFlags) -> dict[str, Any]:
    """One program of each kind: there is enough to do for steps to be full."""
    options = engine_options(flags, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
    return options | {
        "decode_buckets": (options["max_num_seqs"],),
        "token_buckets": (options["max_num_batched_tokens"],),
    }


def harness_model(llm: LLM) -> Any:
    from jaxserve.evaluation.lm_eval_model import JaxserveLM

    return JaxserveLM(llm)


def _direct(plain: PlainModel, llm: LLM) -> Direct:
    tokenizer, ends = llm.get_tokenizer(), frozenset(llm.engine.eos_token_ids)
    return Direct(plain, tokenizer, first_token(tokenizer), Scorer(llm).longest, ends)


def _cache_file(directory: Path | None, options: dict[str, Any]) -> Path | None:
    """One for each way of serving: the harness knows answers by what was asked only."""
    if directory is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: str(value) for name, value in sorted(options.items()) if name not in NO_ANSWER})
    return directory / hashlib.sha256(text.encode()).hexdigest()[:16]


def _some(requests: Sequence[Request], count: int) -> list[Request]:
    """The first of each task."""
    by_task: dict[str, list[Request]] = {}
    for request in requests:
        by_task.setdefault(request.task, []).append(request)
    return [request for those in by_task.values() for request in those[:count]]


def main() -> None:
    run_script(evaluate)


if __name__ == "__main__":
    # The harness imports a library that is called like this file.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    main()
