"""What callers hand in: prompts and conversations of every kind, and arguments that are one for all prompts or one
each. No jax here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from numbers import Integral
from typing import Any

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, the last two with "cache_salt" if wished."""

NO_LIST = (str, bytes, bytearray, memoryview, Mapping, Set)
"""What can be iterated over and is no list of token ids, prompts or messages all the same."""
MULTI_MODAL = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids")
"""Keys that prompts have elsewhere: nothing is wrong with them as long as they say nothing."""
MOST_SHOWN = 80
"""Characters of a wrong value that its error shows."""
MESSAGES = 'messages are a list of {"role": ..., "content": ...}, or a list of such lists'
TEXT_PART = '{"type": "text", "text": ...}'


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not _is_list(prompts):
        raise ValueError(f"prompts {shown(prompts)}: text, token ids, a dict with either, or a list of these")
    prompts = list(prompts)
    return [prompts] if prompts and all(isinstance(t, Integral) for t in prompts) else prompts


def read_prompt(prompt: Prompt, tokenizer: Any | None) -> dict[str, Any]:
    """A prompt as ``Engine.add_request`` wants it."""
    if isinstance(prompt, str):
        return _read_text(prompt, tokenizer)
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": _token_ids("prompt", prompt)}
    content = {k: v for k, v in prompt.items() if k != "cache_salt" and not (v is None and k in MULTI_MODAL)}
    unknown = [key for key in content if key not in ("prompt", "prompt_token_ids")]
    if unknown or len(content) != 1:
        raise ValueError(
            f"prompt {shown(dict(prompt))}: it holds either 'prompt' or 'prompt_token_ids', and 'cache_salt' if wished"
            + (f"; {unknown[0]!r} is not supported" if unknown else "")
        )
    salt = prompt.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValueError(f"cache_salt={salt!r}: it is a text that is not empty")
    if "prompt_token_ids" in content:
        return {"prompt_token_ids": _token_ids("prompt_token_ids", content["prompt_token_ids"]), "cache_salt": salt}
    if not isinstance(content["prompt"], str):
        raise ValueError(f"'prompt' {shown(content['prompt'])}: it is a text; token ids are 'prompt_token_ids'")
    return _read_text(content["prompt"], tokenizer) | {"cache_salt": salt}


@contextmanager
def naming(what: str, index: int, count: int) -> Iterator[None]:
    """Lets a ValueError say which of several it is about, like ``prompts[3]``."""
    try:
        yield
    except ValueError as error:
        if count > 1:
            error.args = (f"{what}[{index}]: {error}",)
        raise


def shown(value: Any) -> str:
    """A wrong value, for its error: ``repr``, cut off where it is long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def need_tokenizer(tokenizer: Any | None) -> Any:
    """The transformers tokenizer; ValueError if there is none."""
    if tokenizer is None:
        raise ValueError("this engine has no tokenizer (skip_tokenizer_init=True)")
    return tokenizer


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, NO_LIST)


def _read_text(prompt: str, tokenizer: Any | None) -> dict[str, Any]:
    encode = need_tokenizer(tokenizer).encode
    _check_unicode("prompt", prompt)
    return {"prompt": prompt, "prompt_token_ids": list(encode(prompt))}


def _check_unicode(what: str, text: str) -> None:
    """ValueError for half a surrogate pair, as which Python reads what is no UTF-8: tokenizers have no word for it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{what} {shown(text)}: it is no valid Unicode text: character {error.start + 1} is {half!r}, half of a "
            "pair, as which bytes that are no UTF-8 are read"
        ) from None


def _token_ids(name: str, prompt: Any) -> list[int]:
    """Token ids as plain ints; ValueError for anything that is not a sequence of whole numbers."""
    ids: list[Any] = list(prompt) if _is_list(prompt) else [None]
    if any(isinstance(t, bool) or not isinstance(t, Integral) for t in ids):
        wanted = "text, a list of token ids (whole numbers), or a dict with either"
        wanted = wanted if name == "prompt" else "a list of token ids (whole numbers); text is 'prompt'"
        raise ValueError(f"{name} {shown(prompt)}: {wanted}")
    return [int(t) for t in ids]


# -- conversations -----------------------------------------------------------------------------------------------------


def as_conversations(messages: Any) -> list[Any]:
    """One conversation or many, as a list of conversations."""
    if not _is_list(messages):
        raise ValueError(f"messages {shown(messages)}: {MESSAGES}")
    given = list(messages)
    return [given] if any(isinstance(message, Mapping) for message in given) else given


def read_conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages whose content is text: parts of text, as OpenAI's clients send them, are joined by line ends, as vLLM
    does. ValueError for what is no conversation, and for parts that are no text."""
    read = [_read_message(message) for message in messages] if _is_list(messages) else []
    if not read:
        raise ValueError(f"messages {shown(messages)}: {MESSAGES}")
    return read


def _read_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {shown(message)}: {MESSAGES}")
    content = message.get("content")
    if content is None and "tool_calls" in message:
        return dict(message)
    if not isinstance(content, str):
        content = "\n".join(_text_of(part) for part in _parts(message))
    _check_unicode("content", content)
    return {**message, "content": content}


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        raise ValueError(f"message {shown(message)}: its content is a text, or a list of {TEXT_PART}")
    return content


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in (None, "text"):
        raise ValueError(f"content of type {kind!r} is not supported: parts are {TEXT_PART}")
    if kind is None or set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise ValueError(f"content part {shown(part)}: it is {TEXT_PART}")
    return part["text"]


def check_template_options(
    chat_template: Any = None,
    add_generation_prompt: Any = True,
    continue_final_message: Any = False,
    tools: Any = None,
) -> None:
    """ValueError for an option of a chat template that it can make nothing of."""
    if chat_template is not None and (not isinstance(chat_template, str) or "{" not in chat_template):
        raise ValueError(f"chat_template={shown(chat_template)}: it is the text of a Jinja template, or None")
    flags = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={shown(value)}: it is True or False")
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(t, Mapping) for t in tools)):
        raise ValueError(f"tools={shown(tools)}: it is a list of mappings that describe functions, or None")


# -- arguments beside the prompts --------------------------------------------------------------------------------------


def one_each(name: str, kind: type, given: Any, default: Any, count: int) -> list[Any]:
    """An argument that is one value for all of ``count`` prompts, or one value for each, or None."""
    if given is None or _is_one(given, kind):
        return [default if given is None else given] * count
    if not _is_list(given):
        raise ValueError(f"{name} {shown(given)}: it is of type {kind.__name__}; give one for all, or a list of them")
    values = list(given)
    for i, value in enumerate(values):
        if not _is_one(value, kind):
            raise ValueError(f"{name}[{i}] {shown(value)}: it is of type {kind.__name__}")
    if len(values) != count:
        raise ValueError(f"{len(values)} {name} for {count} prompts: give one for all, or one each")
    return values


def only_one(name: str, kind: type, given: Any, default: Any) -> Any:
    """An argument of a single prompt, or None."""
    if given is not None and not _is_one(given, kind):
        raise ValueError(f"{name} {shown(given)}: it is of type {kind.__name__}")
    return default if given is None else given


def _is_one(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def refuse(**arguments: Any) -> None:
    """NotImplementedError for arguments that are there for the names' sake, unless they are None."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not supported yet; leave it at None")
