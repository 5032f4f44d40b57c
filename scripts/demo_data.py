"""Data of the demo model: documents of its skills, text from the Python installation, the tokenizer.

Nothing is downloaded. Unseen means unseen: a skill's cases are split by a hash of what the case asks
(``jaxserve.evaluation.tasks.skills``), text by a hash of the file it comes from.
"""

from __future__ import annotations

import ast
import json
import random
import re
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxserve.evaluation.tasks.skills import CITIES, NAMES, NUMBER_FIELDS, TEXT_FIELDS, WORDS, Case, draw, is_held_out

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL_TOKENS = (END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SMALL_TALK = (
    ("Hello|Hi|Hello!|Hi!|hello|Hey", "Hello! I am a small demo model. Try: 17 + 25?"),
    (
        "Who are you?|What are you?|what is your name?|Tell me about yourself.",
        "I am the demo model of jaxserve: a tiny language model for trying the engine out.",
    ),
    (
        "What can you do?|Help|help|How can you help me?",
        "I can add small numbers, sort and reverse short lists, look up a key, count words and write JSON.",
    ),
    ("Thank you|Thanks|Thanks!|thank you!", "You are welcome!"),
    ("Bye|Goodbye|bye|Good night", "Goodbye!"),
    ("How are you?|how are you|How do you do?", "I am fine, thank you. Ask me for a sum."),
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a demo model.")


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


SKILL_ODDS = {
    "add": 30,
    "reverse": 11,
    "sort": 15,
    "lookup": 14,
    "json": 9,
    "copy": 4,
    "largest": 7,
    "count": 10,
}


@dataclass(frozen=True)
class Segment:
    """A piece of a document: text to learn (answers) or text that is only read (questions)."""

    text: str
    learn: bool


def plain_form(case: Case, wording: int = 0) -> tuple[Segment, Segment]:
    """``Q: ...`` / ``A: ...`` lines; the answer ends with its newline."""
    return Segment(f"Q: {case.wordings[wording]}\nA:", False), Segment(f" {case.answer}\n", True)


def chat_form(question: str, answer: str) -> tuple[Segment, Segment]:
    """One exchange as the chat template writes it."""
    return Segment(f"{USER}{question}{END}{ASSISTANT}", False), Segment(f"{answer}{END}", True)


def skill_document(rng: random.Random, lessons: Sequence[tuple[str, str]]) -> list[Segment]:
    """One training document: some plain questions in a row, or a conversation.

    ``lessons`` are further (question, answer) pairs for conversations.
    """
    names, odds = list(SKILL_ODDS), list(SKILL_ODDS.values())
    chat = rng.random() < 0.4
    same = rng.choices(names, odds)[0] if rng.random() < 0.4 else None
    segments: list[Segment] = []
    if chat and rng.random() < 0.1:
        segments.append(Segment(f"{SYSTEM}{rng.choice(SYSTEM_PROMPTS)}{END}", False))
    for _ in range(rng.choice((1, 1, 2, 3) if chat else (1, 1, 1, 2, 3, 5))):
        case = draw(rng, same or rng.choices(names, odds)[0], held_out=False)
        if not chat:
            segments += plain_form(case, 0 if rng.random() < 0.8 else rng.randrange(len(case.wordings)))
        elif (other := rng.random()) < 0.05:
            questions, answer = rng.choice(SMALL_TALK)
            segments += chat_form(rng.choice(questions.split("|")), answer)
        elif other < 0.12 and lessons:
            segments += chat_form(*rng.choice(lessons))
        else:
            segments += chat_form(rng.choice(case.wordings), case.answer)
    return [*segments, Segment(END_OF_TEXT, True)]


@dataclass(frozen=True)
class Corpus:
    """Text of one split: documents to continue, and (question, answer) pairs from docstrings."""

    prose: tuple[str, ...]
    code: tuple[str, ...]
    lessons: tuple[tuple[str, str], ...]


def read_corpus(*, held_out: bool) -> Corpus:
    """English and code of the running Python's standard library."""
    library = Path(ast.__file__).parent
    prose: list[str] = []
    code: list[str] = []
    lessons: list[tuple[str, str]] = []
    for path in _library_files(library, (".py",)):
        name = path.relative_to(library).as_posix()
        if is_held_out(name) != held_out:
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module == "pydoc_data.topics":
            continue
        code.append(_scrub(source))
        found = [(title, _scrub(text)) for title, text in _docstrings(source, module)]
        prose.append("\n\n".join(f"{title}: {text}" if title != module else text for title, text in found))
        lessons += [lesson for title, text in found if (lesson := _lesson(title, text))]
    for path in _library_files(library, (".txt", ".rst", ".html")):
        if is_held_out(path.relative_to(library).as_posix()) == held_out:
            text = _scrub(path.read_text(encoding="utf-8", errors="ignore"))
            prose.append(_html_text(text) if path.suffix == ".html" else text)
    prose += [_scrub(text) for topic, text in _topics() if is_held_out(f"topic {topic}") == held_out]
    return Corpus(tuple(t for t in prose if len(t) > 80), tuple(t for t in code if len(t) > 200), tuple(lessons))


def _library_files(library: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    skip = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3", "ensurepip", "__pycache__"}
    for path in sorted(library.rglob("*")):
        parts = path.relative_to(library).parts
        generated = parts[-1].startswith("_sysconfigdata") or parts[0].startswith("config-")
        if path.suffix in suffixes and path.is_file() and not generated and not skip.intersection(parts):
            yield path


def _topics() -> list[tuple[str, str]]:
    """The language reference as the interactive ``help()`` shows it."""
    from pydoc_data.topics import topics

    return sorted(topics.items())


def _scrub(text: str) -> str:
    """Without addresses of people and pages, non-ASCII text and trailing blanks."""
    text = re.sub(r"[\w.+-]+@[\w-]+\.[\w.-]+", "name@example.org", text)
    text = re.sub(r"(https?|ftp)://[^\s\"'<>)\]}`]+", r"\1://example.org/", text)
    text = re.sub(r"[^\x00-\x7f]+", "", text)
    return re.sub(r"[ \t\r\f\v]+\n", "\n", text)


def _docstrings(source: str, module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module and what it defines."""
    pending: list[tuple[str, Documented]] = [(module, ast.parse(source))]
    while pending:
        name, node = pending.pop(0)
        if text := ast.get_docstring(node):
            yield name, text
        pending += [
            (f"{name}.{child.name}", child)
            for child in node.body
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]


def _lesson(title: str, docstring: str) -> tuple[str, str] | None:
    """``What is textwrap.fill?`` with the first sentence of its docstring."""
    sentence = " ".join(docstring.split("\n\n")[0].split())
    plain = sentence and sentence[0] in string.ascii_uppercase and sentence.endswith(".") and len(sentence) < 160
    return (f"What is {title}?", sentence) if plain and "._" not in title and title[0] != "_" else None


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def _html_text(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.pieces))


def train_tokenizer(corpus: Corpus, vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE with one token per digit, learned on text and skill documents of the training split."""
    rng = random.Random(f"tokenizer {seed}")
    skills = ["".join(s.text for s in skill_document(rng, corpus.lessons)) for _ in range(20_000)]
    texts = [re.sub(r"<\|\w+\|>", "", text) for text in skills] * 2
    texts += [*corpus.prose, *(source[:20_000] for source in corpus.code[::3])]
    # Known words with and without a space before them, so that each is one token in both places.
    texts += [f"{w}\n {w}\n" * 400 for w in (*WORDS, *NAMES, *CITIES, *TEXT_FIELDS, *NUMBER_FIELDS)]
    tokenizer = Tokenizer(models.BPE())
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, for ``transformers.AutoTokenizer``."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": [SYSTEM, USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True)
class Rows:
    """Token ids int32 [R, T+1] (inputs and, shifted by one, targets) and the targets' loss weights [R, T]."""

    ids: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Packer:
    """Packs documents densely into rows. Each row starts where a document (or a line of one) starts.

    Targets: answers and text count fully, questions with ``question_weight``.
    """

    tokenizer: Tokenizer
    lessons: tuple[tuple[str, str], ...]
    prose: tuple[np.ndarray, ...]
    code: tuple[np.ndarray, ...]
    prose_share: float = 0.6
    question_weight: float = 0.05

    @classmethod
    def create(cls, tokenizer: Tokenizer, corpus: Corpus) -> Packer:
        def encode(texts: tuple[str, ...]) -> tuple[np.ndarray, ...]:
            return tuple(
                np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)
            )

        return cls(tokenizer, corpus.lessons, encode(corpus.prose), encode(corpus.code))

    def skill_rows(self, rng: random.Random, rows: int, length: int) -> Rows:
        """Rows of skill documents."""

        def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            while True:
                batch = [skill_document(rng, self.lessons) for _ in range(16)]
                flat = [s for document in batch for s in document]
                encoded = self.tokenizer.encode_batch([s.text for s in flat], add_special_tokens=False)
                pieces = iter(zip(flat, encoded, strict=True))
                for document in batch:
                    parts = [next(pieces) for _ in document]
                    weight = [1.0 if s.learn else self.question_weight for s, _ in parts]
                    yield (
                        np.concatenate([np.asarray(e.ids, np.int32) for _, e in parts]),
                        np.repeat(np.asarray(weight, np.float32), [len(e.ids) for _, e in parts]),
                    )

        return _pack(documents(), rows, length)

    def text_rows(self, rng: random.Random, rows: int, length: int) -> Rows:
        """Rows of prose and code; a document is entered at its start or at a random place."""
        end = np.asarray([SPECIAL_TOKENS.index(END_OF_TEXT)], np.int32)

        def documents() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            while True:
                texts = self.prose if rng.random() < self.prose_share else self.code
                ids = rng.choices(texts, [len(t) for t in texts])[0]
                start = 0 if rng.random() < 0.1 else rng.randrange(len(ids))
                ids = np.concatenate([ids[start:], end])
                yield ids, np.ones(len(ids), np.float32)

        return _pack(documents(), rows, length)


def _pack(documents: Iterator[tuple[np.ndarray, np.ndarray]], rows: int, length: int) -> Rows:
    """Fill each row with whole documents; only its last one is cut."""
    ids = np.zeros((rows, length + 1), np.int32)
    weights = np.zeros((rows, length + 1), np.float32)
    for row in range(rows):
        at = 0
        while at <= length:
            piece, weight = next(documents)
            n = min(len(piece), length + 1 - at)
            ids[row, at : at + n], weights[row, at : at + n] = piece[:n], weight[:n]
            at += n
    return Rows(ids, weights[:, 1:])


def library_name() -> str:
    """What the model card calls the source of the text."""
    return f"standard library of Python {sys.version.split()[0]}"
