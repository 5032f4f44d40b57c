"""Several processes, one engine: the same answers as one process, and a clear end when something goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_runs import everything

from jaxserve import LLM, SamplingParams
from jaxserve.beats import HANG_SECONDS, SILENCE_SECONDS, STEP_SECONDS, Beat, Observer
from jaxserve.distributed import Job, ProcessError, Store
from jaxserve.journal import Digest, LeaderJournal, LeadingScheduler, LineReader
from jaxserve.outputs import RequestMetrics
from jaxserve.placement import Placement, first_host, placement
from jaxserve.recording import request_from_json, request_to_json
from jaxserve.request import Request
from jaxserve.scheduler import Scheduler
from sharding import MeshConfig

MakeLLM = Callable[..., LLM]

HERE = Path(__file__).parent
LONGEST = 150
"""Seconds that a run may take; then it is killed, and the test fails."""


@dataclass
class Run:
    """The processes of one job, started at once."""

    folder: Path
    commands: list[list[str]]
    processes: list[subprocess.Popen[Any]] = field(default_factory=list)

    def start(self) -> Run:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
        for i, command in enumerate(self.commands):
            with open(self.folder / f"out{i}", "wb") as out, open(self.folder / f"err{i}", "wb") as err:
                streams: dict[str, Any] = {"stdout": out, "stderr": err, "stdin": subprocess.DEVNULL}
                env = environ | {"JAX_PLATFORMS": "cpu", "JAXSERVE_CACHE_DIR": str(HERE.parent / ".cache")}
                self.processes.append(subprocess.Popen([sys.executable, *command], env=env, **streams))
        return self

    def wait(self) -> list[int]:
        """Exit codes."""
        deadline = time.monotonic() + LONGEST
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
                p.wait()

    def out(self, i: int) -> str:
        return (self.folder / f"out{i}").read_text()

    def err(self, i: int) -> str:
        return (self.folder / f"err{i}").read_text()

    def seconds_to_end(self, i: int) -> float:
        """From the fault to the last thing that process ``i`` said."""
        (at,) = re.findall(r"fault at ([\d.]+)", self.err(0) + self.err(1))
        return (self.folder / f"err{i}").stat().st_mtime - float(at)


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def job(folder: Path, run: str, model: Path, mesh: str, **more: Any) -> Run:
    """A run of ``process_runs`` in two processes, with more options of ``LLM``."""
    address = free_address()
    folder.mkdir()
    commands = []
    for i in range(2):
        options = [f"{k}={json.dumps(v)}" for k, v in more.items()]
        commands.append([str(HERE / "process_runs.py"), run, str(model), mesh, address, "2", str(i), *options])
    return Run(folder, commands).start()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All at the same time, because most of it is waiting."""
    folder = tmp_path_factory.mktemp("faults")
    names = ("dies", "hangs", "strays", "interrupted")
    runs = {name: job(folder / name, name, tiny_model, "tp=2") for name in names}
    yield runs
    for run in runs.values():
        for process in run.processes:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("faults")  # which take their time meanwhile
@pytest.mark.parametrize("mesh", ["dp=2,tp=4", "pp=2,tp=4"])
def test_the_same_answers_as_one_process(make_llm: MakeLLM, tiny_model: Path, tmp_path: Path, mesh: str) -> None:
    """Eight devices of two processes; one axis of the mesh goes across. Few blocks, so that somebody is preempted."""
    run = job(tmp_path / "run", "everything", tiny_model, mesh, num_gpu_blocks_override=22)
    llm = make_llm(tiny_model, mesh=mesh, num_gpu_blocks_override=22)
    expected = everything(llm)
    assert run.wait() == [0, 0], run.err(0) + run.err(1)
    got = json.loads(run.out(0))
    assert not run.out(1)
    for answer, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(answer.pop("logprobs"), other.pop("logprobs"), atol=1e-4)
        assert answer == json.loads(json.dumps(other))
    assert sum(len(set(a["tokens"])) > 5 for a in got) > 15
    assert llm.get_metrics().num_preemptions > 0
    assert sum(isinstance(a["ending"][1], str) for a in got) >= 3


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_named(faults: dict[str, Run]) -> None:
    run = faults["dies"]
    assert run.wait() == [1, -signal.SIGKILL]
    assert re.search(r"ProcessError: process 1 \(.+\) has shown no sign of life for 1\d s", run.err(0)), run.err(0)
    assert run.seconds_to_end(0) < 30


def test_a_process_that_hangs_is_named(faults: dict[str, Run]) -> None:
    run = faults["hangs"]
    assert run.wait() == [1, 1]
    for i in range(2):
        assert re.search(r"process 1 \(.+\) hangs: for 1\d s .* step 5, process 0 .* step [67]", run.err(i)), run.err(i)
        assert run.seconds_to_end(i) < 30


def test_a_process_that_decides_otherwise_is_named(faults: dict[str, Run]) -> None:
    run = faults["strays"]
    assert run.wait() == [1, 1]
    for i in range(2):
        found = re.search(
            r"process 1 \(.+\) decided otherwise than process 0 .* in step 6: digest (\w+), not (\w+)", run.err(i)
        )
        assert found and found[1] != found[2], run.err(i)
        assert run.seconds_to_end(i) < 10


def test_an_interrupted_leader_ends_everybody(faults: dict[str, Run]) -> None:
    run = faults["interrupted"]
    assert run.wait() == [-signal.SIGINT, 130]
    assert "KeyboardInterrupt" in run.err(0)
    assert re.search(r"^process 0 \(.+\) was interrupted$", run.err(1), re.M), run.err(1)
    assert "Traceback" not in run.err(1)
    assert max(run.seconds_to_end(0), run.seconds_to_end(1)) < 10


class Dictionary(Store):
    """A store in memory, for jobs whose processes are threads."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values

    def set(self, key: str, value: str, overwrite: bool = False) -> None:
        self.values[key] = value

    def wait(self, key: str, seconds: float) -> str:
        while key not in self.values:
            time.sleep(0.001)
        return self.values[key]

    def has(self, key: str) -> bool:
        return key in self.values


def test_processes_that_were_started_differently() -> None:
    values: dict[str, str] = {}

    def meet(i: int) -> str:
        with pytest.raises(ProcessError) as error:
            Job(2, i, Dictionary(values)).meet({"model": "m"} | ({"seed": 7} if i else {}))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        for said in pool.map(meet, range(2)):
            assert re.match(r"process 1 \(.+\) was started with seed=7, process 0 \(.+\) with seed=None", said), said
    with pytest.raises(ProcessError, match="had its engine already"):
        Job(2, 0, Dictionary(values)).meet({})


def test_the_command_prints_in_one_process_only(tiny_model: Path, tmp_path: Path) -> None:
    """Prompts on stdin, which only process 0 has to read."""
    options = "--mesh tp=2 --max-num-seqs 1 --max-num-batched-tokens 32 --max-model-len 64 --temperature 0 --json"
    command = ["-m", "jaxserve", "generate", "--model", str(tiny_model), *options.split(), "--ignore-eos"]
    where = ["--coordinator", free_address(), "--num-processes", "2", "--process-id"]
    prompts = [["Once upon", "a time"], []]
    run = Run(tmp_path, [[*command, *where, str(i), *prompts[i]] for i in range(2)]).start()
    assert run.wait() == [0, 0], run.err(0) + run.err(1)
    outputs = json.loads(run.out(0))
    assert [output["prompt"] for output in outputs] == prompts[0]
    assert all(output["outputs"][0]["token_ids"] for output in outputs)
    assert not run.out(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_processes": 2}, ["num_processes=2", "coordinator", "process_id"]),
        ({"coordinator": "a:1", "process_id": 0}, ["coordinator=a:1", "num_processes"]),
        ({"coordinator": "nowhere", "num_processes": 2, "process_id": 0}, ["coordinator='nowhere'", "HOST:PORT"]),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, ["process_id=2", "0 to 1"]),
        ({"coordinator": "a:70000", "num_processes": 2, "process_id": 0}, ["coordinator='a:70000'", "HOST:PORT"]),
        ({"num_processes": 0}, ["num_processes=0"]),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 0, "mesh": "tp=3"}, ["tp=3", "3 devices", "2 proc"]),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 0, "mesh": "tp=2", "swap_space": 1},
            ["swap_space=1"],
        ),
    ],
    ids=str,
)
def test_wrong_options_are_one_line_errors(tiny_model: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, NotImplementedError)) as error:
        LLM(tiny_model, **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


# -- which process this is ---------------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "10", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[03-04]"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
POD = {"JOB_COMPLETION_INDEX": "1", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "pod-0.svc:1234"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, Placement("n03:61450", 2, 1)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "10", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # in the batch script itself
        (POD, Placement("pod-0.svc:1234", 2, 1)),
        ({"JOB_COMPLETION_INDEX": "1"}, None),  # pods that have nothing to do with each other
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        (SLURM | {"PMI_SIZE": "2", "PMI_RANK": "1"}, Placement("n03:61450", 2, 1)),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.9.0.1,10.1.0.1:34911"},
            Placement("10.9.0.1:62624", 4, 3),
        ),
        (MPI | SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, Placement("a:1", 4, 3)),
    ],
)
def test_what_launchers_say(environ: Mapping[str, str], expected: Placement | None) -> None:
    assert placement(None, None, None, environ) == expected


def test_what_is_given_counts() -> None:
    assert placement("b:2", None, None, MPI) == Placement("b:2", 4, 3)
    assert placement("b:2", 3, 0, MPI | SLURM | POD) == Placement("b:2", 3, 0)
    assert placement(None, 1, None, SLURM) is None
    for environ in (MPI, {k: v for k, v in POD.items() if k != "JAX_NUM_PROCESSES"}):
        with pytest.raises(ValueError, match="does not say"):
            placement(None, None, None, environ)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("a,b", "a"), ("n[003-010,12],other", "n003"), ("r[1-2]n[4,6]", "r1n4"), ("x-1,y", "x-1")],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


LAUNCH = HERE.parent / "docs" / "launch"


def test_launch_files_name_meshes_that_there_are() -> None:
    """As many processes as the file's name says, of eight GPUs each."""
    texts = {path.name: path.read_text() for path in LAUNCH.iterdir()}
    assert set(texts) == {"README.md", "slurm.sbatch", "mpirun.sh", "k8s-job.yaml"}
    named = set(re.findall(r"sharding/configs/(\S+?\.toml)", " ".join(texts.values())))
    for hosts in (2, 8):
        named |= {re.sub(r"\$\{hosts\}", str(hosts), name) for name in named}
    configs = {
        path.name: MeshConfig.from_file(path) for path in (HERE.parent / "sharding" / "configs").glob("*x*.toml")
    }
    assert {name for name in named if "$" not in name} <= set(configs)
    for name, config in configs.items():
        hosts, gpus = map(int, name.split("-")[0].split("x"))
        assert config.num_devices == hosts * gpus
    for file in ("slurm.sbatch", "mpirun.sh"):
        subprocess.run(["bash", "-n", LAUNCH / file], check=True)


# -- signs of life -----------------------------------------------------------------------------------------------------


class Watched:
    """Two processes that beat once a second, except for what a test changes."""

    def __init__(self) -> None:
        self.now, self.count = 0.0, 0
        self.leader, self.follower = Beat(), Beat()
        self.observer = Observer(["process 0 (a)", "process 1 (b)"], 0.0)

    def seconds(self, count: float, silent: int | None = None) -> str | None:
        """Let time pass; the reason why the job has to end."""
        for _ in range(int(count)):
            self.now, self.count = self.now + 1, self.count + 1
            beats = {i: replace(b, count=self.count) for i, b in enumerate((self.leader, self.follower)) if i != silent}
            verdict = self.observer.observe(beats, self.now)
            if verdict is not None:
                return verdict.reason
        return None


def test_nothing_is_wrong_with_an_idle_engine_or_a_slow_step() -> None:
    w = Watched()
    assert w.seconds(1000) is None
    w.leader = Beat(entries=5, step=3, digest="x", working=True, computing=True)
    assert w.seconds(HANG_SECONDS - 2) is None  # the follower has not come to it yet
    w.follower = Beat(entries=5, step=3, digest="x", computing=True)
    assert w.seconds(STEP_SECONDS - HANG_SECONDS) is None


def test_what_is_wrong() -> None:
    w = Watched()
    assert "process 1 (b) has shown no sign of life" in str(w.seconds(SILENCE_SECONDS + 2, silent=1))
    w = Watched()
    w.leader = Beat(entries=5, step=3, digest="x", working=True, computing=True)
    assert "process 1 (b) hangs" in str(w.seconds(HANG_SECONDS + 2))
    w = Watched()
    w.leader = w.follower = Beat(entries=5, step=3, digest="x", working=True)
    assert "process 0 (a) hangs" in str(w.seconds(HANG_SECONDS + 2))
    w = Watched()
    w.leader = w.follower = Beat(entries=5, step=3, digest="x", working=True, computing=True)
    assert "step 3 has not ended" in str(w.seconds(STEP_SECONDS + 2))
    w = Watched()
    w.leader, w.follower = Beat(step=3, digest="x"), Beat(step=3, digest="y")
    assert w.seconds(1) == "process 1 (b) decided otherwise than process 0 (a) in step 3: digest y, not x"
    w = Watched()
    w.follower = Beat(ended="process 1 (b): no memory", outcome="failed")
    assert w.seconds(1) == "process 1 (b): no memory"


def test_a_process_that_slept_blames_nobody() -> None:
    w = Watched()
    w.seconds(3)
    w.now += 1000
    assert w.seconds(3) is None
    w.follower = Beat(ended="process 1 (b) is done")
    assert w.seconds(1) is None and w.seconds(100, silent=1) is None


def test_beats_travel() -> None:
    beat = Beat(count=3, entries=7, step=2, digest="ab", working=True, ended="so", outcome="interrupted")
    assert Beat.from_json(beat.to_json()) == beat
    assert Beat().to_json() == "{}"


# -- the journal -------------------------------------------------------------------------------------------------------


class Heard:
    """An audience that keeps what it is sent."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.digests: list[str] = []
        self.left = False

    def send(self, lines: bytes, num_entries: int) -> None:
        assert lines.count(b"\n") == num_entries
        self.pieces.append(lines)

    def decided(self, step: int, digest: str) -> None:
        self.digests.append(digest)

    def working(self, is_working: bool) -> None: ...

    def failed(self, error: BaseException) -> None: ...

    def leave(self) -> None:
        self.left = True


def test_entries_arrive_when_somebody_has_to_act() -> None:
    heard = Heard()
    journal = LeaderJournal(heard)
    journal.write("reset")
    assert not heard.pieces
    journal.send("schedule", 0.5, "")
    reader, whole = LineReader(), heard.pieces[0]
    assert [e for i in range(len(whole)) for e in reader.entries(whole[i : i + 1])] == [
        ["reset"],
        ["schedule", 0.5, ""],
    ]
    journal.write("add", "x" * (2 << 20))
    assert len(heard.pieces) == 2  # much is sent at once
    journal.close()
    assert heard.left and heard.pieces[-1] == b'["stop"]\n'
    with pytest.raises(RuntimeError, match="closed"):
        journal.send("schedule", 1.0, "")


def test_digests_name_decisions(tiny_llm: LLM) -> None:
    """Two schedulers that are told the same digest alike, until one is told something else."""
    heard = Heard()
    leader, digest = LeadingScheduler(tiny_llm.engine.scheduler.config), Digest()
    leader.lead(LeaderJournal(heard))
    follower = Scheduler(leader.config)
    requests: dict[str, Request] = {}
    for i in range(6):
        leader.add(Request(str(i), [i] * 9, SamplingParams(), i, frozenset(), 20, RequestMetrics(arrival_time=0.0)))
    for step in range(12):
        output = leader.schedule(float(step))
        leader.update(output, [[[7] for _ in rows] for rows in output.replicas])
    reader, outputs = LineReader(), []
    for kind, *entry in (e for piece in heard.pieces for e in reader.entries(piece)):
        if kind == "add":
            request = request_from_json(entry[0])
            assert request_to_json(request) == entry[0]
            requests[request.request_id] = request
            follower.add(request)
        elif kind == "schedule":
            outputs.append(follower.schedule(entry[0]))
            assert digest.of(outputs[-1]) == heard.digests[len(outputs) - 1]
            assert len(outputs) == 1 or entry[1] == heard.digests[len(outputs) - 2]
        elif kind == "update":
            follower.update(outputs[entry[0]], [[[7] for _ in rows] for rows in outputs[entry[0]].replicas])
    assert len(outputs) == 11 + 1
    leader.finish(next(iter(leader.replicas[0].running)), "abort")
    assert digest.of(follower.schedule(99.0)) != Digest().of(leader.schedule(99.0))
