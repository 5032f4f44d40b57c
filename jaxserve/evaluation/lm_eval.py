"""The command ``lm_eval`` of the lm-evaluation-harness, which knows jaxserve as a model, and its offline tasks.

    python -m jaxserve.evaluation.lm_eval --model jaxserve \\
        --model_args pretrained=DIR,tensor_parallel_size=4 --tasks hellaswag,demo_skills

All arguments are the harness's own. Its ``--include_path`` is that of our tasks where none is given.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import jaxserve
from jaxserve.cli.command import USER_ERRORS, one_line
from jaxserve.evaluation.harness import require_harness
from jaxserve.evaluation.tasks import DIRECTORY

NAME, MODEL = "jaxserve", "jaxserve.evaluation.lm_eval_model:JaxserveLM"
PACKAGE = Path(jaxserve.__file__).parent
"""What is raised in here is about what was asked for."""


def main() -> None:
    try:
        require_harness()
    except NotImplementedError as error:
        sys.exit(report(error))
    import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]  # fills the table first
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]

    if NAME not in model_registry:
        model_registry.register(NAME, target=MODEL)  # imported, with jax, when it is asked for
    named = {argument.partition("=")[0] for argument in sys.argv[1:]}
    if named and not named & {"-h", "--help", "--include_path"}:
        sys.argv += ["--include_path", str(DIRECTORY)]
    try:
        cli_evaluate()
    except USER_ERRORS as error:
        if not Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE):
            raise
        sys.exit(report(error))


def report(error: Exception) -> int:
    """One line on stderr for what the user can mend; the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
