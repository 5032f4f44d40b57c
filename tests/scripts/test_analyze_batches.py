"""What a recorded run's report says is what happened."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from recorded_runs import Call, Recorded, write_entries


def test_the_report(recorded: Recorded, call: Call, tmp_path: Path) -> None:
    plot = tmp_path / "run.png"
    code, out, err = call("analyze_batches", recorded.path, "--json", "-", "--plot", plot)
    assert (code, err) == (0, "")
    result, metrics = json.loads(out)["runs"]["recorded"], recorded.engine.metrics
    counters = metrics.scheduler
    assert result["batch"]["steps"] == metrics.num_steps
    assert result["tokens"]["output"] == metrics.num_generation_tokens
    assert result["preemptions"]["total"] == counters.num_preemptions
    assert result["requests"]["finished"] == metrics.num_finished["length"] + metrics.num_finished["stop"]
    assert result["requests"]["aborted"] == metrics.num_finished["abort"]
    assert result["cache"]["prefix_hit_rate"] == counters.prefix_cache_hits / counters.prefix_cache_queries
    assert 0.9 < result["cache"]["kv_use_max"] <= 1 and 0.5 < result["cache"]["kv_efficiency"] <= 1
    assert set(result["tenants"]) == {"a", "b"}
    assert sum(t["share"] for t in result["tenants"].values()) == pytest.approx(1)
    assert result["ttft_s"]["p50"] < result["end_to_end_s"]["p50"]
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 20_000


def test_the_table(recorded: Recorded, call: Call) -> None:
    code, out, _ = call("analyze_batches", recorded.path)
    assert code == 0
    for text in ("aborted", "between tokens", "preemptions", "tenants", "largest gap of service"):
        assert text in out


def test_another_scheduler_decides_otherwise(recorded: Recorded, call: Call, tmp_path: Path) -> None:
    entries = recorded.entries()
    steps = [e[2] for e in entries if e[0] == "schedule" and any(e[2][0])]
    steps[40][1] += 1
    code, out, err = call("analyze_batches", write_entries(tmp_path / "x.rec", entries), "--json", "-")
    assert code == 0 and "up to there: step 40: bucket" in err
    assert json.loads(out)["difference"].startswith("step 40")


def test_errors_are_one_line(recorded: Recorded, call: Call, tmp_path: Path) -> None:
    empty = write_entries(tmp_path / "empty.rec", recorded.entries()[:1])
    for arguments, said in (
        ([tmp_path / "none.rec"], "No such file"),
        ([empty], "no step was recorded"),
        ([recorded.path, "--json", tmp_path / "no" / "such" / "place"], "No such file"),
    ):
        code, _, err = call("analyze_batches", *arguments)
        assert code == 2 and len(err.splitlines()) == 1 and said in err


def test_a_plot_needs_matplotlib(recorded: Recorded, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("analyze_batches", recorded.path, "--plot", "x.png")
    assert code == 2 and err == "analyze_batches.py: --plot needs matplotlib: pip install 'jaxserve[plots]'\n"
