"""bench: what it measures of a tiny model, what it reads, and what it says about bad input."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from command_line import Run

from jaxserve import LLM
from jaxserve.cli.options import EngineFlags
from jaxserve.commands.bench.options import DatasetFlags, PaceFlags, parse_range
from jaxserve.evaluation import bandwidth, clients
from jaxserve.evaluation.clients import Answer, Load
from jaxserve.evaluation.datasets import Workload, prefix_workload, random_workload, sharegpt_workload, trace_workload
from jaxserve.evaluation.serving import Pace, goodput, latency_statistics, parse_targets
from jaxserve.evaluation.startup import PHASES
from jaxserve.evaluation.sweep import each, parameters, settings
from jaxserve.evaluation.traces import Arrival, write_trace

FEW = ["--num-prompts", "6", "--input-len", "3-20", "--output-len", "2-9"]


@pytest.fixture
def tiny(made: list[dict[str, Any]], tiny_model: Path) -> list[str | Path]:
    """The engine of the tests, whatever is asked for."""
    return ["--model", tiny_model, "--max-model-len", "128"]


# -- throughput: all at once -------------------------------------------------------------------------------------------


def test_throughput(run: Run, made: list[dict[str, Any]], tiny: list[str | Path]) -> None:
    options = [*tiny, "--num-prompts", "6", "--input-len", "3-40", "--output-len", "2-9"]
    report = json.loads(run("bench", "throughput", *options, "--repeats", "2", "--json").out)
    assert len(report["runs"]) == 2
    assert report["preemptions"] == 0
    assert 0 < report["host_share"] < 1
    assert 0 < report["padding_share"] < 1
    assert report["output_tokens_per_second"] > 0
    assert report["programs"] > 0 and not report["simulated"]
    assert made[0]["skip_tokenizer_init"]
    text = run("bench", "throughput", *options, "--repeats", "1").out
    assert "6 requests" in text
    assert "tok/s" in text


def test_common_beginnings_are_computed_once(run: Run, tiny: list[str | Path]) -> None:
    options = ["--dataset", "prefix", "--num-prefixes", "2", "--prefix-len", "40", "--input-len", "4"]
    report = json.loads(
        run("bench", "throughput", *tiny, *options, "--num-prompts", "8", "--output-len", "2", "--json").out
    )
    assert report["prompt_tokens"] == 8 * 44 and report["workload"]["num_prefixes"] == 2
    assert 0.2 < report["prefix_hit_share"] <= 6 * 40 / (8 * 44)


# -- throughput: over time ---------------------------------------------------------------------------------------------


def test_requests_over_time(run: Run, tiny: list[str | Path]) -> None:
    options = [*tiny, *FEW, "--request-rate", "200", "--goodput", "ttft:60000,tpot:60000"]
    report = json.loads(run("bench", "throughput", *options, "--json").out)
    (load,) = report["runs"]
    due = [answer["due"] for answer in load["answers"]]
    assert due == sorted(due) and 0 < due[0] < due[-1]
    assert sum(len(answer["tokens"]) for answer in load["answers"]) == report["output_tokens"]
    assert set(report["latency_seconds"]) == {"ttft", "tpot", "itl", "e2el"}
    seen = report["latency_seconds"]["e2el"]
    assert 0 < seen["median"] <= seen["p90"] <= seen["p99"]
    assert report["goodput"]["share"] == 1
    assert report["goodput"]["per_second"] == pytest.approx(report["requests_per_second"])
    text = run("bench", "throughput", *options).out
    for shown in ("arrivals poisson:200", "first token (TTFT)", "100.0% of the requests", "TTFT ≤ 60000 ms"):
        assert shown in " ".join(text.split())


def test_late_answers_turn_goodput_red(
    run: Run, tiny: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that stalls once, for two of the six requests."""
    options = [*tiny, *FEW, "--arrivals", "all", "--goodput", "ttft:30000", "--least-goodput", "0.9"]
    assert run("bench", "throughput", *options, "--out", tmp_path).code == 0
    assert "class='failed'" not in (tmp_path / "report.html").read_text()
    ask = clients._ask

    async def stalled(llm: Any, index: int, *rest: Any) -> Answer:
        answer = await ask(llm, index, *rest)
        late = 60.0 if index < 2 else 0.0
        return Answer(index, answer.due, [t + late for t in answer.times], answer.tokens)

    monkeypatch.setattr(clients, "_ask", stalled)
    result = run("bench", "throughput", *options, "--out", tmp_path)
    assert result.code == 1
    assert result.err.startswith("FAILED: requests: enough requests meet their targets: 66.7% met TTFT ≤ 30000 ms")
    page = (tmp_path / "report.html").read_text()
    assert "<tr class='failed'><td>requests: goodput" in page and "<p class='failed'>" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"latency.png", "latency-dark.png"}


def test_most_requests_under_way(run: Run, tiny: list[str | Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ask, now, most = clients._ask, 0, 0

    async def counted(*arguments: Any) -> Answer:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        answer = await ask(*arguments)
        now -= 1
        return answer

    monkeypatch.setattr(clients, "_ask", counted)
    for pace in (["--max-concurrency", "2"], ["--max-concurrency", "2", "--arrivals", "burst:3@0.001"]):
        most = 0
        report = json.loads(run("bench", "throughput", *tiny, *FEW, *pace, "--json").out)
        assert most == 2 and len(report["runs"][0]["answers"]) == 6
        waited = [answer["due"] for answer in report["runs"][0]["answers"]]
        # Without arrival times, a request is due when it has a place; else when it arrives, place or not.
        assert (waited == pytest.approx([0, 0, 0, 0.001, 0.001, 0.001])) == (len(pace) > 2)


def test_a_trace_comes_when_it_came(run: Run, tiny: list[str | Path], tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    write_trace([Arrival(0.002 * i, 5 + i, 1 + i, tenant="ab"[i % 2]) for i in range(5)], path)
    options = [*tiny, "--dataset", "trace", "--dataset-path", path, "--json"]
    report = json.loads(run("bench", "throughput", *options).out)
    answers = report["runs"][0]["answers"]
    assert [a["due"] for a in answers] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008])
    assert [len(a["tokens"]) for a in answers] == [1, 2, 3, 4, 5]
    report = json.loads(run("bench", "throughput", *options, "--num-prompts", "3", "--request-rate", "inf").out)
    assert [a["due"] for a in report["runs"][0]["answers"]] == [0, 0, 0]


def test_goodput_counts_requests_that_meet_every_target() -> None:
    answers = [
        Answer(0, 0.0, [0.1, 0.2, 0.3], [1, 2, 3]),
        Answer(1, 1.0, [1.3, 1.4], [1, 2]),  # its first token is late
        Answer(2, 1.0, [1.1, 1.9], [1, 2]),  # its tokens are slow
        Answer(3, 2.0, [2.2], [1]),  # one token: no time per token
    ]
    loads = [Load(4.0, answers)]
    targets = parse_targets(["ttft:200.5 tpot:150", "e2el:5000"])
    assert targets == pytest.approx({"ttft": 0.2005, "tpot": 0.15, "e2el": 5.0})
    found = goodput(loads, targets)
    assert (found.share, found.per_second) == (0.5, 0.5)
    seen = latency_statistics(loads)
    assert seen["tpot"]["mean"] == pytest.approx((0.1 + 0.1 + 0.8) / 3)
    assert seen["ttft"]["median"] == pytest.approx(0.15 + 0.0, abs=0.051)
    assert "itl" not in latency_statistics([Load(1.0, answers[3:])])


def test_when_requests_come() -> None:
    work = random_workload(4, (3, 3), (2, 2), 50, 0)
    trace = Workload(work.calls, [0.0, 1.0, 2.0, 3.0])
    assert Pace.of(None, None, None).times(trace, 0) == trace.arrivals
    assert Pace.of(None, None, 2).times(trace, 0) == trace.arrivals
    assert Pace.of("inf", None, None).times(trace, 0) == [0, 0, 0, 0] == Pace.of(None, None, None).times(work, 0)
    assert Pace.of("inf", None, 2).times(trace, 0) is None is Pace.of(None, None, 2).times(work, 0)
    drawn = Pace.of("0.00001", None, None).times(work, 0)
    assert drawn is not None and drawn[-1] > 1000 and drawn == Pace.of("1e-5", None, None).times(work, 0)
    assert drawn != Pace.of("1e-5", None, None).times(work, 1)


# -- datasets ----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token per letter."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [7] * add_special_tokens * bool(text) + [ord(letter) for letter in text]


def turns(*values: str) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": v} for who, v in zip(["human", "gpt"] * 9, values, strict=False)]}


@pytest.mark.parametrize("form", ["array", "lines"])
def test_sharegpt(form: str, tmp_path: Path) -> None:
    path = tmp_path / "conversations"
    entries = [
        turns("ab", "xyz", "more"),
        turns("only"),
        turns(),
        turns("abc", ""),
        turns("a" * 40, "b"),
        turns("q", "r"),
    ]
    lines = "\n\n".join(map(json.dumps, entries))
    path.write_text(json.dumps(entries) if form == "array" else lines)
    work = sharegpt_workload(path, None, None, Letters(), 30, 0)
    assert [(len(c.prompt), c.num_tokens) for c in work.calls] == [(3, 3), (2, 1)] and work.left_out == 4
    fixed = sharegpt_workload(path, None, 5, Letters(), 30, 0)
    assert [(len(c.prompt), c.num_tokens) for c in fixed.calls] == [(3, 5), (5, 5), (4, 5), (2, 5)]
    assert len(sharegpt_workload(path, 1, None, Letters(), 30, 0).calls) == 1
    with pytest.raises(ValueError, match="3 requests are asked for, it has 2"):
        sharegpt_workload(path, 3, None, Letters(), 30, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"conversations": []}\n\n{oops', "line 3: not JSON"),
        ('{"conversations": []}\n{"conversation": []}', "line 2: it is no conversation"),
        ('{"conversations": [{"from": "human"}]}', "line 1: it is no conversation"),
        ('[{"conversations": []}, 3]', "entry 2: it is no conversation"),
        ('[\n{"conversations": []},\n]', "line 3: not JSON"),
        ("", "there is no conversation in it"),
        ('{"conversations": []}', "none of its 1 conversations"),
    ],
)
def test_wrong_conversations(text: str, said: str, run: Run, tiny: list[str | Path], tmp_path: Path) -> None:
    path = tmp_path / "conversations.jsonl"
    path.write_text(text)
    result = run("bench", "throughput", *tiny, "--dataset", "sharegpt", "--dataset-path", path)
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert result.err.startswith(f"error: {path}") and said in result.err


def test_prompts_that_begin_alike(tmp_path: Path) -> None:
    work = prefix_workload(7, 3, 10, (2, 4), (1, 5), 50, 0)
    beginnings = [tuple(call.prompt[:10]) for call in work.calls]
    assert beginnings[0] == beginnings[3] == beginnings[6] != beginnings[1] and len(set(beginnings)) == 3
    assert {len(call.prompt) for call in work.calls} <= {12, 13, 14}
    path = tmp_path / "t.jsonl"
    write_trace([Arrival(i, 9, 2, prefix="x", prefix_tokens=6, priority=i) for i in range(2)], path)
    first, second = trace_workload(path, None, 50, 0).calls
    assert first.prompt[:6] == second.prompt[:6] and first.prompt[6:] != second.prompt[6:] and max(first.prompt) < 50
    assert (first.priority, second.priority) == (0, 1)


# -- latency, startup --------------------------------------------------------------------------------------------------


def test_latency_and_its_floor(
    run: Run, tiny: list[str | Path], tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "read_bandwidth", lambda device: 1e9)
    options = [*tiny, "--input-len", "8", "--output-len", "5", "--repeats", "2"]
    report = json.loads(run("bench", "latency", *options, "--json").out)
    arrays = {x.shape: x.nbytes for x in jax.tree.leaves(tiny_llm.engine.runner.params)}
    total = sum(x.nbytes for x in jax.tree.leaves(tiny_llm.engine.runner.params))
    embedding = (tiny_llm.engine.runner.decoder.vocab_size, 64)
    assert report["weight_bytes_read"] == total - arrays[embedding]
    assert report["floor_seconds"] == report["weight_bytes_read"] / 1e9
    assert 0 < report["token_seconds_median"] <= report["token_seconds_p90"]
    assert len(report["ttft"]) == 2
    text = run("bench", "latency", *options, "--out", tmp_path).out
    assert "× the floor" in text and f"report: {tmp_path}" in text
    figures = {f["name"]: f for f in json.loads((tmp_path / "result.json").read_text())["figures"]}
    assert len(figures["between tokens, median"]["samples"]) == 2 and figures["first token, p90"]["unit"] == "s"


def test_read_bandwidth_is_measured() -> None:
    assert bandwidth.read_bandwidth(jax.devices()[0], 1 << 22) > 1e8


def test_startup(run: Run, odd_model: Path) -> None:
    """Two real processes: the second one finds the programs of the first."""
    limits = ["--max-num-seqs", "1", "--max-num-batched-tokens", "8", "--max-model-len", "32"]
    begun = time.perf_counter()
    result = run(
        "bench", "startup", "--model", odd_model, "--skip-tokenizer-init", *limits, "--input-len", "3", "--json"
    )
    seconds = time.perf_counter() - begun
    assert result.code == 0, result.err
    report = json.loads(result.out)
    for kind in ("cold", "warm"):
        assert set(report[kind]) == {*PHASES, "total"} and all(report[kind][phase] > 0 for phase in PHASES)
        assert report[kind]["total"] == pytest.approx(sum(report[kind][phase] for phase in PHASES))
    assert report["cold"]["total"] + report["warm"]["total"] < seconds
    assert report["warm"]["compile"] < report["cold"]["compile"] and report["programs"] > 3


def test_startup_says_why_a_process_failed(run: Run, odd_model: Path) -> None:
    result = run("bench", "startup", "--model", odd_model, "--input-len", "3")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "the process that was to start failed" in result.err and "no tokenizer in" in result.err


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_a_table(run: Run, made: list[dict[str, Any]], tiny: list[str | Path], tmp_path: Path) -> None:
    sweep = ["--sweep", "enable_prefix_caching=true,false", "--sweep", "num-prompts=2,4"]
    options = [*tiny, "--input-len", "5", "--output-len", "3", "--repeats", "1", *sweep]
    result = run("bench", "throughput", *options, "--out", tmp_path)
    assert (result.code, result.err) == (0, "") and "4 settings" in result.out
    assert [options["enable_prefix_caching"] for options in made] == [True, False]  # one engine for both num_prompts
    written = json.loads((tmp_path / "result.json").read_text())
    assert "enable_prefix_caching=false, num_prompts=4: output throughput" in [f["name"] for f in written["figures"]]
    assert (tmp_path / "throughput.png").exists()
    cases = json.loads(run("bench", "throughput", *options, "--json").out)["cases"]
    texts = [(case["setting"]["enable_prefix_caching"], case["setting"]["num_prompts"]) for case in cases]
    assert texts == [("true", "2"), ("true", "4"), ("false", "2"), ("false", "4")]
    assert [case["output_tokens"] for case in cases] == [6, 12, 6, 12]


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (ValueError("no room"), 2)])
def test_what_was_measured_before_the_end_is_kept(
    stop: BaseException,
    code: int,
    run: Run,
    tiny: list[str | Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import jaxserve.evaluation.offline as offline

    real: Callable[..., Any] = offline.throughput_runs

    def ends(llm: LLM, workload: Workload, repeats: int) -> Any:
        if len(workload.calls) == 3:
            raise stop
        return real(llm, workload, repeats)

    monkeypatch.setattr(offline, "throughput_runs", ends)
    options = [*tiny, "--input-len", "5", "--output-len", "3", "--repeats", "1", "--sweep", "num_prompts=2,3,4"]
    result = run("bench", "throughput", *options, "--out", tmp_path)
    last = "interrupted" if code == 130 else "error: no room"
    assert result.code == code and result.err.splitlines() == ["ended in num_prompts=3, after 1 of 3 settings", last]
    samples = json.loads((tmp_path / "result.json").read_text())["samples"]["cases"]
    assert [case["setting"] for case in samples] == [{"num_prompts": "2"}]
    assert "2 requests, 10 prompt tokens" in result.out


def test_parameters_have_the_names_of_the_command_line_and_of_llm() -> None:
    groups = {"engine": EngineFlags(), "data": DatasetFlags(), "pace": PaceFlags()}
    known = parameters(groups)
    for name in ("max_num_seqs", "tp", "tensor_parallel_size", "enable_prefix_caching", "random_input_len", "goodput"):
        assert name in known
    found = settings(["tp=1,2", "mesh=none;dp=2,tp=1"], groups)
    assert [(s.groups["engine"].tensor_parallel_size, s.groups["engine"].mesh) for s in found] == [
        (1, None),
        (1, "dp=2,tp=1"),
        (2, None),
        (2, "dp=2,tp=1"),
    ]
    (off,) = settings(["enable-prefix-caching=false"], groups)
    assert off.groups["engine"].no_enable_prefix_caching and off.name == "enable_prefix_caching=false"
    (swap,) = settings(["swap_space=0.5"], groups)
    assert swap.groups["engine"].swap_space == 0.5
    (late,) = settings(["goodput=ttft:5"], groups)
    assert late.groups["pace"].goodput == ["ttft:5"]
    assert [s.texts for s in settings([], groups)] == [{}]


def test_each_goes_as_far_as_it_goes() -> None:
    cases = settings(["num_prompts=1,2,3"], {"data": DatasetFlags()})
    done = each(cases, lambda case: 6 // (2 - case.groups["data"].num_prompts))
    assert done.done == [6] and isinstance(done.stopped, ZeroDivisionError)
    assert done.where == "ended in num_prompts=2, after 1 of 3 settings"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "mnist"], "--dataset mnist: it is one of random, sharegpt, trace, prefix"),
        (["--dataset", "sharegpt"], "--dataset sharegpt: --dataset-path FILE says where it is"),
        (["--dataset", "trace", "--dataset-path", "no/such/file"], "no/such/file: No such file"),
        (["--dataset-path", "x"], "--dataset-path x: --dataset random has no such thing"),
        (["--prefix-len", "3"], "--prefix-len 3: --dataset random has no such thing"),
        (["--dataset", "trace", "--dataset-path", "x", "--input-len", "3"], "--input-len 3: --dataset trace has no"),
        (["--dataset", "sharegpt", "--dataset-path", "x", "--output-len", "3-4"], "--output-len '3-4': it is a number"),
        (["--input-len", "120", "--output-len", "20"], "up to 140 tokens, the longest sequence is 128 tokens"),
        (["--request-rate", "0"], "--request-rate 0: it is requests per second, above 0"),
        (["--request-rate", "often"], "--request-rate often"),
        (["--request-rate", "3", "--arrivals", "all"], "both say when requests come"),
        (["--arrivals", "poisson:-1"], "--arrivals poisson:-1: it is poisson:RATE"),
        (["--goodput", "itl:3"], "--goodput 'itl:3': it is one or several of ttft:MS, tpot:MS, e2el:MS"),
        (["--goodput", "ttft:0"], "--goodput 'ttft:0'"),
        (["--least-goodput", "0.5"], "--least-goodput 0.5: --goodput says of what"),
        (["--sweep", "speed=1,2"], "'speed' is no parameter; there are arrivals, async_scheduling, "),
        (["--sweep", "num_prompts=1,x"], "--sweep num_prompts=x: it is a whole number or none"),
        (["--sweep", "num_prompts=0"], "--sweep num_prompts=0: it is at least 1"),
        (["--sweep", "num_prompts="], "--sweep num_prompts=: it is NAME=VALUE"),
        (["--sweep", "num_prompts=1,1"], "each value once"),
        (["--sweep", "enable_prefix_caching=1"], "enable_prefix_caching=1: it is true or false"),
        (["--sweep", "num_prompts=1", "--sweep", "num_prompts=2"], "each parameter can be swept once"),
        (["--sweep", "input_len=3,400"], "error: input_len=400: input and output are up to 464 tokens"),
        (["--input-len", "9", "--sweep", "request_rate=3,none"], "over time in all of its settings or in none"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(
    flags: Sequence[str], said: str, run: Run, made: list[dict[str, Any]], tiny: list[str | Path]
) -> None:
    result = run("bench", "throughput", *tiny, *flags)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert said in result.err and not made


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compilation-cache-dir", "x"], "startup measures with a cache of its own"),
        (["--num-processes", "2", "--process-id", "0", "--coordinator", "x:1"], "several processes"),
        (["--input-len", "300"], "up to 301 tokens"),
    ],
)
def test_startup_refuses(flags: Sequence[str], said: str, run: Run, odd_model: Path) -> None:
    result = run("bench", "startup", "--model", odd_model, *flags)
    assert (result.code, len(result.err.splitlines())) == (2, 1) and said in result.err


def test_ranges() -> None:
    assert parse_range("--input-len", "128") == (128, 128)
    assert parse_range("--input-len", "1-2") == (1, 2)
    for wrong in ("", "0", "-3", "3-", "a", "5-4"):
        with pytest.raises(ValueError, match="--input-len"):
            parse_range("--input-len", wrong)
