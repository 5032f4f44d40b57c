"""Tokenizers small enough to build in memory: one per way of turning token ids back into text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, TOOL = "<|bos|>", "<|eos|>", "<tool>"
"""Added to every tokenizer; the last one is not special, so it is never skipped."""

# Some byte-level ones begin or end inside a character, as in trained vocabularies; they are merged first.
_BYTE_LEVEL_TOKENS = (
    "a日".encode()[:2],
    "日本".encode()[2:5],
    "本日".encode()[1:5],
    "👩‍👩".encode()[2:6],
    *(text.encode() for text in ("he", "hello", " w", " wor", " bad", "bad", "  ", "日本", "é", "\n\n")),
)
_SENTENCEPIECE_TOKENS = ("▁h", "▁he", "he", "▁w", "▁wo", "▁b", "▁ba", "▁bad", "ad", "▁▁", "▁▁▁", "日本")


def byte_level_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen."""
    alphabet = _byte_characters()
    words = ["".join(alphabet[byte] for byte in token) for token in _BYTE_LEVEL_TOKENS]
    tokenizer = Tokenizer(_bpe(sorted(alphabet.values()), words))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer, chat_template)


def prepending_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece as Llama 2: the normalizer prepends a space, the decoder strips it."""
    tokenizer = Tokenizer(_byte_fallback_bpe())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece with the Metaspace decoder, which drops every space of the first token.

    It has a token for U+FFFD, which the other one writes as bytes.
    """
    tokenizer = Tokenizer(_byte_fallback_bpe(replacement="\ufffd"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _wrapped(tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words and no decoder, so that every token is separated by a space."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer)


def byte_tokens(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """The ids of the tokens that stand for single bytes."""
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        alphabet = _byte_characters()
        names = [alphabet[byte] for byte in data]
    else:
        names = [f"<0x{byte:02X}>" for byte in data]
    return [tokenizer.get_vocab()[name] for name in names]


def _wrapped(tokenizer: Tokenizer, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.add_tokens([AddedToken(TOOL, special=False, normalized=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    wrapped.chat_template = chat_template
    return wrapped


def _byte_characters() -> dict[int, str]:
    """Byte-level BPE writes each byte as a printable character: itself, or else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _byte_fallback_bpe(replacement: str = "") -> models.BPE:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,日本", *replacement]
    return _bpe(["<unk>", *bytes_, *letters], _SENTENCEPIECE_TOKENS, byte_fallback=True, unk_token="<unk>")


def _bpe(symbols: Sequence[str], words: Sequence[str], **options) -> models.BPE:
    """A BPE model that knows ``symbols`` and every prefix of ``words``, merged from left to right."""
    prefixes = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    merges = [(prefix[:-1], prefix[-1]) for prefix in prefixes]
    vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys([*symbols, *prefixes]))}
    return models.BPE(vocab=vocab, merges=merges, **options)
