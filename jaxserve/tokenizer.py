"""Text in, token ids out, and back again while the tokens are still arriving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.hf_library import transformers_class

if TYPE_CHECKING:  # importing transformers takes seconds; only load_tokenizer needs it at run time
    from transformers import PreTrainedTokenizerFast as Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders show for bytes that are not (yet) a UTF-8 character."""

_REPLACEMENT_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in REPLACEMENT.encode()]
"""The same character, if it is meant, as the byte tokens of sentencepiece vocabularies."""

_CONTINUATION_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(0x80, 0xC0))
"""The byte tokens that never begin a character."""

_UTF8_BYTES = 4
"""A character has at most so many bytes, hence tokens: bytes broken for longer will never be whole."""

_PROMPT_WINDOW = 8
"""Prompt tokens kept as left context of the first output token."""

_LONGEST_WINDOW = 64
"""Tokens decoded per step at most; only text that stays broken for that long reaches it."""


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The fast tokenizer of a local checkpoint folder or of a hub model.

    Raises ``ValueError`` with one line that names ``path_or_name`` when there is none, or only a slow one.
    """
    name = str(path_or_name)
    if _looks_like_path(name) and not Path(name).exists():
        raise ValueError(f"no tokenizer at {name!r}: no such file or folder")
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in TOKENIZER_FILES):
        raise ValueError(
            f"no tokenizer in {name!r} (none of {', '.join(TOKENIZER_FILES)}): name another one with tokenizer=..., "
            "or pass skip_tokenizer_init=True and give prompts as token ids"
        )
    try:
        tokenizer = transformers_class("AutoTokenizer").from_pretrained(name)
    except Exception as error:  # what it raises depends on the hub, the file format, the tokenizer's own code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from {name!r}: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise ValueError(f"the tokenizer of {name!r} is a {kind}; it must be a fast tokenizer")
    return tokenizer


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


class IncrementalDetokenizer:
    """Turns output tokens into text as they come; the pieces, joined, are what continues the prompt's text.

    Only a short window of tokens is decoded per step: the tokens that completed the latest piece, for the
    context that decoders look at (a leading space, a run of byte tokens), and the ones since. Text is given
    out once no later token can change it: an unfinished UTF-8 character, which decodes to U+FFFD, waits for
    its other bytes.

    Why not ``tokenizers.decoders.DecodeStream``: it cannot be flushed, and once a byte token turns out not to
    continue the character that an earlier one began, it raises at every further step.

    When the output itself is broken UTF-8 (a model may sample anything), byte-level decoders still give
    exactly the text of decoding all at once. Byte-fallback decoders turn a whole run of byte tokens into
    U+FFFD if any part of it is wrong; here the characters before the wrong part have already been given out,
    and stay.

    Spaces are as the decoder puts them: ``clean_up_tokenization_spaces``, which needs the whole text, is not
    applied. ``spaces_between_special_tokens=False`` takes away those it puts between adjacent added tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._unspaced: dict[int, str] = {}
        if not skip_special_tokens and not spaces_between_special_tokens:
            added = self._backend.get_added_tokens_decoder()
            self._unspaced = {token_id: token.content for token_id, token in added.items()}

        self._window: list[int] = []  # what is decoded each step
        self._text = ""  # decode(window)
        self._shown = ""  # the beginning of it that has been given out
        self._settled = 0  # how many leading tokens of the window decode to whole characters ...
        self._settled_chars = 0  # ... and to how many of them
        self._start_after(prompt_token_ids)

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these further tokens make certain; the same in total however tokens are grouped."""
        return "".join([self._advance(token_id) for token_id in token_ids if self._is_visible(token_id)])

    def finish(self) -> str:
        """The text held back until now, given that no more tokens will come."""
        if not self._text.startswith(self._shown):
            self._drop_settled()
        rest = self._text[len(self._shown) :]
        self._shown = self._text
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _is_visible(self, token_id: int) -> bool:
        """Whether decoding shows the token at all; others would only push the context out of the window."""
        if self._backend.id_to_token(token_id) is None:  # padding of the model's vocabulary
            return False
        if not self._skip_special_tokens or self._decode([token_id]):
            return True
        return not self._backend.decode([token_id], skip_special_tokens=False)

    def _start_after(self, prompt_token_ids: Sequence[int]) -> None:
        context: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self._is_visible(token_id):
                continue
            context.insert(0, token_id)
            # A window that begins inside a character would make the byte tokens after it look broken.
            inside = self._backend.id_to_token(token_id) in _CONTINUATION_BYTE_TOKENS
            if len(context) >= _PROMPT_WINDOW + inside * _UTF8_BYTES:
                break
        for token_id in context:
            self._advance(token_id)
        self._shown = self._text  # it is the prompt's text, all of it

    def _advance(self, token_id: int) -> str:
        if token_id in self._unspaced and self._window and self._window[-1] in self._unspaced:
            return self._advance_unspaced(token_id)
        self._window.append(token_id)
        self._text = self._decode(self._window)
        if not self._text.startswith(self._shown):
            # A byte-fallback decoder took back what was shown, because the bytes after it are not whole yet.
            if self._may_be_whole_later() and self._text.endswith(REPLACEMENT):
                return ""
            self._drop_settled()
        certain = self._certain_text()
        delta = certain[len(self._shown) :]
        self._shown += delta
        if len(certain) == len(self._text):
            self._settle()
        elif len(self._window) > _LONGEST_WINDOW:
            self._halve_window()
        return delta

    def _certain_text(self) -> str:
        if not self._text.endswith(REPLACEMENT) or self._ends_in_real_replacement():
            return self._text
        if self._may_be_whole_later():
            return self._text.rstrip(REPLACEMENT)
        # Of bytes broken for good only the last may still be part of a character: as its first byte.
        return self._text.removesuffix(REPLACEMENT)

    def _may_be_whole_later(self) -> bool:
        return len(self._window) - self._settled <= _UTF8_BYTES

    def _ends_in_real_replacement(self) -> bool:
        """Whether the text ends in U+FFFD because a sentencepiece model means it: as a token, or as bytes.

        Taking it for a broken byte would make the byte tokens after it look broken too.
        """
        names = [self._backend.id_to_token(token_id) or "" for token_id in self._window[self._settled :]]
        return names[-1].endswith(REPLACEMENT) or names == _REPLACEMENT_BYTE_TOKENS

    def _advance_unspaced(self, token_id: int) -> str:
        delta = self.finish() + self._unspaced[token_id]
        self._window.append(token_id)
        self._settle()
        return delta

    def _settle(self) -> None:
        """All of the window is whole and shown: keep its newest tokens as the context of the next ones."""
        start = min(self._settled, len(self._window) - 1)
        text = self._decode(self._window[start:])
        while not text and start > max(0, len(self._window) - _PROMPT_WINDOW):
            start -= 1  # a space that the decoder strips is no context: it would strip the next one, too
            text = self._decode(self._window[start:])
        self._window = self._window[start:]
        self._text = self._shown = text
        self._settled = len(self._window)
        self._settled_chars = len(text)

    def _drop_settled(self) -> None:
        """Decode the newest tokens on their own from now on: together with the older ones they are broken."""
        shown = self._shown[self._settled_chars :]
        self._window = self._window[self._settled :]
        self._text = self._decode(self._window)
        self._shown = commonprefix([shown, self._text])  # noqa: RUF071 - characters are what is meant
        self._settled = self._settled_chars = 0

    def _halve_window(self) -> None:
        """Forget tokens that cannot matter any more, so that endlessly broken output stays cheap."""
        held = self._text[len(self._shown) :]
        self._window = self._window[-_LONGEST_WINDOW // 2 :]
        self._text = self._decode(self._window)
        self._shown = self._text.removesuffix(held)
        self._settled = self._settled_chars = 0


class StopStringMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may become one.

    The match is the one a reader would see first: the stop string that is complete first, and of those
    complete at the same character the one that begins first. So it depends neither on how the text was cut
    into pieces nor on text that would have come later.
    """

    def __init__(self, stop: Sequence[str], include_in_output: bool = False) -> None:
        if not all(stop):
            raise ValueError(f"stop is {list(stop)!r}; stop strings must not be empty")
        self._stop = tuple(stop)
        self._include_in_output = include_in_output
        self._longest_hold = max(map(len, self._stop), default=1) - 1
        self._held = ""
        self._too_early = 0  # so much of the held text, from its beginning, no match may end in
        self._matched: str | None = None

    def feed(self, delta: str) -> tuple[str, str | None]:
        """(text now free to be shown, the stop string found or None).

        On a match the text ends before the stop string, or after it if that is to be included; what follows
        is dropped, and so is everything fed later.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + delta
        found = self._find(text)
        if found is not None:
            start, self._matched = found
            self._held = ""
            return text[: start + len(self._matched) * self._include_in_output], self._matched
        return self._released(text), None

    def feed_early(self, delta: str) -> str:
        """Text that ends nothing yet, though what begins in it may be complete later; what is free to be shown."""
        text = self._held + delta
        self._too_early = len(text)
        return self._released(text)

    def _released(self, text: str) -> str:
        certain = len(text) - self._unfinished_length(text)
        self._held, self._too_early = text[certain:], max(0, self._too_early - certain)
        return text[:certain]

    def flush(self) -> str:
        """The text held back until now, given that no more will come."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(stop, max(0, self._too_early + 1 - len(stop))), stop) for stop in self._stop]
        matches = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        return min(matches)[1:] if matches else None

    def _unfinished_length(self, text: str) -> int:
        """Length of the longest end of ``text`` that is the beginning of a stop string."""
        for length in range(min(self._longest_hold, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0


def bad_word_token_sequences(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The token sequences to forbid so that ``words`` do not appear, each once, in the order of ``words``.

    A word may have two: as it is written at the start of a text, and after a space.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    sequences.pop((), None)
    return list(sequences)


def apply_chat_template(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """The token ids of a conversation, written out by ``chat_template`` (default: the tokenizer's own).

    ``messages`` are dicts with ``role`` and ``content``. ``add_generation_prompt`` opens an assistant message
    for the model to fill; ``continue_final_message`` leaves the last message open instead, and excludes it.
    Raises ``ValueError`` when there is no template, or when it does not accept the messages.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; pass chat_template, or a plain prompt instead")
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message=True needs add_generation_prompt=False")
    _check_messages(messages)
    from jinja2 import TemplateError

    try:
        token_ids: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            return_dict=False,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template does not accept these messages: {error}") from error
    return [int(token_id) for token_id in token_ids]


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(f"messages is {messages!r}; it must be a non-empty list of dicts with a 'role'")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"messages contains {message!r}; each must be a dict with a 'role'")


def decode_token(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token, with its leading space; U+FFFD for part of a character, "" if unknown."""
    decode = tokenizer.backend_tokenizer.decode
    once = decode([token_id], skip_special_tokens=False)
    twice = decode([token_id, token_id], skip_special_tokens=False)
    # Many decoders strip the space of the first token, so the second of two tells what one adds to a text;
    # but not if the end of the first and the start of the second make a character together.
    return twice.removeprefix(once) if twice.startswith(once) else once
