"""Accuracy: likelihoods and texts against direct scoring, the tasks, the statistics, and the script that joins them.

What needs the lm-evaluation-harness itself is slow and runs where it is installed (``pip install -e '.[eval]'``).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from recorded_runs import Call
from tiny_models import scale_weight

from jaxserve import LLM
from jaxserve.cli.options import EngineFlags
from jaxserve.evaluation.accuracy import Comparison, Scores, binomial_tail, worse
from jaxserve.evaluation.agreement import LOGPROB_FLOOR
from jaxserve.evaluation.direct import Direct
from jaxserve.evaluation.engines import Loaded, open_llm
from jaxserve.evaluation.harness import Outcome, Request
from jaxserve.evaluation.reference import PlainModel
from jaxserve.evaluation.scorer import Scorer, first_token, sampling_params
from jaxserve.evaluation.tasks import DEMO, DIRECTORY, documents, skills
from jaxserve.evaluation.variants import engine_flags

FEW: dict[str, Any] = {"token_buckets": (32,), "decode_buckets": (4,)}
LIMITS = (
    *("--compilation-cache-dir", "none", "--block-size", "4", "--max-model-len", "128"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-gpu-blocks-override", "130"),
)
TEXTS = ("hello world", "bad bad hello", "日本 hello é", "the cat\n\nsat on the mat", "w", "hello hello hello wor")


@pytest.fixture(scope="module")
def direct(tiny_llm: LLM) -> Direct:
    return direct_of(tiny_llm)


def direct_of(llm: LLM) -> Direct:
    tokenizer = llm.get_tokenizer()
    ends = frozenset(llm.engine.eos_token_ids)
    return Direct(PlainModel.load(llm.args, 1), tokenizer, first_token(tokenizer), Scorer(llm).longest, ends)


# -- scores and texts of an engine -------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_direct_scoring(tiny_llm: LLM, direct: Direct) -> None:
    pairs = [(a, b) for a in TEXTS for b in TEXTS[:3]]
    encode = tiny_llm.get_tokenizer().encode
    found = list(Scorer(tiny_llm).likelihoods([(encode(a), encode(a + b)[len(encode(a)) :]) for a, b in pairs]))
    wanted = [direct.pair(*pair) for pair in pairs]
    for (nats, greedy), exact in zip(found, wanted, strict=True):
        assert nats == pytest.approx(exact.total, abs=LOGPROB_FLOOR * len(exact.logprobs))
        assert greedy == exact.greedy
    assert len({round(nats, 3) for nats, _ in found}) == len(pairs)


def test_greedy_texts_count_as_greedy(tiny_llm: LLM, direct: Direct) -> None:
    tokenizer = tiny_llm.get_tokenizer()
    context = tokenizer.encode(TEXTS[0])
    (output,) = tiny_llm.generate([context], sampling_params({"max_gen_toks": 3}, None), use_tqdm=False)
    told = output.outputs[0].token_ids
    other = [*told[:-1], (told[-1] + 1) % 100]
    (_, greedy), (_, changed) = Scorer(tiny_llm).likelihoods([(context, told), (context, other)])
    assert greedy and not changed


def test_texts_are_those_of_direct_scoring(tiny_llm: LLM, direct: Direct) -> None:
    tokenizer = tiny_llm.get_tokenizer()
    contexts = [tokenizer.encode(text) for text in TEXTS]
    asked: list[dict[str, Any]] = [{"max_new_tokens": 5}, {"until": ["a", "l"], "max_gen_toks": 12}]
    found: list[str] = []
    for arguments in asked:
        params = sampling_params(arguments, tokenizer.eos_token)
        found = list(Scorer(tiny_llm).texts(contexts, [params] * len(contexts)))
        assert found == [direct.answer(text, params.stop, params.max_tokens or 0) for text in TEXTS]
    assert any(found) and not any(set(text) & {"a", "l"} for text in found)


def test_a_text_longer_than_the_model_is_predicted_once(tiny_llm: LLM, direct: Direct) -> None:
    text = "hello world " * 60
    tokens, size = tiny_llm.get_tokenizer().encode(text), Scorer(tiny_llm).longest - 1
    assert len(tokens) > 2 * size
    exact = direct.rolling(text)
    assert len(exact.logprobs) == len(tokens)
    first = direct._of([direct.prefix], tokens[:size])  # the first window has nothing but the token before the text
    assert exact.logprobs[:size] == pytest.approx(first.logprobs, abs=LOGPROB_FLOOR)


@pytest.mark.parametrize(("context", "then"), [([], [1]), ([1] * 100, [1] * 28)])
def test_what_does_not_fit_is_refused(tiny_llm: LLM, context: list[int], then: list[int]) -> None:
    with pytest.raises(ValueError, match=r"scored are 1 token of context or more, and 127 together"):
        list(Scorer(tiny_llm).likelihoods([(context, then)]))


def test_generation_arguments() -> None:
    params = sampling_params({"until": "\n", "do_sample": False, "temperature": 0.7}, "</s>")
    assert params.greedy and params.stop == ("\n", "</s>") and params.max_tokens == 256
    assert sampling_params({"do_sample": True}, None).temperature == 1
    params = sampling_params({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "until": ["", "a", "a"]}, None)
    assert (params.temperature, params.top_p, params.max_tokens, params.stop) == (0.5, 0.9, 7, ("a",))
    with pytest.raises(ValueError, match=r"generation argument num_beams=4 is not supported; known: until, "):
        sampling_params({"num_beams": 4}, None)


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases without the library that the harness keeps them in."""
    monkeypatch.setattr(documents, "_dataset", list)


def read_task(path: Path) -> dict[str, Any]:
    """A task file with its functions as names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: node.value)
    found = yaml.load(path.read_text(), Loader)
    return (read_task(DIRECTORY / found.pop("include")) if "include" in found else {}) | found


def test_task_files_are_whole(plain_lists: None) -> None:
    """Names are those of the files, functions exist, and every field that a template names is in every case."""
    found = {path.stem: read_task(path) for path in DIRECTORY.glob("*.yaml")}
    assert {f"demo_{name}" for name in skills.SKILLS} == set(found["demo_skills"].pop("task"))
    assert set(DEMO) <= set(found) and len(found) == len(skills.SKILLS) + 4
    for name, task in found.items():
        if task.get("group"):
            assert task["group"] == name
            continue
        assert task["task"] == name
        cases = function(task["custom_dataset"])(**task.get("dataset_kwargs", {}), version=1)
        assert len(cases["test"]) >= 50
        fields = set(re.findall(r"{{(\w+)}}", f"{task['doc_to_text']} {task['doc_to_target']}"))
        assert all(fields <= set(case) for of in cases.values() for case in of)
        if "process_results" in task:
            scored = function(task["process_results"])(cases["test"][0], [cases["test"][0]["answer"]])
            assert scored == dict.fromkeys([m["metric"] for m in task["metric_list"]], 1.0)


def function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_cases_are_unseen_and_always_the_same(plain_lists: None) -> None:
    for name in skills.SKILLS:
        cases = skills.held_out_cases(name, 40, seed=3)
        assert cases == skills.held_out_cases(name, 40, seed=3) and all(case.held_out for case in cases)
        asked = documents.skill(name)
        questions = {case["question"] for case in asked["test"]}
        assert not questions & {case["question"] for case in asked["shots"]} and len(questions) == len(asked["test"])
    assert documents.skill("add")["test"][0] == {"question": "41 + 609?", "answer": "650"}
    for case in documents.choice()["test"]:
        assert len(set(case["choices"])) == 4
        assert eval(case["question"].rstrip("?")) == int(case["choices"][case["label"]])


def test_json_scores() -> None:
    def scores(answer: str) -> list[float]:
        return [*documents.score_json({"answer": '{"a": 1, "b": "x"}'}, [answer]).values()]

    assert scores('{"b": "x", "a": 1}') == [1, 1, 1] and scores('{"a": 2, "b": "x"}') == [1, 1, 0]
    assert scores('{"a": 1}') == [1, 0, 0] and scores("[1]") == scores('{"a": 1') == scores("") == [0, 0, 0]


# -- statistics --------------------------------------------------------------------------------------------------------


def shares(values: Sequence[float], higher: bool = True) -> Scores:
    cases = tuple(map(str, range(len(values))))
    return Scores("t", "acc", higher, np.asarray(values, np.float64), np.ones(len(values)), cases)


def test_standard_errors() -> None:
    values = np.random.default_rng(0).normal(size=200)
    scores = shares(values.tolist())
    assert scores.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(200)) and not scores.is_share
    assert math.isnan(shares([1.0]).stderr)
    # Of a ratio: against many draws of the same kind of cases.
    rng = np.random.default_rng(1)

    def text() -> Scores:
        count = rng.integers(50, 500, 60).astype(np.float64)
        return Scores("t", "bits_per_byte", False, count * rng.normal(2.5, 0.3, 60), count, ("x",) * 60)

    drawn = [text() for _ in range(300)]
    assert np.mean([s.stderr for s in drawn]) == pytest.approx(np.std([s.mean for s in drawn]), rel=0.15)


def test_losses_are_told_from_chance() -> None:
    right = [1.0] * 80 + [0.0] * 20
    base = shares(right)
    assert Comparison(base, base).chance(0) == 1 and Comparison(base, base).stderr == 0
    some = Comparison(base, shares([0.0] * 12 + right[12:]))
    assert some.loss == pytest.approx(0.12) and some.chance(0) == pytest.approx(0.5**12)
    mixed = Comparison(base, shares([0.0] * 3 + right[3:98] + [1.0, 1.0]))
    assert mixed.chance(0) == pytest.approx(sum(math.comb(5, k) for k in range(3)) / 32)
    assert worse([some, mixed], 0) == [True, False]
    assert worse([some, mixed], 0.15) == [False, False] and worse([some], 0.02) == [True]
    better = Comparison(shares([0.0] * 12 + right[12:]), base)
    assert better.loss < 0 and not any(worse([better], 0))
    assert Comparison(shares(right, higher=False), shares([0.0] * 12 + right[12:], higher=False)).loss < 0
    assert binomial_tail(0, 0) == 1 and binomial_tail(10, 10) == pytest.approx(1)


def test_differences_without_weight_are_none() -> None:
    values = np.random.default_rng(0).uniform(1, 3, 60)
    base = shares(values.tolist(), higher=False)
    assert not any(worse([Comparison(base, shares((values + 1e-6).tolist(), higher=False))], 0))
    assert worse([Comparison(base, shares((values + 1e-3).tolist(), higher=False))], 0) == [True]


def test_other_cases_are_not_compared() -> None:
    base = shares([1.0, 0.0])
    other = Scores("t", "acc", True, base.values, base.weights, ("0", "2"))
    with pytest.raises(ValueError, match="not asked the same cases"):
        Comparison(base, other)


def test_variants_are_options_of_the_engine() -> None:
    base = EngineFlags(model="m", dtype="bfloat16", seed=3)
    flags = engine_flags("-tp 2 --dtype float32", base)
    assert (flags.model, flags.dtype, flags.seed, flags.tensor_parallel_size) == ("m", "float32", 3, 2)
    for text in ("--nonsense 1", "-tp x", "word", "--help"):
        with pytest.raises(ValueError, match=re.escape(f"--variant {text!r}: ")):
            engine_flags(text, base)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path) -> list[str | Path]:
    return ["--model", tiny_model, "--out", tmp_path, *LIMITS]


def engines(monkeypatch: pytest.MonkeyPatch, *changes: Callable[[LLM], None] | None) -> None:
    """Engines have one program of each kind; the first is changed by the first of ``changes``, and so on."""
    rest = iter(changes)

    def opened(options: dict[str, Any]) -> Loaded:
        loaded = open_llm(options | FEW)
        change = next(rest, None)
        if change is not None:
            change(loaded.llm)
        return loaded

    monkeypatch.setattr(import_module("evaluate"), "open_llm", opened)


WRONG = partial(scale_weight, name="layers.1.mlp.down", factor=2.0)


@pytest.fixture
def without_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's model is an engine's scorer, and two tasks are asked here: to say what the first engine said, and to
    know texts."""
    contexts = [f"{text} {i}" for i, text in enumerate(TEXTS * 6)]
    said: list[str] = []

    def run_tasks(llm: LLM, *_: Any) -> Outcome:
        tokenizer, scorer = llm.get_tokenizer(), Scorer(llm)
        asked = {"until": ["\n"], "max_gen_toks": 6}
        params = sampling_params(asked, tokenizer.eos_token)
        texts = list(scorer.texts([tokenizer.encode(c) for c in contexts], [params] * len(contexts)))
        said.extend(texts if not said else [])
        pairs = [([first_token(tokenizer)], tokenizer.encode(c)) for c in contexts]
        nats = [nats for nats, _ in scorer.likelihoods(pairs)]
        right = np.array([a == b for a, b in zip(texts, said, strict=True)], np.float64)
        bytes_ = np.array([len(c.encode()) for c in contexts], np.float64)
        return Outcome(
            [
                Scores("say", "exact_match", True, right, np.ones(len(right)), tuple(contexts)),
                Scores("know", "bits_per_byte", False, -np.array(nats) / math.log(2), bytes_, tuple(contexts)),
            ],
            {"know byte_perplexity": 3.0},
            [Request("say", "generate_until", (c, asked), text) for c, text in zip(contexts, texts, strict=True)]
            + [Request("know", "loglikelihood_rolling", (c,), n) for c, n in zip(contexts, nats, strict=True)],
        )

    script = import_module("evaluate")
    monkeypatch.setattr(script, "run_tasks", run_tasks)
    monkeypatch.setattr(script, "require_harness", lambda: None)
    monkeypatch.setattr(script, "harness_model", lambda llm: llm)
    monkeypatch.setattr(script.Tasks, "manager", lambda self: None)


def written(directory: Path) -> tuple[dict[str, Any], str]:
    return json.loads((directory / "result.json").read_text()), (directory / "report.html").read_text()


def test_variants_are_as_accurate(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_harness: None
) -> None:
    engines(monkeypatch)
    code, out, err = call("evaluate", *flags, "--variant", "-tp 2")
    assert (code, err) == (0, "") and "passed  -tp 2: as accurate as the baseline: nothing lost" in out
    result, page = written(tmp_path)
    figures = {f["name"]: f for f in result["figures"]}
    assert figures["baseline: say exact_match"]["value"] == figures["-tp 2: say exact_match"]["value"] == 1
    assert figures["-tp 2: answers other than direct scoring's"]["value"] == 0
    assert not any(f["simulated"] for f in result["figures"]) and "class='failed'" not in page
    assert result["mesh"]["tp"] == 2 and len(result["samples"]["-tp 2"]["answers"]) == 72
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}{dark}.png" for name in ("accuracy", "difference", "text") for dark in ("", "-dark")
    }


def test_a_variant_with_a_wrong_weight_is_found(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_harness: None
) -> None:
    engines(monkeypatch, None, WRONG)
    code, _, err = call("evaluate", *flags, "--variant", "-tp 2")
    assert code == 1 and "FAILED: -tp 2: as accurate as the baseline: say exact_match: -" in err
    assert "FAILED: -tp 2: likelihoods are those of direct scoring: 3 of 3 wrong" in err
    page = written(tmp_path)[1]
    assert "<tr class='failed'><td>-tp 2: say exact_match" in page
    assert "<tr class='failed'><td>baseline: " not in page
    engines(monkeypatch, None, WRONG)
    assert call("evaluate", *flags, "--variant", "-tp 2", "--most-lost", "5", "--direct", "0")[0] == 0


def test_a_baseline_with_a_wrong_weight_is_found(
    call: Call, flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_harness: None
) -> None:
    engines(monkeypatch, WRONG)
    code, _, err = call("evaluate", *flags)
    assert code == 1 and err.startswith("FAILED: baseline: likelihoods are those of direct scoring: ")
    page = written(tmp_path)[1]
    assert "<tr class='failed'><td>baseline: largest error against direct scoring" in page
    assert "<tr class='failed'><td>baseline: say" not in page


def test_bad_input(call: Call, flags: list[str | Path], monkeypatch: pytest.MonkeyPatch, without_harness: None) -> None:
    code, _, err = call("evaluate", *flags, "--variant", "--dtype float33")
    assert code == 2 and len(err.splitlines()) == 1 and "float33" in err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = call("evaluate", *flags)
    assert (code, err) == (2, "error: accuracy needs the lm-evaluation-harness: pip install 'jaxserve[eval]'\n")


# -- the harness itself ------------------------------------------------------------------------------------------------

DEMO_LIMITS = (
    *("--compilation-cache-dir", "none", "--max-model-len", "512", "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "300"),
)
DEMO_FEW: dict[str, Any] = {"token_buckets": (128,), "decode_buckets": (8,)}
DEMO_OPTIONS: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 300,
    **DEMO_FEW,
}


@pytest.fixture
def demo_llm(shared_llms: dict[Any, LLM]) -> LLM:
    pytest.importorskip("lm_eval")
    key = "demo of the harness"
    if key not in shared_llms:
        shared_llms[key] = LLM("demo", dtype="float32", use_tqdm_on_load=False, **DEMO_OPTIONS)
    return shared_llms[key]


@pytest.mark.slow
def test_the_harness_gives_the_numbers_of_direct_scoring(demo_llm: LLM) -> None:
    """Every request of every kind of task, and what the harness makes of the answers."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from jaxserve.evaluation.lm_eval_model import JaxserveLM

    names = ["demo_add", "demo_choice", "json_validity", "project_text"]
    manager = TaskManager(include_path=str(DIRECTORY), include_defaults=False)
    found = simple_evaluate(JaxserveLM(demo_llm), tasks=names, limit=6, task_manager=manager, bootstrap_iters=10)
    direct = direct_of(demo_llm)
    values: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        for case in sorted(found["samples"][name], key=lambda s: s["doc_id"]):
            doc, asked, answers = case["doc"], case["arguments"], [answers[0] for answers in case["resps"]]
            if name == "project_text":
                exact = direct.rolling(doc["text"])
                assert answers[0] == pytest.approx(exact.total, abs=LOGPROB_FLOOR * len(exact.logprobs))
                values[name].append((exact.total, len(doc["text"].encode())))
            elif name == "demo_choice":
                exact = [direct.pair(f"Q: {doc['question']}\nA:", f" {choice}") for choice in doc["choices"]]
                assert [nats for nats, _ in answers] == pytest.approx([e.total for e in exact], abs=1e-3)
                assert [greedy for _, greedy in answers] == [e.greedy for e in exact]
                values[name].append(int(np.argmax([e.total for e in exact])) == doc["label"])
            else:
                answer = direct.answer(asked[0][0], ["\n", "<|end|>"], 64)
                assert answer == answers[0]
                values[name].append(answer.strip() == doc["answer"])
    results = found["results"]
    assert results["demo_add"]["exact_match,none"] == pytest.approx(np.mean(values["demo_add"]))
    assert results["demo_choice"]["acc,none"] == pytest.approx(np.mean(values["demo_choice"]))
    stderr = shares([float(v) for v in values["demo_add"]]).stderr
    assert results["demo_add"]["exact_match_stderr,none"] == pytest.approx(stderr)
    nats, count = (sum(column) for column in zip(*values["project_text"], strict=True))
    assert results["project_text"]["bits_per_byte,none"] == pytest.approx(-nats / count / math.log(2), rel=1e-5)


@pytest.mark.slow
def test_chat_templates_and_first_tokens(demo_llm: LLM) -> None:
    from jaxserve.evaluation.lm_eval_model import JaxserveLM

    model = JaxserveLM(demo_llm)
    text = model.apply_chat_template([{"role": "user", "content": "1 + 1?"}])
    assert text == "<|user|>1 + 1?<|end|><|assistant|>" and model.tokenizer_name
    assert model.prefix_token_id == demo_llm.get_tokenizer().eos_token_id
    assert JaxserveLM(demo_llm, prefix_token_id=0).prefix_token_id == 0
    asked = [SimpleNamespace(args=("", " 12")), SimpleNamespace(args=("Q: 1 + 1?\nA: ", "2"))]
    (empty, _), (blank, _) = model.loglikelihood(asked, disable_tqdm=True)
    direct = direct_of(demo_llm)
    assert [empty, blank] == pytest.approx(
        [direct.pair("", " 12").total, direct.pair("Q: 1 + 1?\nA: ", "2").total], abs=1e-3
    )
    assert model.num_cut == 0
    long = SimpleNamespace(args=("hello " * 600, {"max_gen_toks": 4, "until": []}))
    (text,) = model.generate_until([long])
    assert model.num_cut == 1 and isinstance(text, str)
    with pytest.raises(ValueError, match="600 tokens of answer leave no room"):
        model.generate_until([SimpleNamespace(args=("x", {"max_gen_toks": 600}))])
    cases: tuple[dict[str, Any], ...] = (
        {"batch_size": 8},
        {"max_batch_size": 8},
        {"device": "cuda"},
        {"dtype": "float32"},
    )
    for refused in cases:
        with pytest.raises(ValueError, match=next(iter(refused))):
            JaxserveLM(demo_llm, **refused)


@pytest.mark.slow
def test_the_script_with_the_harness(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice from a cache; then with a wrong weight."""
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(globals(), "FEW", DEMO_FEW)
    arguments = [*DEMO_LIMITS, "--out", tmp_path, "--limit", "40", "--task", "demo_add", "--task", "project_text"]
    cached = [*arguments, "--json", "--cache", tmp_path / "cache"]
    engines(monkeypatch)
    code, out, err = call("evaluate", *cached)
    assert (code, err) == (0, "")
    engines(monkeypatch, WRONG)  # which nobody asks: the answers are there
    code, again, _ = call("evaluate", *cached, "--direct", "1")
    assert code == 0 and json.loads(again)["samples"] == json.loads(out)["samples"]
    engines(monkeypatch, None, partial(scale_weight, name="layers.1.mlp.down", factor=4.0))
    code, _, err = call("evaluate", *arguments, "--variant", "-tp 2")
    assert code == 1 and "FAILED: -tp 2: as accurate as the baseline: demo_add exact_match: -" in err
    assert "FAILED: -tp 2: likelihoods are those of direct scoring: " in err and "baseline: l" not in err
    assert "<tr class='failed'><td>-tp 2: demo_add exact_match" in written(tmp_path)[1]
    code, _, err = call("evaluate", *arguments, "--task", "no_such_task")
    assert code == 2 and err.startswith("error: --task no_such_task: ")


@pytest.mark.slow
def test_the_command_of_the_harness_knows_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    from jaxserve.evaluation.lm_eval import main

    arguments = ["--model", "jaxserve", "--model_args", "pretrained=demo,tensor_parallel=2", "--tasks", "demo_add"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: unknown argument 'tensor_parallel'; known: ")
