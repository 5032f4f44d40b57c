"""Questions with exact answers: what the demo model was taught, by generators that know what it never saw.

A skill's cases are split by a hash of what the case asks, whatever the wording: what is held out was in no training
document. Nothing is downloaded, and the same seed gives the same cases on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_PERCENT = 5


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WORDS = _split(
    "red blue green black white yellow cat dog bird fish horse cow tree leaf rose sun moon star sky "
    "rain snow wind fire water sand stone gold iron wood glass paper book page word line door room "
    "house road city ship car train bike hat shoe coat ring bell cup plate fork knife bread milk egg "
    "apple pear plum lemon rice salt tea cake hand foot eye ear nose king queen child baker song drum "
    "game ball map key lock clock desk lamp box bag pen coin river lake hill field farm bridge tower "
    "wall north south east west"
)
NAMES = _split("Ada Alan Anna Ben Carl Dora Emma Eva Finn Grace Hugo Ida Ivan Jane John Kim Leo Lisa Max Mia Noah Olga")
CITIES = _split("Berlin Bonn Cairo Delhi Lima London Madrid Milan Oslo Paris Prague Riga Rome Tokyo Vienna")
TEXT_FIELDS = {
    "name": NAMES,
    "city": CITIES,
    "owner": NAMES,
    "color": WORDS[:6],
    "item": WORDS[40:],
    "title": WORDS,
}
NUMBER_FIELDS = ("age", "size", "id", "count", "price", "year")


@dataclass(frozen=True)
class Case:
    """One question with its one right answer. ``wordings[0]`` is the plain one, which is scored."""

    key: str
    wordings: tuple[str, ...]
    answer: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.key)


def is_held_out(key: str) -> bool:
    """Whether a case or a file belongs to the held-out split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT


def _word(rng: random.Random) -> str:
    """Mostly a known word, sometimes a made-up one, so that lists are read and not just recognised."""
    if rng.random() < 0.85:
        return rng.choice(WORDS)
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def _distinct_words(rng: random.Random, n: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < n:
        words[_word(rng)] = None
    return list(words)


def _number(rng: random.Random, weights: tuple[int, int, int]) -> int:
    """1 to 3 digits with the given odds."""
    digits = rng.choices((1, 2, 3), weights)[0]
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _separator(rng: random.Random) -> str:
    return ", " if rng.random() < 0.2 else " "


def _add(rng: random.Random) -> Case:
    a, b = (_number(rng, (3, 7, 10)) for _ in range(2))
    wordings = (
        f"{a} + {b}?",
        f"What is {a} + {b}?",
        f"What is {a}+{b}?",
        f"{a}+{b}",
        f"{a} + {b} =",
        f"Add {a} and {b}.",
    )
    return Case(f"add {min(a, b)} {max(a, b)}", wordings, str(a + b))


def _items(rng: random.Random) -> list[str]:
    n = rng.randint(3, 6)
    return [str(rng.randint(0, 9)) for _ in range(n)] if rng.random() < 0.4 else [_word(rng) for _ in range(n)]


def _reverse(rng: random.Random) -> Case:
    items, sep = _items(rng), _separator(rng)
    text = sep.join(items)
    wordings = (f"reverse {text}?", f"Reverse: {text}", f"Reverse the list {text}", f"reverse {text}")
    return Case(f"reverse {items}", wordings, sep.join(reversed(items)))


def _copy(rng: random.Random) -> Case:
    items, sep = _items(rng), _separator(rng)
    text = sep.join(items)
    return Case(f"copy {items}", (f"repeat {text}?", f"Repeat: {text}", f"Say {text}"), text)


def _sort(rng: random.Random) -> Case:
    numbers, sep = [_number(rng, (1, 3, 0)) for _ in range(rng.randint(3, 5))], _separator(rng)
    text = sep.join(map(str, numbers))
    wordings = (f"sort {text}?", f"Sort: {text}", f"Sort these numbers: {text}", f"sort {text}")
    return Case(f"sort {numbers}", wordings, sep.join(map(str, sorted(numbers))))


def _largest(rng: random.Random) -> Case:
    numbers, sep = [_number(rng, (1, 3, 0)) for _ in range(rng.randint(3, 5))], _separator(rng)
    text = sep.join(map(str, numbers))
    wordings = (f"largest of {text}?", f"Which is the largest of {text}?", f"largest: {text}")
    return Case(f"largest {numbers}", wordings, str(max(numbers)))


def _lookup(rng: random.Random) -> Case:
    keys = _distinct_words(rng, rng.randint(2, 5))
    values = [str(_number(rng, (1, 2, 0))) if rng.random() < 0.6 else _word(rng) for _ in keys]
    pairs = ", ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))
    at = rng.randrange(len(keys))
    wordings = (
        f"{pairs}. {keys[at]}?",
        f"Given {pairs}, what is {keys[at]}?",
        f"{pairs}. What is {keys[at]}?",
    )
    return Case(f"lookup {pairs} {keys[at]}", wordings, values[at])


def _count(rng: random.Random) -> Case:
    kinds = _distinct_words(rng, rng.randint(2, 3))
    items = [rng.choice(kinds) for _ in range(rng.randint(3, 7))]
    text = " ".join(items)
    wordings = (
        f"count {kinds[0]} in {text}?",
        f"How many times is {kinds[0]} in {text}?",
        f"Count {kinds[0]}: {text}",
    )
    return Case(f"count {kinds[0]} {items}", wordings, str(items.count(kinds[0])))


def _json(rng: random.Random) -> Case:
    names = rng.sample([*TEXT_FIELDS, *NUMBER_FIELDS], rng.randint(2, 4))
    fields = {n: rng.choice(TEXT_FIELDS[n]) if n in TEXT_FIELDS else _number(rng, (1, 2, 1)) for n in names}
    text = ", ".join(f"{k}={v}" for k, v in fields.items())
    wordings = (f"json {text}?", f"JSON: {text}", f"Write JSON with {text}", f"Make a JSON object: {text}.")
    return Case(f"json {text}", wordings, json.dumps(fields))


SKILLS: dict[str, Callable[[random.Random], Case]] = {
    "add": _add,
    "reverse": _reverse,
    "sort": _sort,
    "lookup": _lookup,
    "json": _json,
    "copy": _copy,
    "largest": _largest,
    "count": _count,
}


def draw(rng: random.Random, skill: str, *, held_out: bool) -> Case:
    """A random case of one split."""
    while (case := SKILLS[skill](rng)).held_out != held_out:
        pass
    return case


def held_out_cases(skill: str, count: int, seed: int) -> list[Case]:
    """``count`` different cases that training never draws."""
    rng = random.Random(f"held out {seed} {skill}")
    cases: dict[str, Case] = {}
    while len(cases) < count:
        case = draw(rng, skill, held_out=True)
        cases[case.key] = case
    return list(cases.values())
