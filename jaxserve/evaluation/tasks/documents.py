"""Cases of the tasks beside this file, and the scores that the harness has no metric for.

The functions that make cases are called by the harness with whatever it knows of a run, of which they need only what
the task's ``dataset_kwargs`` name. The first cases are the same however many are asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from jaxserve.evaluation.tasks.skills import Case, draw, held_out_cases

SEED = 20
"""Of the cases: other ones than those that the demo model was scored on after its training."""
NUM_CASES = 500
NUM_SHOTS = 50
"""Cases to show as examples: of those that training may have drawn, so never one that is asked."""
NEAR_MISSES = (1, -1, 10, -10, 100, -100, 2, -2)
"""What a wrong sum may be off by: a digit, or a carry."""
TEXT = Path(__file__).parent / "project_text.jsonl"
"""English and Python of this project, as they once were: frozen, so that figures stay comparable."""


def skill(skill: str, **_: Any) -> dict[str, Any]:
    """Unseen questions of a skill, and shots."""
    return {"test": _dataset(_asked(case) for case in _unseen(skill)), "shots": _dataset(_shots(skill))}


def choice(**_: Any) -> dict[str, Any]:
    """Sums with four answers, of which one is right."""
    rng = random.Random(f"choices {SEED}")
    rows = []
    for case in _unseen("add"):
        right = int(case.answer)
        wrong = rng.sample([str(right + miss) for miss in NEAR_MISSES if right + miss >= 0], 3)
        choices = [case.answer, *wrong]
        rng.shuffle(choices)
        rows.append({"question": case.wordings[0], "choices": choices, "label": choices.index(case.answer)})
    return {"test": _dataset(rows)}


def text(**_: Any) -> dict[str, Any]:
    """Pieces of English and Python, the first of which is longer than 1,024 tokens of most tokenizers."""
    return {"test": _dataset(json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines())}


def score_json(case: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Of an answer that should be the JSON object ``case["answer"]``: whether it is an object, whether it has the
    named fields and no others, whether their values are right too. 1.0 or 0.0."""
    wanted, found = json.loads(case["answer"]), _json_object(answers[0])
    return {
        "valid_json": float(found is not None),
        "named_fields": float(found is not None and set(found) == set(wanted)),
        "right_values": float(found == wanted),
    }


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _unseen(skill: str) -> list[Case]:
    return held_out_cases(skill, NUM_CASES, SEED)


def _shots(skill: str) -> list[dict[str, str]]:
    rng = random.Random(f"shots {SEED} {skill}")
    return [_asked(draw(rng, skill, held_out=False)) for _ in range(NUM_SHOTS)]


def _asked(case: Case) -> dict[str, str]:
    return {"question": case.wordings[0], "answer": case.answer}


def _dataset(rows: Any) -> Any:
    from datasets import Dataset  # pyright: ignore

    return Dataset.from_list(list(rows))
