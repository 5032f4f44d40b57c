"""What callers hand in: prompts of every kind, and arguments that are one for all prompts or one each. No jax here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, the last two with "cache_salt" if wished."""


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts {prompts!r}: text, token ids, a dict with either, or a list of these")
    prompts = list(prompts)
    return [prompts] if prompts and all(isinstance(t, Integral) for t in prompts) else prompts


def read_prompt(prompt: Prompt, tokenizer: Any | None) -> dict[str, Any]:
    """A prompt as ``Engine.add_request`` wants it."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "prompt_token_ids": list(need_tokenizer(tokenizer).encode(prompt))}
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": _token_ids(prompt)}
    content = {k: v for k, v in prompt.items() if k != "cache_salt"}
    unknown = sorted(set(content) - {"prompt", "prompt_token_ids"})
    if unknown or len(content) != 1:
        raise ValueError(
            f"prompt {dict(prompt)!r}: it holds either 'prompt' or 'prompt_token_ids', and 'cache_salt' if wished"
            + (f"; {unknown[0]!r} is not supported" if unknown else "")
        )
    salt = prompt.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt={salt!r}: it is a text that is not empty")
    return read_prompt(next(iter(content.values())), tokenizer) | {"cache_salt": salt}


def need_tokenizer(tokenizer: Any | None) -> Any:
    """The transformers tokenizer; ValueError if there is none."""
    if tokenizer is None:
        raise ValueError("this engine has no tokenizer (skip_tokenizer_init=True)")
    return tokenizer


def _token_ids(prompt: Any) -> list[int]:
    """Token ids as plain ints; ValueError for anything that is not a sequence of whole numbers."""
    ids = list(prompt) if isinstance(prompt, Iterable) else [prompt]
    if not isinstance(prompt, Iterable) or any(isinstance(t, bool) or not isinstance(t, Integral) for t in ids):
        raise ValueError(f"prompt {prompt!r}: text, a list of token ids (whole numbers), or a dict with either")
    return [int(t) for t in ids]


def one_each(name: str, kind: type, given: Any, default: Any, count: int) -> list[Any]:
    """An argument that is one value for all of ``count`` prompts, or one value for each, or None."""
    if given is None or isinstance(given, kind):
        values = [default if given is None else given] * count
    else:
        values = list(given) if isinstance(given, Iterable) else [given]
        wrong = next((v for v in values if not isinstance(v, kind)), None)
        if wrong is not None:
            raise ValueError(f"{name} {wrong!r}: it is of type {kind.__name__}; give one for all, or one each")
        if len(values) != count:
            raise ValueError(f"{len(values)} {name} for {count} prompts: give one for all, or one each")
    return values


def only_one(name: str, kind: type, given: Any, default: Any) -> Any:
    """An argument of a single prompt, or None."""
    if given is not None and not isinstance(given, kind):
        raise ValueError(f"{name} {given!r}: it is of type {kind.__name__}")
    return default if given is None else given


def refuse(**arguments: Any) -> None:
    """NotImplementedError for arguments that are there for the names' sake, unless they are None."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not supported yet; leave it at None")
