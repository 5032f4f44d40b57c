"""How long until the first token: a new process imports, starts devices, loads, compiles and answers.

Each measurement is a process of its own (``python -m jaxserve.evaluation.startup``), so that nothing is there already.
What this module imports at its top is part of no phase, and therefore next to nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

PHASES = {
    "imports": "from starting the process to having imported the engine and its libraries, jax among them",
    "devices": "jax finds its devices",
    "load": "LLM(...) but for compilation: configs, tokenizer, weights, memory for KV blocks",
    "compile": "from the first program's compilation to the end of the last",
    "first token": "from a prompt to its first token, everything run for the first time",
}
"""Name and how it is measured, in order; together they are the whole."""


@dataclass(frozen=True)
class Startup:
    """One process."""

    seconds: dict[str, float]
    """By phase."""
    programs: int
    simulated: bool
    """Whether several devices share the cores of this machine."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def measure_startup(options: dict[str, Any], prompt: list[int], cache: str) -> Startup:
    """In a new process, with the compile cache in the directory ``cache``. ``options``: keyword arguments of ``LLM``,
    as JSON has them. ValueError with the last line of what the process said, if it fails."""
    task = {"options": options | {"compilation_cache_dir": cache}, "prompt": prompt, "started": time.time()}
    command = [sys.executable, "-m", "jaxserve.evaluation.startup"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"the process that was to start failed: {lines[-1]}")
    return Startup(**json.loads(done.stdout.splitlines()[-1]))


def start(task: dict[str, Any]) -> Startup:
    """What the process does; ``task["started"]``: when it was started, by the clock of all processes."""
    begun = time.time() - task["started"]
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def passed() -> float:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        return clock - before

    from jaxserve.evaluation.engines import mesh_of, open_llm, reserve_devices
    from jaxserve.sampling_params import SamplingParams

    seconds["imports"] = begun + passed()
    reserve_devices(mesh_of(task["options"]).num_devices)
    seconds["devices"] = passed()
    llm = open_llm(task["options"]).llm
    ready = passed()
    records = llm.compiled_programs()
    seconds["compile"] = max(r.started + r.seconds for r in records) - min(r.started for r in records)
    seconds["load"] = ready - seconds["compile"]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    passed()
    llm.generate(task["prompt"], params, use_tqdm=False)
    seconds["first token"] = passed()
    mesh = llm.engine.runner.mesh
    simulated = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return Startup({phase: seconds[phase] for phase in PHASES}, len(records), simulated)


if __name__ == "__main__":
    print("\n" + json.dumps(vars(start(json.load(sys.stdin)))))
