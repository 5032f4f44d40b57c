"""A recorded schedule's tokens, computed again by the model."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxserve.batch import BatchBuilder
from jaxserve.build import build_engine
from jaxserve.config import GIB, SchedulerConfig
from jaxserve.engine import Engine
from jaxserve.engine_args import EngineArgs
from jaxserve.logit_edits import edits_logits
from jaxserve.pipeline import Pipeline
from jaxserve.recording import Recording
from jaxserve.request import Request, Status
from jaxserve.runner import PendingStep
from jaxserve.scheduler import SchedulerOutput
from jaxserve.scoring import score_rows
from jaxserve.slot_rows import SlotRows
from jaxserve.tokenizer import bad_word_token_sequences

MEASURED = ("block_bytes", "bytes_per_second", "prefill_tokens_per_second")
"""Of a swap config: may differ between the machine that recorded and this one."""


def recorded_engine(recording: Recording, model: str | Path | None = None) -> Engine:
    """An engine like the one that was recorded, whose programs fit the recorded schedule. ``model``: where it is now.

    Raises ValueError if it would come out different here.
    """
    engine = build_engine(_args(recording, model))
    name = _first_difference(recording.config, engine.scheduler.config)
    if name is not None:
        here, there = (getattr(c, name) for c in (engine.scheduler.config, recording.config))
        raise ValueError(f"{recording.path}: recorded with {name}={there!r}, this model on this machine has {here!r}")
    return engine


def _args(recording: Recording, model: str | Path | None) -> EngineArgs:
    """The recorded options; what the recorded machine chose is given, so that it is not chosen again."""
    config, options = recording.config, dict[str, Any](recording.options)
    recorded_model = options.pop("model", None)
    if model is None and recorded_model is None:
        raise ValueError(f"{recording.path}: it does not say of which model it is")
    for name in ("decode_buckets", "token_buckets"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    options |= {name: getattr(config, name) for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")}
    options |= {"num_gpu_blocks_override": config.num_blocks, "record": None, "use_tqdm_on_load": sys.stderr.isatty()}
    if options.get("swap_space") is None:  # on another platform the default may be none
        options["swap_space"] = config.swap.num_blocks * config.swap.block_bytes / GIB
    return EngineArgs.of(recorded_model if model is None else model, **options)


def _first_difference(recorded: SchedulerConfig, built: SchedulerConfig) -> str | None:
    a, b = asdict(recorded), asdict(built)
    for config in (a, b):
        for name in MEASURED:
            del config["swap"][name]
        config["swap"]["num_blocks"] = config["swap"]["num_blocks"] > 0
    return next((name for name in a if a[name] != b[name]), None)


class ModelDevice:
    """The device half of an engine, for ``recording.replay``. Of one replay: the caches start empty."""

    def __init__(self, engine: Engine) -> None:
        self.runner, self.tokenizer = engine.runner, engine.tokenizer
        config = engine.scheduler.config
        self._batches = BatchBuilder(config)
        self._pipeline = Pipeline(engine.runner, config) if config.num_stages > 1 else None
        self._slot_rows = SlotRows(engine.runner)
        self._requests: list[Request] = []
        self._pending: deque[tuple[SchedulerOutput, PendingStep]] = deque()

    def add(self, request: Request) -> None:
        bad_words: list[tuple[int, ...]] = []
        if request.params.bad_words and self.tokenizer is not None:
            bad_words = bad_word_token_sequences(self.tokenizer, request.params.bad_words)
        self._slot_rows.add(request, sorted(request.stop_token_ids), bad_words)
        if edits_logits(request.params):
            self._requests.append(request)

    def start(self, output: SchedulerOutput) -> None:
        """Start a step, as ``Engine`` does."""
        self.runner.move_blocks(output.swap_outs, output.swap_ins, output.dropped)
        if output.is_empty and (self._pipeline is None or self._pipeline.is_empty):
            return
        self._forget_finished()
        rows = output.bucket or self.runner.config.decode_buckets[0]
        batch = self._batches.build(output, self.runner.config.layout(rows, output.one_token_each, output.num_steps))
        self._slot_rows.write(output)
        if self._pipeline is None:
            self._pending.append((output, self.runner.step(batch)))
        else:
            self._pending.append(self._pipeline.tick(output, batch))

    def tokens(self, output: SchedulerOutput) -> list[list[list[int]]]:
        """Wait for a step; those before it that nobody asked for are let go."""
        pending = self._find(output)
        self._pending.popleft()
        return pending.output().rows(output)

    def score(self, output: SchedulerOutput, rows: list[list[int]], targets: list[int], num_top: int) -> None:
        """Compute log-probabilities of a step, for the sake of other processes that do so too."""
        score_rows(self._find(output), self.runner, rows, targets, num_top)

    def clear(self) -> None:
        """Nobody waits for what is in the pipeline."""
        if self._pipeline is not None:
            self._pipeline.clear()

    def _find(self, output: SchedulerOutput) -> PendingStep:
        while self._pending[0][0] is not output:
            self._pending.popleft()
        return self._pending[0][1]

    def _forget_finished(self) -> None:
        for request in self._requests:
            if request.status is Status.FINISHED:
                self._slot_rows.remove(request)
        self._requests = [r for r in self._requests if r.status is not Status.FINISHED]
