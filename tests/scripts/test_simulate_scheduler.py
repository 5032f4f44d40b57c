"""The simulator serves everybody, the same way each time, and finds the step times that it was given."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_engine
from recorded_runs import Call, Recorded
from schedule_log import RunLog, WatchedScheduler, recorded_run
from schedule_report import Timeline, largest_gap, latencies, percentiles, summary
from simulate_scheduler import add_trace_arguments, trace_shape
from simulated_engine import Setting, StepTime, fit_log, fit_step_time, settings_of, simulate

from jaxserve.config import SchedulerConfig
from jaxserve.evaluation.traces import Arrival, arrival_times, lengths, read_trace, write_trace
from jaxserve.recording import RecordedScheduler, Recording
from jaxserve.request import Status

TIMES = StepTime(2e-3, 3e-5, 4e-7)
FAST = ["--step-time", "2e-3,3e-5,4e-7", "--requests", "60", "--prompt-len", "uniform:5-60", "--output-len", "fixed:12"]


def trace(*flags: str) -> list[Arrival]:
    parser = argparse.ArgumentParser()
    add_trace_arguments(parser)
    default = ["--requests", "150", "--prompt-len", "lognormal:40,0.7", "--output-len", "uniform:1-40"]
    return trace_shape(parser.parse_args([*default, "--longest", "150", "--arrivals", "poisson:40", *flags])).draw()


def setting(step_time: StepTime = TIMES, host_time: float = 0.0, **texts: str) -> Setting:
    config = SchedulerConfig(max_model_len=200, max_num_seqs=16, max_num_batched_tokens=96, block_size=8, num_blocks=90)
    return settings_of(Setting(config, True, step_time, host_time), texts, {})


def digest(log: RunLog) -> Any:
    return log.steps, list(log.ends), list(log.gaps), log.service


SETTINGS: list[dict[str, str]] = [
    {},
    {"async_scheduling": "no"},
    {"policy": "fair", "fairness": '{"tenants": {"a": {"weight": 3}}}'},
    {"policy": "priority", "num_blocks": "60"},
    {"num_blocks": "60", "swap_space": "1", "preemption_mode": "swap"},
    {"num_scheduler_steps": "4", "enable_prefix_caching": "no"},
    {"num_replicas": "2", "num_blocks": "40"},
    {"long_prefill_token_threshold": "16", "max_num_partial_prefills": "2", "block_size": "4"},
]


@pytest.mark.parametrize("texts", SETTINGS, ids=lambda texts: ",".join(texts) or "default")
def test_nobody_and_nothing_is_lost(texts: dict[str, str]) -> None:
    arrivals = trace("--tenants", "a=1,b=3", "--priorities", "0=5,3=1", "--shared-prefix", "24:0.5")
    log = simulate(arrivals, setting(TIMES, 0.0, **texts))
    asked = {str(i): a.output_tokens for i, a in enumerate(arrivals) if a.prompt_tokens < 200}
    assert {r.request.request_id for r in log.requests} == set(asked)
    for r in log.requests:
        assert r.request.status is Status.FINISHED
        room = 200 - r.request.num_prompt_tokens
        assert len(r.request.output_token_ids) == min(room, asked[r.request.request_id])
        assert r.first_scheduled is not None and r.first_token is not None and r.finished is not None
        assert r.arrival <= r.first_scheduled < r.first_token <= r.finished == r.last_token
    result = summary(log)
    outputs = sum(len(r.request.output_token_ids) for r in log.requests)
    assert result["requests"]["finished"] + result["requests"]["refused"] == 150
    assert result["tokens"]["output"] == outputs == len(log.gaps) + len(log.requests)
    computed = sum(s.prefill + s.decode - s.again for s in log.steps)
    assert computed == sum(r.charged for r in log.requests) - log.prefix_hits
    assert sum(t["output_tokens"] for t in result["tenants"].values()) == outputs
    assert np.isfinite(log.seconds).all()


def test_the_same_each_time() -> None:
    assert digest(simulate(trace(), setting())) == digest(simulate(trace(), setting()))
    assert trace() == trace() != trace("--seed", "1")
    other = trace("--output-len", "fixed:3")
    assert [(a.arrival, a.prompt_tokens) for a in other] == [(a.arrival, a.prompt_tokens) for a in trace()]


def test_steps_take_as_long_as_they_should() -> None:
    times = StepTime(2e-3, 3e-5, 4e-7, 1e-5)
    for is_async in ("yes", "no"):
        log = simulate(trace(), setting(times, async_scheduling=is_async))
        wanted = [times.seconds(s.num_steps, s.rows, s.kv_read, s.moved) for s in log.steps]
        np.testing.assert_allclose(log.seconds, wanted, rtol=1e-6)


def test_overlap_hides_the_host() -> None:
    arrivals = trace("--arrivals", "all")
    seconds = {
        (is_async, host): summary(simulate(arrivals, setting(host_time=host, async_scheduling=is_async)))["seconds"]
        for is_async in ("yes", "no")
        for host in (0.0, 1e-3)
    }
    assert seconds["no", 1e-3] > 1.2 * seconds["no", 0.0]
    assert seconds["yes", 1e-3] < 1.02 * seconds["yes", 0.0]


def test_rate_caps_leave_gaps() -> None:
    config = setting(policy="fair").config
    capped = settings_of(Setting(config, True, TIMES), {"policy": "fair"}, {"": 500.0})
    log = simulate(trace("--arrivals", "all", "--requests", "10"), capped)
    computed = sum(r.charged for r in log.requests)
    assert summary(log)["seconds"] > (computed - 500 - 96) / 500


def test_who_cannot_be_served() -> None:
    arrivals = [Arrival(0, 300, 5), *[Arrival(0.0, 10, 5)] * 12]
    log = simulate(arrivals, setting(max_num_queued_requests="8"))
    assert summary(log)["requests"] == {
        "arrived": 13,
        "finished": 8,
        "aborted": 0,
        "unfinished": 0,
        "rejected": 4,
        "refused": 1,
    }
    assert log.refusal is not None and "300 tokens" in log.refusal


# -- fits --------------------------------------------------------------------------------------------------------------


class RecordedAndWatched(WatchedScheduler, RecordedScheduler):
    """Keeps both a log and a recording."""

    path: Path

    def __init__(self, config: SchedulerConfig) -> None:
        RecordedScheduler.__init__(self, config, self.path)
        self.log = RunLog(config)


@pytest.fixture
def recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulations leave a recording here."""
    RecordedAndWatched.path = tmp_path / "simulated.rec"
    monkeypatch.setattr(simulated_engine, "WatchedScheduler", RecordedAndWatched)
    return RecordedAndWatched.path


@pytest.mark.parametrize("is_async", ["yes", "no"])
@pytest.mark.parametrize("arrivals", ["all", "poisson:3"])
def test_the_fit_finds_the_step_time(recorded_too: Path, arrivals: str, is_async: str) -> None:
    simulate(trace("--arrivals", arrivals), setting(async_scheduling=is_async))
    fit = fit_step_time(Recording(recorded_too))
    assert fit.step_time.d is None and not fit.moves and fit.steps > 100
    assert fit.median_error < 1e-3 and fit.r_squared > 0.999
    found = (fit.step_time.a, fit.step_time.b, fit.step_time.c)
    np.testing.assert_allclose(found, (TIMES.a, TIMES.b, TIMES.c), rtol=0.01)


def test_the_fit_leaves_hiccups_out() -> None:
    log = simulate(trace("--arrivals", "all"), setting())
    for step in (10, 40, 80):
        log.seconds[step] += 1.0
    fit = fit_log(log)
    assert fit.dropped == 3
    np.testing.assert_allclose(fit.step_time.b, TIMES.b, rtol=1e-3)


def test_moved_blocks_are_fitted_where_there_are_any() -> None:
    times = StepTime(2e-3, 3e-5, 4e-7, 5e-5)
    tight = setting(times, num_blocks="40", swap_space="1", preemption_mode="swap")
    log = simulate(trace("--arrivals", "all"), tight)
    assert log.swapped > 9
    assert fit_log(log).step_time.d == pytest.approx(5e-5, rel=1e-3)


def test_the_fit_is_never_negative() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.random((30, 4)), rng.normal(1, 1, 30)
        found = simulated_engine.non_negative_least_squares(x, y)
        assert (found >= 0).all()
        gradient = x.T @ (x @ found - y)
        assert (gradient > -1e-9).all() and np.allclose(gradient[found > 0], 0)


def test_a_recording_tells_what_the_simulation_saw(recorded_too: Path) -> None:
    log = simulate(trace("--arrivals", "all", "--tenants", "a=1,b=2"), setting())
    again, difference = recorded_run(Recording(recorded_too))
    assert difference is None
    assert again.service == log.service and again.waiting == log.waiting
    for name, values in latencies(log).items():
        np.testing.assert_allclose(np.sort(latencies(again)[name]), np.sort(values), atol=2e-3)
    assert summary(again)["batch"]["steps"] == len(log.steps)
    np.testing.assert_allclose(Timeline.of(again).start[:-1], Timeline.of(log).start[:-1], atol=3e-6)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    values = np.random.default_rng(3).exponential(size=501)
    found = percentiles(values)
    for p in (50, 90, 99):
        assert found[f"p{p}"] == np.percentile(values, p)
    assert (found["mean"], found["max"]) == (values.mean(), values.max())
    assert set(percentiles(np.zeros(0)).values()) == {None}
    whole = np.repeat([1.0, 5.0, 9.0], [49, 45, 6])
    weighted = percentiles(np.array([9.0, 1.0, 5.0]), np.array([6.0, 49.0, 45.0]))
    assert [weighted[name] for name in ("mean", "p50", "p90", "p99")] == [whole.mean(), 5.0, 5.0, 9.0]


def test_the_largest_gap() -> None:
    log = RunLog(setting(fairness='{"tenants": {"a": {"weight": 2}}}').config)
    both, one = frozenset("ab"), frozenset("a")
    log.service = [{"a": 10.0}, {"a": 4.0}, {"b": 6.0}, {"b": 100.0}, {"b": 1.0}, {"a": 2.0}]
    log.waiting = [both, both, both, one, both, both]
    assert largest_gap(log) == {"gap": 6.0, "tenants": ["a", "b"]}
    log.waiting = [one] * 6
    assert largest_gap(log) is None


def test_fair_is_fairer() -> None:
    arrivals = trace("--arrivals", "all", "--tenants", "a=1,b=4")
    gaps = [summary(simulate(arrivals, setting(policy=p)))["largest_service_gap"]["gap"] for p in ("fcfs", "fair")]
    assert gaps[1] < 0.5 * gaps[0]


# -- traces ------------------------------------------------------------------------------------------------------------


def test_a_trace_comes_back(tmp_path: Path) -> None:
    arrivals = trace("--tenants", "a=1,b=3", "--priorities", "0=5,3=1", "--shared-prefix", "24:0.5")
    write_trace(arrivals, tmp_path / "t.jsonl")
    assert read_trace(tmp_path / "t.jsonl") == arrivals
    assert {a.tenant for a in arrivals} == {"a", "b"} and {a.priority for a in arrivals} == {0, 3}
    assert len({a.prefix_tokens for a in arrivals}) == 2


def test_prefixes_are_shared() -> None:
    arrivals = [Arrival(0, 20, 1, prefix=p, prefix_tokens=8 if p else 0) for p in ("x", "x", "y", None)]
    first, second, other, none = (a.tokens(i, seed=0) for i, a in enumerate(arrivals))
    assert [len(t) for t in (first, second, other, none)] == [20] * 4
    assert first[:8] == second[:8] != other[:8] and first[8:] != second[8:] and none[:8] != first[:8]
    assert summary(simulate([Arrival(i, 40, 2, prefix="x", prefix_tokens=32) for i in range(5)], setting()))["cache"][
        "prefix_hit_rate"
    ] == pytest.approx(4 * 32 / (5 * 40))


def test_arrival_processes() -> None:
    rng = np.random.default_rng(0)
    assert arrival_times("burst:3@2")(rng, 7).tolist() == [0, 0, 0, 2, 2, 2, 4]
    assert arrival_times("uniform:4")(rng, 3).tolist() == [0, 0.25, 0.5]
    assert arrival_times("poisson:8")(rng, 4000)[-1] == pytest.approx(500, rel=0.1)
    assert np.median(lengths("lognormal:100,0.5", "")(rng, 4001)) == pytest.approx(100, rel=0.1)


# -- the command line --------------------------------------------------------------------------------------------------


def test_settings_side_by_side(call: Call, tmp_path: Path) -> None:
    plot, kept = tmp_path / "plot.png", tmp_path / "trace.jsonl"
    limits = ["--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
    flags = [*FAST, *limits, "--arrivals", "all", "--tenants", "a=1,b=3", "--plot", str(plot)]
    compared = ["--compare", "policy=fair", "--compare", "policy=priority, max_num_seqs=4"]
    code, out, err = call("simulate_scheduler", *flags, *compared, "--json", "-", "--write-trace", kept)
    assert (code, err) == (0, "")
    runs = json.loads(out)["runs"]
    assert list(runs) == ["base", "policy=fair", "policy=priority, max_num_seqs=4"]
    arrived = [(r["requests"]["arrived"], r["tokens"], _asked(r)) for r in runs.values()]
    assert arrived == arrived[:1] * 3
    assert runs["base"]["running"]["max"] == 8 and runs["policy=priority, max_num_seqs=4"]["running"]["max"] == 4
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000
    code, again, _ = call("simulate_scheduler", *_without_lengths(flags), "--trace", kept, "--json", "-")
    again = json.loads(again)["runs"]["base"]
    assert code == 0 and again | {"host_us_per_step": 0} == runs["base"] | {"host_us_per_step": 0}


def _asked(run: dict[str, Any]) -> list[Any]:
    return [(t["requests"], t["prompt_tokens"], t["output_tokens"]) for t in run["tenants"].values()]


def _without_lengths(flags: Sequence[str]) -> list[str]:
    return [*flags[:2], *flags[8:]]


def test_the_table(call: Call) -> None:
    code, out, _ = call("simulate_scheduler", *FAST, "--tenants", "a=1,b=3", "--compare", "policy=fair")
    assert code == 0
    for text in ("60 finished", "first token", "padding", "prefix cache hits", "largest gap of service", "policy=fair"):
        assert text in out


def test_fitted_to_a_recording(call: Call, recorded: Recorded) -> None:
    sizes = ["--requests", "30", "--prompt-len", "uniform:3-40", "--output-len", "fixed:8"]
    code, out, err = call("simulate_scheduler", "--fit", recorded.path, *sizes, "--json", "-")
    result = json.loads(out)
    assert code == 0 and err.startswith("fitted step time: ")
    assert result["fit"]["steps"] > 50 and result["runs"]["base"]["requests"]["finished"] == 30


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "one of the arguments --step-time --fit is required"),
        (["--step-time", "1,2"], "--step-time 1,2: it is A,B,C or A,B,C,D"),
        ([*FAST, "--arrivals", "often"], "--arrivals often: it is poisson:RATE"),
        ([*FAST, "--prompt-len", "fixed:0"], "--prompt-len fixed:0: it is fixed:N"),
        ([*FAST, "--shared-prefix", "9:2"], "--shared-prefix 9:2"),
        ([*FAST, "--tenants", "a"], "--tenants a: 'a' is not NAME=SHARE"),
        ([*FAST, "--priorities", "x=1"], "--priorities x=1"),
        ([*FAST, "--policy", "best"], "scheduling_policy='best'"),
        ([*FAST, "--fairness", '{"slack": 0}'], "slack=0"),
        ([*FAST, "--fairness", "no/such/file"], "no/such/file"),
        ([*FAST, "--max-num-seqs", "many"], "max_num_seqs=many: it is a number"),
        ([*FAST, "--max-num-seqs", "0"], "max_num_seqs=0"),
        ([*FAST, "--compare", "speed=9"], "'speed' is no setting; there are policy, "),
        ([*FAST, "--requests", "0"], "--requests 0: at least 1"),
        ([*FAST, "--trace", "no/such/file"], "no/such/file"),
        (["--fit", "no/such/file"], "no/such/file"),
        ([*FAST, "--preemption-mode", "swap"], "preemption_mode='swap' needs host memory"),
    ],
)
def test_errors_are_one_line(call: Call, flags: list[str], said: str) -> None:
    code, out, err = call("simulate_scheduler", *flags)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert said in err and err.startswith("simulate_scheduler.py: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ("[1]", "line 2: "),
        ('{"arrival": 1, "prompt_tokens": 0, "output_tokens": 1}', "line 2: prompt_tokens=0"),
        ('{"arrival": 1, "prompt_tokens": 1, "output_tokens": 1, "size": 3}', "'size' is not a field of a trace"),
        ('{"arrival": 1}', "line 2: missing 2 required"),
        ('{"arrival": -1, "prompt_tokens": 1, "output_tokens": 1}', "arrival=-1"),
        (
            '{"arrival": 1, "prompt_tokens": 1, "output_tokens": 1, "prefix_tokens": 2}',
            "prefix_tokens=2",
        ),
    ],
)
def test_wrong_lines_of_a_trace(call: Call, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival": 0, "prompt_tokens": 1, "output_tokens": 1}\n' + line + "\n")
    code, _, err = call("simulate_scheduler", "--step-time", "1,1,1", "--trace", path)
    assert code == 2 and len(err.splitlines()) == 1 and said in err
