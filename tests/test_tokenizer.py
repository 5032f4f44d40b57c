"""Detokenizing piece by piece gives what detokenizing at once gives, for every kind of decoder."""

import subprocess
import sys
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import (
    BOS,
    EOS,
    TOOL,
    byte_level_tokenizer,
    byte_tokens,
    metaspace_tokenizer,
    prepending_tokenizer,
    word_tokenizer,
)

from jaxserve.tokenizer import (
    REPLACEMENT,
    IncrementalDetokenizer,
    StopStringMatcher,
    apply_chat_template,
    bad_word_token_sequences,
    decode_token,
    load_tokenizer,
)

BYTE_LEVEL = byte_level_tokenizer()
TOKENIZERS = {
    "byte_level": BYTE_LEVEL,
    "prepending": prepending_tokenizer(),
    "metaspace": metaspace_tokenizer(),
}
PADDED_VOCABULARY = 4
"""Ids past the tokenizer's, which a model with a padded vocabulary may sample."""

FRAGMENTS = [
    *("hello", " wor", "  ", " ", "   he", "a", "bad", "\n\n", "é", "e\u0301", "日本", "本日", "a日"),
    *("ไทย", "नी", "👩‍👩‍👧", "👍🏽", "🇩🇪", "\u200d", "\ufe0f", "ﷺ", "𝔘", "\x00", "▁", "Ġ", "\ufffd"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def pieces(items, cuts):
    """``items`` cut into runs of the lengths ``cuts`` repeats."""
    start, runs, turn = 0, [], 0
    while start < len(items):
        length = cuts[turn % len(cuts)]
        runs.append(items[start : start + length])
        start, turn = start + length, turn + 1
    return runs


def decoded(tokenizer, token_ids, **options) -> str:
    return tokenizer.decode(token_ids, **options)


def streamed(tokenizer, prompt, output, cuts=(1,), **options):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    deltas = [detokenizer.append(run) for run in pieces(output, cuts)]
    return [*deltas, detokenizer.finish()]


def continuation(tokenizer, prompt, output, skip_special_tokens=True):
    """What the output adds to the prompt's text; None if it changes it, as the rest of a character does."""
    before, after = (
        decoded(tokenizer, ids, skip_special_tokens=skip_special_tokens) for ids in (prompt, prompt + output)
    )
    return after.removeprefix(before) if after.startswith(before) else None


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(prompt=texts, text=texts, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_joined_deltas_are_the_text(name, prompt, text, cuts):
    tokenizer = TOKENIZERS[name]
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    whole = tokenizer.encode(prompt + text, add_special_tokens=False)
    # Cutting after len(prompt_ids) is cutting inside a character if a token spans the end of the prompt.
    for start in (0, len(prompt_ids)):
        expected = continuation(tokenizer, whole[:start], whole[start:])
        deltas = streamed(tokenizer, whole[:start], whole[start:], cuts)
        if expected is not None and whole[:start] == prompt_ids[:start]:
            assert "".join(deltas) == expected
        elif REPLACEMENT not in prompt + text:
            assert decoded(tokenizer, whole).endswith("".join(deltas))
        if REPLACEMENT not in prompt + text:
            assert not any(REPLACEMENT in delta for delta in deltas)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_byte_level_deltas_are_the_text_of_any_token_ids(skip_special_tokens, data):
    ids = st.integers(0, len(BYTE_LEVEL) + PADDED_VOCABULARY - 1)
    broken = st.sampled_from(byte_tokens(BYTE_LEVEL, b"\x80\xa0\xc3\xe4\xf0\xff"))
    prompt, output = (data.draw(st.lists(ids | broken, max_size=size)) for size in (12, 30))
    expected = continuation(BYTE_LEVEL, prompt, output, skip_special_tokens)
    deltas = streamed(BYTE_LEVEL, prompt, output, skip_special_tokens=skip_special_tokens)
    if expected is not None:
        assert "".join(deltas) == expected


@pytest.mark.parametrize("name", ["prepending", "metaspace"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_sentencepiece_deltas_are_the_text_of_any_whole_tokens(name, skip_special_tokens, data):
    tokenizer = TOKENIZERS[name]
    first_word = byte_tokens(tokenizer, b"\xff")[0] + 1
    words = st.integers(first_word, len(tokenizer) + PADDED_VOCABULARY - 1).map(lambda token_id: [token_id])
    characters = st.sampled_from("日é👍\n\ufffd").map(lambda char: byte_tokens(tokenizer, char.encode()))
    ids = st.lists(words | characters, max_size=20).map(lambda runs: list(chain.from_iterable(runs)))
    prompt, output = data.draw(ids), data.draw(ids)
    deltas = streamed(tokenizer, prompt, output, skip_special_tokens=skip_special_tokens)
    assert "".join(deltas) == continuation(tokenizer, prompt, output, skip_special_tokens)


@settings(max_examples=100, deadline=None)
@given(output=st.lists(st.sampled_from([0xE4, 0xBD, 0xA0, 0x80, 0xF0, 0x61]), max_size=200))
def test_broken_byte_runs_never_stall_or_lose_the_text_after_them(output):
    tokenizer = TOKENIZERS["prepending"]
    after = tokenizer.encode(" hello", add_special_tokens=False)[1:]
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    text = detokenizer.append(byte_tokens(tokenizer, bytes(output)))
    assert (text + detokenizer.append(after)).endswith("hello")
    assert detokenizer.finish() == ""


def test_text_is_given_out_as_soon_as_it_is_certain(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("a"))
    ids = byte_tokens(tokenizer, "日é".encode())
    assert [detokenizer.append([token_id]) for token_id in ids] == ["", "", "日", "", "é"]


def test_whole_characters_of_a_token_that_ends_inside_one_are_not_held_back():
    half = BYTE_LEVEL.encode("a日")[:1]
    assert BYTE_LEVEL.decode(half) == "a" + REPLACEMENT
    assert IncrementalDetokenizer(BYTE_LEVEL, []).append(half) == "a"


def test_finish_gives_the_broken_rest_once(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert detokenizer.append(byte_tokens(tokenizer, "日".encode()[:1])) == ""
    assert detokenizer.finish() == REPLACEMENT
    assert detokenizer.finish() == ""


def test_a_character_begun_by_the_prompt_comes_with_the_output(tokenizer):
    ids = byte_tokens(tokenizer, "éé日本".encode())
    deltas = streamed(tokenizer, ids[:5], ids[5:])
    assert "".join(deltas) == "日本"


def test_a_prompt_that_ends_in_many_byte_tokens_is_a_whole_context(tokenizer):
    ids = byte_tokens(tokenizer, "日本日本日本日本".encode())
    for cut in range(3, len(ids), 3):
        assert "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == "日本日本日本日本"[cut // 3 :]


def test_byte_fallback_keeps_what_was_shown_before_a_broken_character():
    tokenizer = TOKENIZERS["prepending"]
    ids = byte_tokens(tokenizer, "日".encode() + b"\xe5") + tokenizer.encode("he", add_special_tokens=False)
    assert tokenizer.decode(ids) == 4 * REPLACEMENT + " he"
    assert "".join(streamed(tokenizer, [], ids)) == "日" + REPLACEMENT + " he"


def test_a_first_word_has_its_space_only_after_a_prompt_with_text(tokenizer):
    word = tokenizer.encode("bad bad", add_special_tokens=False)[-1:]
    bos, prompt = [tokenizer.bos_token_id], tokenizer.encode("he", add_special_tokens=False)
    after_nothing = " bad" if tokenizer is BYTE_LEVEL else "bad"
    assert "".join(streamed(tokenizer, bos, word)) == after_nothing
    assert "".join(streamed(tokenizer, prompt + 20 * bos, word)) == " bad"


def test_special_tokens_are_skipped_or_shown_and_added_ones_always_shown(tokenizer):
    bos, eos, tool = tokenizer.convert_tokens_to_ids([BOS, EOS, TOOL])
    word = tokenizer.encode("he", add_special_tokens=False)
    ids = [*word, eos, tool, bos]
    assert "".join(streamed(tokenizer, [], ids, skip_special_tokens=True)) == "he" + TOOL
    assert "".join(streamed(tokenizer, [], ids, skip_special_tokens=False)) == "he" + EOS + TOOL + BOS


def test_spaces_between_special_tokens():
    tokenizer = word_tokenizer()
    bos, hello, world = tokenizer.bos_token_id, *tokenizer.encode("hello world")
    ids = [hello, bos, bos, bos, world, bos]

    def text(skip, spaces):
        options = {"skip_special_tokens": skip, "spaces_between_special_tokens": spaces}
        return "".join(streamed(tokenizer, [], ids, **options))

    assert text(False, True) == tokenizer.decode(ids) == f"hello {BOS} {BOS} {BOS} world {BOS}"
    assert text(False, False) == f"hello {BOS}{BOS}{BOS} world {BOS}"
    assert text(True, True) == text(True, False) == "hello world"


def test_cost_per_token_does_not_grow_with_the_output(tokenizer, monkeypatch):
    detokenizer = IncrementalDetokenizer(tokenizer, 100 * tokenizer.encode("he "))
    decode, longest = detokenizer._decode, 0

    def counted(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(detokenizer, "_decode", counted)
    detokenizer.append(tokenizer.encode(100 * "hello 日本 "))
    assert longest <= 8
    detokenizer.append(byte_tokens(tokenizer, 300 * b"\x80"))
    assert longest <= 65


# --- stop strings


def first_match(text, stop, early=0):
    """(start, stop string) of the match seen first by a reader, who looks at every beginning of the text but for those
    of up to ``early`` characters."""
    for end in range(early + 1, len(text) + 1):
        ending_here = [s for s in stop if text[:end].endswith(s)]
        if ending_here:
            longest = max(ending_here, key=len)
            return end - len(longest), longest
    return None


@pytest.mark.parametrize("include", [False, True])
@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab日\n", max_size=30),
    stop=st.lists(st.text("ab日\n", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    num_early=st.integers(0, 4),
)
def test_stop_strings_are_found_as_in_the_whole_text(include, text, stop, cuts, num_early):
    matcher = StopStringMatcher(stop, include)
    shown, matched = "", None
    runs = list(pieces(text, cuts))
    for run in runs[:num_early]:
        shown += matcher.feed_early(run)
    for run in runs[num_early:]:
        emitted, matched = matcher.feed(run)
        shown += emitted
        if matched is not None:
            break
    shown += matcher.flush()
    expected = first_match(text, stop, len("".join(runs[:num_early])))
    if expected is None:
        assert (shown, matched) == (text, None)
    else:
        start, found = expected
        assert (shown, matched) == (text[: start + len(found) * include], found)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopStringMatcher(["END", "\n\n"])
    assert [matcher.feed(delta) for delta in ("hi E", "X", "\n", "EN", "DE", "more")] == [
        ("hi ", None),
        ("EX", None),
        ("", None),
        ("\n", None),
        ("", "END"),
        ("", "END"),
    ]
    assert matcher.flush() == ""


def test_no_stop_strings_hold_nothing_back():
    matcher = StopStringMatcher([])
    assert matcher.feed("text") == ("text", None)
    assert matcher.flush() == ""


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopStringMatcher(["a", ""])


# --- the rest


def test_bad_words_with_and_without_a_leading_space():
    (bad,), (space_bad,) = BYTE_LEVEL.encode("bad"), BYTE_LEVEL.encode(" bad")
    assert bad_word_token_sequences(BYTE_LEVEL, ["bad", " bad"]) == [(bad,), (space_bad,)]
    sentencepiece = TOKENIZERS["metaspace"]
    assert tuple(sentencepiece.encode("bad")) in bad_word_token_sequences(sentencepiece, ["bad"])


def test_decode_token_gives_what_a_token_adds_to_a_text(tokenizer):
    word = tokenizer.encode("bad bad", add_special_tokens=False)[-1]
    assert decode_token(tokenizer, word) == " bad"
    assert decode_token(tokenizer, tokenizer.eos_token_id) == EOS
    assert decode_token(tokenizer, byte_tokens(tokenizer, "日".encode())[0]) == REPLACEMENT
    assert decode_token(tokenizer, len(tokenizer)) == ""


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tool role') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}\n{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]


def test_chat_template():
    tokenizer = byte_level_tokenizer(TEMPLATE)

    def text(messages, **options):
        return tokenizer.decode(apply_chat_template(tokenizer, messages, **options))

    assert text(HI) == "user:hi\nassistant:"
    assert text(HI, add_generation_prompt=False) == "user:hi\n"
    assert text(HI, tools=[{"type": "function", "function": {"name": "f"}}]) == "user:hi\n1 toolsassistant:"
    assert text(HI, add_generation_prompt=False, continue_final_message=True) == "user:hi"
    assert text(HI, chat_template="{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        (HI, {}, "no chat template"),
        (HI, {"chat_template": TEMPLATE, "continue_final_message": True}, "add_generation_prompt=False"),
        ([{"role": "tool", "content": ""}], {"chat_template": TEMPLATE}, r"does not accept.*no tool role"),
        (HI, {"chat_template": "{{ oops"}, "does not accept"),
        ([], {"chat_template": TEMPLATE}, "non-empty list"),
        ("hi", {"chat_template": TEMPLATE}, "non-empty list"),
        ([{"content": "hi"}], {"chat_template": TEMPLATE}, "'role'"),
    ],
)
def test_chat_template_mistakes(messages, options, error):
    with pytest.raises(ValueError, match=error):
        apply_chat_template(BYTE_LEVEL, messages, **options)


def test_load_tokenizer(tmp_path):
    BYTE_LEVEL.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("hello 日本") == BYTE_LEVEL.encode("hello 日本")


@pytest.mark.parametrize("folder", ["missing", "."])
def test_load_tokenizer_that_is_not_there(tmp_path, folder):
    path = tmp_path / folder
    with pytest.raises(ValueError, match="tokenizer") as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_loading_is_quiet_and_needs_no_jax(tmp_path):
    BYTE_LEVEL.save_pretrained(tmp_path)
    code = (
        "import sys, jaxserve.outputs, jaxserve.sampling_params, jaxserve.tokenizer as t\n"
        "assert 'transformers' not in sys.modules\n"
        f"t.load_tokenizer({str(tmp_path)!r})\n"
        "assert 'jax' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
