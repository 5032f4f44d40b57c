"""A recorded schedule comes out the same, and what was changed in it is found where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import SWAP, TIGHT, Call, Entries, Recorded, record, write_entries

from jaxserve import LLM, SamplingParams
from jaxserve.engine import Engine
from jaxserve.recording import RecordedScheduler, Recording, replay
from jaxserve.replay_device import ModelDevice, recorded_engine

REPOSITORY = Path(__file__).parents[2]


def through_model(recorded: Recorded) -> Any:
    return replay(Recording(recorded.path), ModelDevice(recorded.engine))


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("kind", ["recomputed", "swapped", "replicas"])
def test_no_difference(
    make_llm: Callable[..., LLM],
    swapping_llm: LLM,
    odd_model: Path,
    tmp_path: Path,
    kind: str,
    async_scheduling: bool,
) -> None:
    two = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    llm = make_llm(odd_model, **TIGHT, **two) if kind == "replicas" else swapping_llm
    swap = None if kind == "recomputed" else SWAP
    made = record(llm, tmp_path / "run.rec", async_scheduling, swap)
    steps = made.engine.metrics.num_steps
    host = replay(Recording(made.path))
    assert (host.difference, host.num_steps, host.num_requests) == (None, steps, 20)
    assert through_model(made) == host


def test_several_steps_in_one(make_llm: Callable[..., LLM], odd_model: Path, tmp_path: Path) -> None:
    llm = make_llm(odd_model, num_scheduler_steps=8, num_gpu_blocks_override=200)
    config = llm.engine.scheduler.config
    scheduler = RecordedScheduler(config, tmp_path / "run.rec", llm.args.as_json())
    engine = Engine(scheduler, llm.engine.runner, None, ())
    for i in range(4):
        engine.add_request(str(i), [i, 5, 6], SamplingParams(seed=i, max_tokens=19 + i))
    while engine.has_unfinished:
        engine.step()
    scheduler.close()
    made = Recorded(tmp_path / "run.rec", engine)
    assert through_model(made).difference is None
    assert any(entry[0] == "schedule" and entry[2][2] == 8 for entry in made.entries())


def test_an_engine_from_the_recorded_options(recorded: Recorded, call: Call, odd_model: Path, tmp_path: Path) -> None:
    options = json.loads(json.dumps(recorded.entries()[0][2]))
    moved = write_entries(tmp_path / "moved.rec", _with_model(recorded.entries(), "somewhere/else"))
    assert options["model"] == str(odd_model)
    code, out, _ = call("replay_schedule", moved, "--through-model", "--model", odd_model, "--json", "-")
    result = json.loads(out)
    assert code == 0 and result["through_model"] and result["difference"] is None
    assert result["num_steps"] == recorded.engine.metrics.num_steps


def _with_model(entries: Entries, model: str) -> Entries:
    entries[0][2]["model"] = model
    return entries


def test_a_model_that_is_another(recorded: Recorded, tmp_path: Path) -> None:
    entries = recorded.entries()
    entries[0][3]["keys_depend_on_prompt_length"] = True
    path = write_entries(tmp_path / "x.rec", entries)
    with pytest.raises(ValueError, match="keys_depend_on_prompt_length=True, this model on this machine has False"):
        recorded_engine(Recording(path))


# -- what was changed --------------------------------------------------------------------------------------------------


def steps_of(entries: Entries) -> list[tuple[int, list[Any]]]:
    """Index and decision of every step."""
    return [(i, e[2]) for i, e in enumerate(entries) if e[0] == "schedule" and any(e[2][0])]


@pytest.mark.parametrize("change", ["count", "block", "slot", "bucket", "row"])
def test_a_changed_decision_is_found(recorded: Recorded, call: Call, tmp_path: Path, change: str) -> None:
    entries = recorded.entries()
    decisions = [(step, decision) for step, (_, decision) in enumerate(steps_of(entries))]
    step, decision = next(x for x in decisions[30:] if x[1][0][0][0][6][0])  # its first row has new blocks
    row = decision[0][0][0]
    if change == "count":
        row[2] += 1
    elif change == "slot":
        row[4] += 1
    elif change == "block":
        row[6][0][0] += 1
    elif change == "bucket":
        decision[1] += 1
    else:
        del decision[0][0][0]
    path = write_entries(tmp_path / "changed.rec", entries)
    code, out, err = call("replay_schedule", path)
    assert (code, err) == (1, "")
    assert f": step {step}: {'bucket' if change == 'bucket' else 'replica 0, row 0'}: recorded" in out


def test_a_changed_token_is_found(recorded: Recorded, tmp_path: Path) -> None:
    entries, wanted = recorded.entries(), 25
    update = next(e for e in entries if e[0] == "update" and e[1] == wanted)
    decision = steps_of(entries)[wanted][1]
    row = next(i for i, row in enumerate(decision[0][0]) if row[3])
    update[2][0][row][0] = (update[2][0][row][0] + 1) % 100
    changed = Recorded(write_entries(tmp_path / "changed.rec", entries), recorded.engine)
    assert through_model(changed).difference.startswith(f"step {wanted}: replica 0, row {row} (")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_truncated_file_replays_as_far_as_it_goes(recorded: Recorded, tmp_path: Path, share: float) -> None:
    path, whole = tmp_path / "cut.rec", recorded.path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    result = replay(Recording(path))
    assert result.difference is None
    assert 0 < result.num_steps < recorded.engine.metrics.num_steps


def test_a_step_that_failed_has_no_update(swapping_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, path = swapping_llm.engine.runner, tmp_path / "run.rec"
    scheduler = RecordedScheduler(swapping_llm.engine.scheduler.config, path, swapping_llm.args.as_json())
    engine = Engine(scheduler, runner, None, ())
    for name in ("a", "b"):
        engine.add_request(name, [1, 2, 3, 4, 5, 6], SamplingParams(temperature=0, max_tokens=12))
        for _ in range(3):
            engine.step()
        if name == "a":
            with monkeypatch.context() as patch:
                patch.setattr(runner, "step", lambda batch: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    engine.step()
            engine.abort("a")
    while engine.has_unfinished:
        engine.step()
    scheduler.close()
    assert replay(Recording(path)).difference is None
    assert through_model(Recorded(path, engine)).difference is None


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_host_half_needs_no_jax(recorded: Recorded) -> None:
    script = REPOSITORY / "scripts" / "replay_schedule.py"
    check = f"import runpy, sys; sys.argv = ['replay', {str(recorded.path)!r}]\n"
    check += f"sys.path.insert(0, {str(script.parent)!r})\n"
    check += f"try: runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit as e: assert not e.code\n"
    check += "assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    steps = recorded.engine.metrics.num_steps
    assert done.stdout.startswith(f"{steps} steps, 20 requests, ") and done.stdout.endswith(": no difference\n")


def test_json(recorded: Recorded, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("replay_schedule", recorded.path, "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert code == 0 and "no difference" in out
    assert result["difference"] is None and result["num_requests"] == 20 and not result["through_model"]


def test_a_damaged_file(recorded: Recorded, call: Call, tmp_path: Path) -> None:
    whole = bytearray(recorded.path.read_bytes())
    whole[len(whole) // 2] ^= 255
    (tmp_path / "x.rec").write_bytes(whole)
    code, out, err = call("replay_schedule", tmp_path / "x.rec")
    assert code and len((out + err).splitlines()) == 1


def test_errors_are_one_line(recorded: Recorded, call: Call, tmp_path: Path) -> None:
    other, entries = tmp_path / "other.rec", recorded.entries()
    other.write_text("no recording")
    lost, late = ([entries[0], entry] for entry in (["finish", "9", "abort", None, None], ["update", 3, [[]]]))
    for arguments, said in (
        ([tmp_path / "none.rec"], "No such file"),
        ([other], "other.rec: not a recorded schedule"),
        ([write_entries(tmp_path / "a.rec", [["start", 99, {}, {}]])], "version 1"),
        ([write_entries(tmp_path / "b.rec", [[*entries[0][:3], {"x": 1}]])], "another version of the scheduler"),
        ([write_entries(tmp_path / "c.rec", lost)], "entry 1 (finish) cannot be followed: KeyError: '9'"),
        ([write_entries(tmp_path / "d.rec", late)], "entry 1 (update) cannot be followed"),
        ([recorded.path, "--model", "x"], "--model is of no use without --through-model"),
        ([recorded.path, "--wrong"], "unrecognized arguments"),
    ):
        code, out, err = call("replay_schedule", *arguments)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1
        assert said in err
