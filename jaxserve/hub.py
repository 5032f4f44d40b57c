"""Models on the hub: into its library's own cache, and the weights only once they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of a repository that say what the model and its tokenizer are."""


def is_name(model: str) -> bool:
    """Whether this could be one: owner/name."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def description(name: str, revision: str | None) -> Path:
    """The local directory of a model, at a branch, tag or commit, without its weights.

    Raises FileNotFoundError with one line where the hub has no such model, keeps it from this user, or is out of reach
    with nothing in the cache.
    """
    return _download(name, revision, DESCRIPTION)


def add_weights(name: str, directory: Path, files: Sequence[str]) -> None:
    """Download files of weights, those that are not there yet, to the description in ``directory``."""
    commit = directory.name  # the cache has a directory for each; a branch may have moved on since
    _download(name, commit, files)


def _download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        reason = "its owner must grant access: ask for it on the model's page, then log in (hf auth login)"
    except RepositoryNotFoundError:
        reason = "the hub has none of this name, or it is private and you are not logged in (hf auth login)"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    except LocalEntryNotFoundError as error:
        reason = f"the hub cannot be reached, and it is not in the cache ({_cause(error)})"
    except Exception as error:  # what a broken connection raises is the HTTP library's, which one is the hub library's
        reason = _cause(error)
    raise FileNotFoundError(f"model {name!r}: no such directory, nor could it be downloaded: {reason}")


def _cause(error: BaseException) -> str:
    """The first line of what was the matter in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
