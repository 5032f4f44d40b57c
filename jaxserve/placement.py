"""Which of how many processes this is and where they meet: told, or found in what started it. No jax here.

One process per host runs the same command. Slurm and MPI launchers say in the environment which is which; a Kubernetes
indexed Job says half of it, and its manifest the rest (``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

OPEN_MPI, PMI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")
"""Number and rank, as Open MPI says it; and as MPICH and Intel MPI do, but also Slurm for programs of these."""
FIRST_PORT, NUM_PORTS = 61440, 4096
"""Of coordinators whose port nobody chose: by the job's number, so that two jobs seldom want the same."""


@dataclass(frozen=True)
class Placement:
    """This process among those of the job."""

    coordinator: str
    """HOST:PORT, where process 0 listens."""
    num_processes: int
    process_id: int


@dataclass(frozen=True)
class Found:
    """What a launcher says; None for what it does not."""

    launcher: str
    num_processes: int | None
    process_id: int | None
    coordinator: str | None


def placement(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environ: Mapping[str, str]
) -> Placement | None:
    """From what was asked for, filled up from ``environ``; None if this is the only process.

    Raises ValueError if there are several and something about them is not known.
    """
    if num_processes == 1:
        return None
    found = find(environ) if None in (coordinator, num_processes, process_id) else None
    if found is not None:
        coordinator, num_processes = coordinator or found.coordinator, num_processes or found.num_processes
        process_id = found.process_id if process_id is None else process_id
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if not any(value is not None for value in given.values()):
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        known = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        said = "no launcher says" if found is None else f"{found.launcher} does not say"
        raise ValueError(
            f"{known}: {said} {' and '.join(missing)}; give coordinator (HOST:PORT of process 0), num_processes and "
            "process_id, or start the processes with Slurm, MPI or a Kubernetes indexed Job"
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    check(coordinator, num_processes, process_id)
    return Placement(coordinator, num_processes, process_id)


def check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """ValueError for a value that can never be right."""
    host_and_port = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):(\d{1,5})", coordinator or "")
    if coordinator is not None and (host_and_port is None or not 0 < int(host_and_port[2]) < 1 << 16):
        raise ValueError(f"coordinator={coordinator!r}: it is HOST:PORT, where process 0 listens")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes!r}: it is a whole number of at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        limit = "0 or more" if num_processes is None else f"0 to {num_processes - 1}"
        raise ValueError(f"process_id={process_id!r}: with num_processes={num_processes} it is {limit}")


def find(environ: Mapping[str, str]) -> Found | None:
    """What started this process as one of several, if anything did."""
    finders = (_variables, partial(_mpi, OPEN_MPI), _slurm, partial(_mpi, PMI))
    return next((found for finder in finders if (found := finder(environ)) and found.num_processes != 1), None)


def _variables(environ: Mapping[str, str]) -> Found | None:
    """The variables that a manifest or a person sets, and a Kubernetes indexed Job's number of the pod. That alone
    is no job of several processes: its pods may have nothing to do with each other."""
    count, coordinator = environ.get("JAX_NUM_PROCESSES"), environ.get("JAX_COORDINATOR_ADDRESS")
    index = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
    if count is None and (coordinator is None or index is None):
        return None
    return Found(
        "the environment (JAX_NUM_PROCESSES, JAX_PROCESS_ID or JOB_COMPLETION_INDEX, JAX_COORDINATOR_ADDRESS)",
        None if count is None else _number("JAX_NUM_PROCESSES", count),
        None if index is None else _number("JAX_PROCESS_ID or JOB_COMPLETION_INDEX", index),
        coordinator,
    )


def _mpi(names: tuple[str, str], environ: Mapping[str, str]) -> Found | None:
    """mpirun does not say on which host its first process runs, except Open MPI before 5, which runs there itself."""
    size, rank = names
    if size not in environ or rank not in environ:
        return None
    coordinator = environ.get("JAX_COORDINATOR_ADDRESS") or _open_mpi_4(environ.get("OMPI_MCA_orte_hnp_uri"))
    return Found("MPI", _number(size, environ[size]), _number(rank, environ[rank]), coordinator)


def _open_mpi_4(uri: str | None) -> str | None:
    """1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 -> 10.96.0.1 and a port."""
    found = re.match(r"(\d+)\.\d+;tcp://([^,:]+)", uri or "")
    return None if found is None else f"{found[2]}:{_port(int(found[1]) >> 12)}"


def _slurm(environ: Mapping[str, str]) -> Found | None:
    """The step that srun started: a batch script, or a shell in an allocation, is not one of several."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
    if any(name not in environ for name in names):
        return None
    job, tasks, rank, hosts = (environ[name] for name in names)
    coordinator = environ.get("JAX_COORDINATOR_ADDRESS") or f"{first_host(hosts)}:{_port(_number(names[0], job))}"
    return Found("Slurm", _number(names[1], tasks), _number(names[2], rank), coordinator)


def first_host(hosts: str) -> str:
    """node[003-010,12],other -> node003."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _port(job: int) -> int:
    return FIRST_PORT + job % NUM_PORTS


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name}={text!r}: it is a whole number")
    return int(text)
