"""Runs of the lm-evaluation-harness, as scores of single cases."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isclose, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.cli.output import watched
from jaxserve.evaluation.accuracy import Scores
from jaxserve.evaluation.tasks import DIRECTORY

if TYPE_CHECKING:
    from jaxserve.evaluation.lm_eval_model import JaxserveLM

BITS = "bits_per_byte"
"""The one metric of text whose cases add up, weighted with their bytes."""
SAME = 1e-9
"""Relative: between the harness's aggregate and the mean of the cases, where that is what it is."""


@dataclass(frozen=True)
class Request:
    """One thing that a task asked of the model, and the answer."""

    task: str
    kind: str
    """The task's: generate_until, loglikelihood, loglikelihood_rolling or multiple_choice."""
    arguments: tuple[Any, ...]
    answer: Any


@dataclass(frozen=True)
class Outcome:
    """Of all tasks."""

    scores: list[Scores] = field(default_factory=list)
    """What is compared, case by case."""
    others: dict[str, float] = field(default_factory=dict)
    """Metrics of which the cases do not add up, by task and name, as the harness has them."""
    requests: list[Request] = field(default_factory=list)
    num_cut: int = 0
    """Contexts that lost their beginning because the model is too short for them."""


@dataclass(frozen=True)
class Tasks:
    """What to ask."""

    names: tuple[str, ...]
    """Tasks, groups or tags that the harness knows, those beside ours among them."""
    limit: int | None = None
    """Cases of each task: its first ones."""
    num_fewshot: int | None = None
    """Examples before each question; None = as the task says."""
    include_path: Path | None = None
    """A directory with more task files."""
    chat: bool = False
    """Whether questions go through the model's chat template."""

    def manager(self) -> Any:
        """The harness's own; ValueError for names that it does not know."""
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        paths = [str(path) for path in (DIRECTORY, self.include_path) if path is not None]
        ours = TaskManager(include_path=paths, include_defaults=False)
        if not self._unknown_to(ours):
            return ours  # reading the thousands of others takes seconds
        manager = TaskManager(include_path=paths)
        for name in self._unknown_to(manager):
            raise ValueError(f"--task {name}: the harness has no such task (lm_eval ls tasks lists them)")
        return manager

    def _unknown_to(self, manager: Any) -> list[str]:
        return [name for name in self.names if not manager.match_tasks([name])]


def require_harness() -> None:
    """NotImplementedError where it is missing."""
    if find_spec("lm_eval") is None:
        raise NotImplementedError("accuracy needs the lm-evaluation-harness: pip install 'jaxserve[eval]'")


def run_tasks(model: JaxserveLM, tasks: Tasks, manager: Any, cache: Path | None, seed: int) -> Outcome:
    """Ask everything, one task after the other. With ``cache`` answers are kept in that file, and those that are there
    are not asked again."""
    from lm_eval.api.model import CachingLM  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

    with quiet():
        loaded = manager.load(list(tasks.names))
        for task in loaded["tasks"].values():
            _set_shots(task, tasks.num_fewshot, seed)
        found = evaluate(
            lm=model if cache is None else CachingLM(model, str(cache)),
            task_dict=loaded,
            limit=tasks.limit,
            bootstrap_iters=0,  # standard errors are those of ``Scores``
            apply_chat_template=tasks.chat,
        )
    outcome = Outcome(num_cut=model.num_cut)
    for task, samples in found["samples"].items():
        _add(outcome, task, samples, found)
    return outcome


def _set_shots(task: Any, wanted: int | None, seed: int) -> None:
    """As the harness's own command does it: a task that says 0 has none, whatever is wanted."""
    given = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=given or 0 if wanted is None or given == 0 else wanted)
    task.set_fewshot_seed(seed=seed)


def _add(outcome: Outcome, task: str, samples: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """Take over what one task found."""
    better, kind = found["higher_is_better"][task], found["configs"][task]["output_type"]
    for filter_name in dict.fromkeys(sample["filter"] for sample in samples):
        cases = sorted((s for s in samples if s["filter"] == filter_name), key=lambda s: s["doc_id"])
        for metric in cases[0]["metrics"]:
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            value = found["results"][task].get(f"{metric},{filter_name}")
            scores = _scores(task, label, metric, bool(better.get(metric, True)), cases)
            if scores is not None and value is not None and isclose(scores.mean, value, rel_tol=SAME, abs_tol=SAME):
                outcome.scores.append(scores)
            elif value is not None:
                outcome.others[f"{task} {label}"] = float(value)
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    outcome.requests.extend(
        Request(task, kind, tuple(arguments), answers[0])
        for sample in sorted(first, key=lambda s: s["doc_id"])
        for arguments, answers in zip(sample["arguments"], sample["resps"], strict=True)
    )


def _scores(task: str, label: str, metric: str, better: bool, cases: Sequence[dict[str, Any]]) -> Scores | None:
    """None where a case has no number of its own."""
    found = [case[metric] for case in cases]
    if metric == BITS:
        values, weights = [-nats / log(2) for nats, _ in found], [count for _, count in found]
    elif all(isinstance(value, int | float | np.number) for value in found):
        values, weights = found, [1] * len(found)
    else:
        return None
    hashes = tuple(case["doc_hash"] for case in cases)
    return Scores(task, label, better, np.asarray(values, np.float64), np.asarray(weights, np.float64), hashes)


@contextmanager
def quiet() -> Iterator[None]:
    """The harness draws bars and logs what it does whether anybody watches or not."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), redirect_stderr(sys.stderr if watched() else io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
