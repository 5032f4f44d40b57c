"""Runs of an engine of several processes: ``test_processes.py`` starts one of them in every process.

python tests/process_runs.py RUN MODEL MESH COORDINATOR NUM_PROCESSES PROCESS_ID [NAME=VALUE ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_models import SMALL

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.follower import Follower

FAULT_AT = 6
"""The decision in which something goes wrong."""
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "logprobs": 1, "prompt_logprobs": 2},
    {"temperature": 1.0, "presence_penalty": 0.8, "repetition_penalty": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "allowed_token_ids": range(0, 103, 3), "logit_bias": {9: 2.0}, "logprobs": -1},
    {"temperature": 1.2, "n": 2, "top_k": 12},
]


def everything(llm: LLM) -> list[dict[str, Any]]:
    """Requests of many kinds in a crowd, with preemptions, stop strings, aborts and a forgotten prefix cache."""
    rng = np.random.default_rng(5)
    prompts: list[Any] = [rng.integers(0, 103, n).tolist() for n in (1, 5, 60, 40, 3, 8, 17, 25, 33, 12)]
    params = [SamplingParams(seed=i, max_tokens=8 + i, **PARAMS[i % len(PARAMS)]) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    text = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (told,) = llm.generate("Once upon a time", text, use_tqdm=False)
    middle = told.outputs[0].text[9:12]
    stop = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=[middle], bad_words=["zq"])
    outputs += llm.generate(["Once upon a time"] * 3, stop, use_tqdm=False)
    for count, _ in enumerate(llm.stream(prompts, SamplingParams(max_tokens=20, ignore_eos=True))):
        if count == 9:
            break  # aborts ten requests, some of them running, while a step is on its way
    llm.reset_prefix_cache()
    outputs += llm.generate(prompts[:5], params[:5], use_tqdm=False)
    return [told for output in outputs for told in _told(output)]


def _told(output: RequestOutput) -> list[dict[str, Any]]:
    def values(entries: Any) -> list[float]:
        return [value.logprob for entry in entries or () if entry for value in entry.values()]

    return [
        {
            "tokens": c.token_ids,
            "text": c.text,
            "ending": [c.finish_reason, c.stop_reason],
            "logprobs": [*values(output.prompt_logprobs), *values(c.logprobs)],
        }
        for c in output.outputs
    ]


# -- what may go wrong: each is called in every process before the engine is made --------------------------------------


def no_fault(process_id: int) -> None:
    pass


def in_follower(action: Callable[[Follower], None]) -> Callable[[int], None]:
    """In process 1, as it is about to follow a decision."""

    def plant(process_id: int) -> None:
        real = Follower._schedule

        def schedule(self: Follower, now: float, digest: str) -> None:
            if self._num_decisions == FAULT_AT - 1:
                action(self)
            real(self, now, digest)

        if process_id == 1:
            Follower._schedule = schedule

    return plant


def _say_when() -> None:
    print(f"fault at {time.time():.2f}", file=sys.stderr, flush=True)


def _die(follower: Follower) -> None:
    _say_when()
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(follower: Follower) -> None:
    _say_when()
    time.sleep(1000)


def _stray(follower: Follower) -> None:
    _say_when()
    follower.scheduler.finish(next(iter(follower._requests.values())), "abort")


def interrupt_leader(process_id: int) -> None:
    """As Ctrl-C does, while process 0 starts a step that process 1 starts too."""
    from jaxserve.runner import ModelRunner

    real = ModelRunner.step

    def step(self: ModelRunner, batch: Any) -> Any:
        if process_id == 0 and self.warm and self.last_started is not None and batch.array("kv_lens").max() > 40:
            _say_when()
            raise KeyboardInterrupt
        return real(self, batch)

    ModelRunner.step = step


FAULTS: dict[str, Callable[[int], None]] = {
    "everything": no_fault,
    "long": no_fault,
    "dies": in_follower(_die),
    "hangs": in_follower(_hang),
    "strays": in_follower(_stray),
    "interrupted": interrupt_leader,
}


def main(run: str, model: str, mesh: str, coordinator: str, num_processes: str, process_id: str, *more: str) -> None:
    FAULTS[run](int(process_id))
    options: dict[str, Any] = SMALL | {
        name: json.loads(value) for name, _, value in (pair.partition("=") for pair in more)
    }
    options |= {"skip_tokenizer_init": not (Path(model) / "tokenizer.json").exists()}
    llm = LLM(
        model,
        mesh=mesh,
        coordinator=coordinator,
        num_processes=int(num_processes),
        process_id=int(process_id),
        use_tqdm_on_load=False,
        **options,
    )
    if run == "everything":
        print(json.dumps(everything(llm)))
    else:
        llm.generate([[1, 2, 3]] * 3, SamplingParams(temperature=0, max_tokens=110, ignore_eos=True), use_tqdm=False)
        print("done")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "xla-tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_compilation_cache_max_size", 4 << 30)
    main(*sys.argv[1:])
