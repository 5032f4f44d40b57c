"""The engine's loop on a simulated clock, and where the clock's speed comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from schedule_log import RunLog, WatchedScheduler, recorded_run

from jaxserve.config import (
    GIB,
    FairnessConfig,
    SchedulerConfig,
    SwapConfig,
    TenantConfig,
    decode_buckets,
    token_buckets,
)
from jaxserve.evaluation.traces import Arrival
from jaxserve.outputs import RequestMetrics
from jaxserve.recording import Recording
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import QueueFullError, SchedulerOutput

IDLE_SECONDS = 0.001
"""As the engine waits where nobody may run (rate caps)."""
MOST_IDLE_STEPS = 200_000
PARAMS = SamplingParams()
OUTPUT_TOKEN = 0


# -- how long a step takes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: ``a`` per decode step in it, ``b`` per token row, ``c`` per KV token read, ``d`` per block
    moved."""

    a: float
    b: float
    c: float
    d: float | None = None

    @classmethod
    def parse(cls, text: str) -> StepTime:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if len(values) not in (3, 4) or not all(0 <= v < float("inf") for v in values) or not any(values[:2]):
            raise ValueError(f"--step-time {text}: it is A,B,C or A,B,C,D in seconds, 0 or more, A or B above 0")
        return cls(*values)

    def seconds(self, num_steps: float, rows: float, kv_read: float, moved: float) -> float:
        return self.a * num_steps + self.b * rows + self.c * kv_read + (self.d or 0.0) * moved


@dataclass(frozen=True)
class Fit:
    """A step time that was fitted, and how well it fits."""

    step_time: StepTime
    steps: int
    dropped: int
    """Steps left out: an idle time follows, or they took several times as long as others like them."""
    moves: bool
    """Whether ``d`` was fitted, too."""
    median_error: float
    """Half of the steps are off by a smaller share than this."""
    rms_error: float
    """Seconds."""
    r_squared: float


def fit_step_time(recording: Recording) -> Fit:
    """Raises ValueError where too little was recorded."""
    log, _ = recorded_run(recording)
    fit = fit_log(log)
    swap = recording.config.swap
    if fit.moves or not swap.num_blocks:
        return fit
    return replace(fit, step_time=replace(fit.step_time, d=swap.block_bytes / swap.bytes_per_second))


def fit_log(log: RunLog, outlier: float = 5.0) -> Fit:
    """Steps that took more than ``outlier`` times the median of those of their size are left out."""
    seconds = np.array(log.seconds)
    features = np.array([[s.num_steps, s.rows, s.kv_read, s.moved] for s in log.steps], np.float64).reshape(-1, 4)
    known = np.isfinite(seconds) & (seconds > 0)
    for size in np.unique(features[known, :2], axis=0):
        alike = known & (features[:, :2] == size).all(axis=1)
        known[alike] = seconds[alike] <= outlier * np.median(seconds[alike])
    x, y = features[known], seconds[known]
    if len(y) < 8:
        raise ValueError(f"{len(y)} steps of known length are too few to fit a step time to; record more")
    moves = bool(x[:, 3].any())
    weights = non_negative_least_squares(x, y)
    residual = y - x @ weights
    spread = float(((y - y.mean()) ** 2).sum())
    a, b, c, d = map(float, weights)
    return Fit(
        StepTime(a, b, c, d if moves else None),
        steps=len(y),
        dropped=len(seconds) - len(y),
        moves=moves,
        median_error=float(np.median(np.abs(residual) / y)),
        rms_error=float(np.sqrt(np.mean(residual**2))),
        r_squared=1 - float((residual**2).sum()) / spread if spread else 1.0,
    )


def non_negative_least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights >= 0 of the columns with the least squared error: of so few columns all subsets are tried."""
    best, least = np.zeros(x.shape[1]), float((y**2).sum())
    used = [i for i in range(x.shape[1]) if x[:, i].any()]
    scale = np.abs(x).max(axis=0)
    for size in range(1, len(used) + 1):
        for columns in map(list, combinations(used, size)):
            found = np.linalg.lstsq(x[:, columns] / scale[columns], y, rcond=None)[0]
            error = float(((y - x[:, columns] / scale[columns] @ found) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(x.shape[1]), error
                best[columns] = found / scale[columns]
    return best


# -- settings ----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What is simulated."""

    config: SchedulerConfig
    async_scheduling: bool
    step_time: StepTime
    host_time: float = 0.0


class Option(NamedTuple):
    """A setting as text."""

    parse: Callable[[str], Any]
    metavar: str
    help: str


def _yes_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError("it is yes or no")
    return text == "yes"


def _fairness(text: str) -> FairnessConfig:
    path = Path(text)
    return FairnessConfig.of(json.loads(text if text.lstrip().startswith("{") else path.read_text(encoding="utf-8")))


YES_NO = "yes|no"
SETTINGS: dict[str, Option] = {
    "policy": Option(str, "NAME", "fcfs, priority or fair (fcfs)"),
    "fairness": Option(_fairness, "JSON|FILE", "of the fair policy: tenants' weights, caps and targets"),
    "max_num_seqs": Option(int, "N", "sequences in one step (64)"),
    "max_num_batched_tokens": Option(int, "N", "tokens in one step (2048)"),
    "num_blocks": Option(int, "N", "KV blocks per replica (4096)"),
    "block_size": Option(int, "N", "tokens in one block (16)"),
    "max_model_len": Option(int, "N", "longest sequence (as long as the longest request)"),
    "long_prefill_token_threshold": Option(int, "N", "most tokens of one prompt while others decode; 0 = any (0)"),
    "max_num_partial_prefills": Option(int, "N", "prompts that may be half computed at once; 0 = any (0)"),
    "enable_chunked_prefill": Option(_yes_no, YES_NO, "(yes)"),
    "enable_prefix_caching": Option(_yes_no, YES_NO, "(yes)"),
    "async_scheduling": Option(_yes_no, YES_NO, "schedule a step while the one before it runs (yes)"),
    "num_scheduler_steps": Option(int, "N", "decode steps in one (1)"),
    "num_replicas": Option(int, "N", "replicas, each with sequences, tokens and blocks of its own (1)"),
    "swap_space": Option(float, "GIB", "host memory for preempted requests, per replica (0)"),
    "preemption_mode": Option(str, "MODE", "auto, swap or recompute (auto)"),
    "kv_bytes_per_token": Option(float, "BYTES", "of all layers (131072)"),
    "swap_bandwidth": Option(float, "GB/S", "between device and host (20)"),
    "max_num_queued_requests": Option(int, "N", "waiting requests beyond which others are rejected (any)"),
    "max_num_queued_tokens": Option(int, "N", "the same for their prompt tokens (any)"),
}
OF_SWAP = ("swap_space", "preemption_mode", "kv_bytes_per_token", "swap_bandwidth")


def settings_of(base: Setting, texts: Mapping[str, str], rates: Mapping[str, float]) -> Setting:
    """``base`` with changes; ``rates``: most tokens per second of tenants. Raises ValueError with what is wrong."""
    values = {name: _parsed(name, text) for name, text in texts.items()}
    async_scheduling = values.pop("async_scheduling", base.async_scheduling)
    swap = {name: values.pop(name) for name in OF_SWAP if name in values}
    config = replace(base.config, **_with_buckets(base.config, values))
    config = replace(config, fairness=_with_rates(config.fairness, rates))
    config = replace(config, swap=_swap(config, base.step_time, **swap))
    step_time = base.step_time
    if step_time.d is None:
        step_time = replace(step_time, d=config.swap.block_bytes / config.swap.bytes_per_second)
    return Setting(config, async_scheduling, step_time, base.host_time)


def _with_buckets(base: SchedulerConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Buckets follow the limits, unless they were recorded for these."""
    seqs, tokens = (values.get(n, getattr(base, n)) for n in ("max_num_seqs", "max_num_batched_tokens"))
    found: dict[str, Any] = {}
    if seqs != base.max_num_seqs or not base.decode_buckets:
        found["decode_buckets"] = decode_buckets(max(1, seqs))
    if tokens != base.max_num_batched_tokens or not base.token_buckets:
        found["token_buckets"] = token_buckets(max(1, tokens))
    return values | found


def _with_rates(fairness: FairnessConfig, rates: Mapping[str, float]) -> FairnessConfig:
    tenants = dict(fairness.tenants)
    for name, rate in rates.items():
        tenants[name] = replace(tenants.get(name, TenantConfig()), max_tokens_per_second=rate)
    return replace(fairness, tenants=tenants)


def _parsed(name: str, text: str) -> Any:
    try:
        return SETTINGS[name].parse(text)
    except (ValueError, TypeError, OSError) as error:
        reason = "it is a number" if "invalid literal" in str(error) or "could not convert" in str(error) else error
        raise ValueError(f"{name}={text}: {reason}") from None


def _swap(
    config: SchedulerConfig,
    step_time: StepTime,
    swap_space: float | None = None,
    preemption_mode: str | None = None,
    kv_bytes_per_token: float | None = None,
    swap_bandwidth: float | None = None,
) -> SwapConfig:
    """As recorded, or from these; prompts are computed as fast as the largest step is."""
    known = config.swap if config.swap.num_blocks else None
    per_block = kv_bytes_per_token and kv_bytes_per_token * config.block_size
    block_bytes = int(per_block or (known.block_bytes if known else 131072 * config.block_size))
    tokens = config.max_num_batched_tokens
    blocks = known.num_blocks if known else 0
    return SwapConfig(
        num_blocks=blocks if swap_space is None else int(swap_space * GIB) // block_bytes,
        mode=preemption_mode or config.swap.mode,  # pyright: ignore[reportArgumentType]
        block_bytes=block_bytes,
        bytes_per_second=swap_bandwidth * 1e9 if swap_bandwidth else known.bytes_per_second if known else 20e9,
        prefill_tokens_per_second=tokens / step_time.seconds(1, tokens, 0, 0),
    )


# -- the loop ----------------------------------------------------------------------------------------------------------


def simulate(
    trace: list[Arrival], setting: Setting, seed: int = 0, progress: Callable[[int], Any] = lambda count: None
) -> RunLog:
    """Serve every request of the trace. ``progress`` is told how many more have left. Raises ValueError where nobody
    can run any more."""
    return _Simulation(trace, setting, seed, progress).run()


class _Started(NamedTuple):
    output: SchedulerOutput
    end: float


class _Simulation:
    def __init__(self, trace: list[Arrival], setting: Setting, seed: int, progress: Callable[[int], Any]) -> None:
        self.trace, self.setting, self.seed, self.progress = trace, setting, seed, progress
        self.scheduler = WatchedScheduler(setting.config)
        self.now = 0.0
        self._next = 0
        self._device_free = 0.0
        self._in_flight: _Started | None = None
        self._idle_steps = 0

    def run(self) -> RunLog:
        step = self._overlapped_step if self.setting.async_scheduling else self._plain_step
        while self._next < len(self.trace) or self.scheduler.has_unfinished:
            if not self.scheduler.has_unfinished:
                self.now = max(self.now, self.trace[self._next].arrival)
            self._admit()
            if self.scheduler.has_unfinished:
                step()
        self.scheduler.log.close()
        return self.scheduler.log

    def _plain_step(self) -> None:
        started = self._start()
        if started is None:
            self._rest()
        else:
            self._land(started)

    def _overlapped_step(self) -> None:
        """As ``Engine`` does: start a step, then wait for the one before it."""
        started = self._start()
        before, self._in_flight = self._in_flight, started
        if before is not None:
            self._land(before)
        elif started is None:
            self._rest()
        if not self.scheduler.has_unfinished and self._in_flight is not None:
            last, self._in_flight = self._in_flight, None
            self._land(last)

    def _start(self) -> _Started | None:
        output = self.scheduler.schedule(self.now)
        if output.is_empty:
            return None
        self._idle_steps = 0
        self.now += self.setting.host_time
        row = self.scheduler.log.steps[-1]
        seconds = self.setting.step_time.seconds(row.num_steps, row.rows, row.kv_read, row.moved)
        self._device_free = max(self.now, self._device_free) + seconds
        return _Started(output, self._device_free)

    def _land(self, step: _Started) -> None:
        self.now = max(self.now, step.end)
        tokens = [[[OUTPUT_TOKEN] * s.samples for s in rows] for rows in step.output.replicas]
        advanced = self.scheduler.update(step.output, tokens)
        self.scheduler.log.stamp(self.now, exact=True)
        self.progress(sum(request.finish_reason is not None for request, _ in advanced))

    def _rest(self) -> None:
        """Nobody may run now."""
        self._idle_steps += 1
        if self._idle_steps > MOST_IDLE_STEPS:
            scheduler = self.scheduler
            raise ValueError(
                f"at {self.now:.3f} s nobody has run for {MOST_IDLE_STEPS * IDLE_SECONDS:.0f} s, with "
                f"{scheduler.num_running} running, {scheduler.num_waiting} waiting, {scheduler.num_swapped} swapped"
            )
        self.now += IDLE_SECONDS

    def _admit(self) -> None:
        """Queue everybody who has arrived, or turn them away."""
        log = self.scheduler.log
        while self._next < len(self.trace) and self.trace[self._next].arrival <= self.now:
            arrival, index = self.trace[self._next], self._next
            self._next += 1
            try:
                self.scheduler.check_fits(arrival.prompt_tokens, arrival.output_tokens)
                self.scheduler.check_queue(1, arrival.prompt_tokens)
                self.scheduler.add(self._request(arrival, index))
            except QueueFullError:
                log.rejected += 1
                self.progress(1)
            except ValueError as error:
                log.refused += 1
                log.refusal = log.refusal or str(error)
                self.progress(1)

    def _request(self, arrival: Arrival, index: int) -> Request:
        return Request(
            request_id=str(index),
            prompt_token_ids=arrival.tokens(index, self.seed),
            params=PARAMS,
            seed=0,
            stop_token_ids=frozenset(),
            max_tokens=arrival.output_tokens,
            metrics=RequestMetrics(arrival_time=arrival.arrival),
            priority=arrival.priority,
            tenant=arrival.tenant,
        )
