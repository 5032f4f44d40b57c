"""The loop: schedule, run, update. Read ``Engine.step`` first."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.batch import BatchBuilder
from jaxserve.completion import Completion, RequestGroup
from jaxserve.inputs import Prompt, read_prompt
from jaxserve.journal import Journal
from jaxserve.metrics import EngineMetrics
from jaxserve.outputs import RequestMetrics, RequestOutput
from jaxserve.pipeline import Pipeline
from jaxserve.request import Request, Status
from jaxserve.runner import ModelRunner, PendingStep
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Advanced, Scheduler, SchedulerOutput
from jaxserve.scoring import Owners, add_logprobs
from jaxserve.slot_rows import SlotRows
from jaxserve.tokenizer import bad_word_token_sequences
from jaxserve.trace import Trace

IDLE_SECONDS = 0.001
"""How long a step in which nobody may run (rate caps) waits before the next is tried."""


@dataclass(frozen=True)
class InFlight:
    """A step that was started and whose tokens have not been read; of a pipeline, what left it."""

    schedule: SchedulerOutput
    pending: PendingStep


class Engine:
    """Requests in, request outputs out, one step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Any | None,
        eos_token_ids: Sequence[int],
        seed: int = 0,
        async_scheduling: bool = True,
        journal: Journal | None = None,
        trace: Trace | None = None,
    ) -> None:
        """``journal``: of an engine of several processes, what the others have to do too. ``trace``: who is told where
        the time goes."""
        self.scheduler, self.runner, self.tokenizer = scheduler, runner, tokenizer
        self.eos_token_ids, self.seed = tuple(eos_token_ids), seed
        self.async_scheduling = async_scheduling
        self.metrics = EngineMetrics(scheduler.counters)
        self._batches = BatchBuilder(scheduler.config)
        self._slot_rows = SlotRows(runner)
        self._groups: dict[str, RequestGroup] = {}
        self._owners: Owners = {}
        self._num_requests = 0
        self._in_flight: InFlight | None = None
        self._pipeline = Pipeline(runner, scheduler.config) if scheduler.config.num_stages > 1 else None
        self.journal, self.trace = journal or Journal(), trace or Trace()
        self._seen_busy: float | None = None  # when a step was last known to be running

    # -- requests ----------------------------------------------------------------------------------------------------

    def read_prompt(self, request_id: str, prompt: Prompt) -> dict[str, Any]:
        """A prompt as ``add_request`` wants it, tokenized. Any thread may call."""
        begin = time.perf_counter()
        request = read_prompt(prompt, self.tokenizer)
        self.trace.tokenized(request_id, begin, len(request["prompt_token_ids"]))
        return request

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request. Raises ValueError, or QueueFullError, and queues nothing, if it cannot be served."""
        begin = time.perf_counter()
        self._check(request_id, prompt_token_ids, params)
        self.scheduler.check_queue(params.n, params.n * len(prompt_token_ids))
        ending = params.all_stop_token_ids(self.eos_token_ids)
        bad_words: list[tuple[int, ...]] = []
        if params.bad_words and self.tokenizer is not None:
            bad_words = bad_word_token_sequences(self.tokenizer, params.bad_words)
        _check_something_is_left(params, ending, [word[0] for word in bad_words if len(word) == 1])
        room = self.scheduler.config.max_model_len - len(prompt_token_ids)
        requests = [
            Request(
                request_id=f"{request_id}/{i}" if params.n > 1 else request_id,
                prompt_token_ids=prompt_token_ids,
                params=params,
                seed=self._seed_of(params, i),
                stop_token_ids=frozenset(ending),
                max_tokens=room if params.max_tokens is None else params.max_tokens,
                metrics=RequestMetrics(arrival_time=time.monotonic()),
                priority=priority,
                tenant=tenant,
                cache_salt=cache_salt,
                waits_for_tokens=any(len(word) > 1 for word in bad_words),
                single_steps=params.logprobs is not None or params.min_tokens > 0,
                reads_prefix_cache=params.prompt_logprobs is None,
            )
            for i in range(params.n)
        ]
        self._num_requests += 1
        completions = [Completion(i, request, self.tokenizer) for i, request in enumerate(requests)]
        group = RequestGroup(request_id, prompt, params, completions)
        self._groups[request_id] = group
        for request, completion in zip(requests, completions, strict=True):
            self._owners[request.request_id] = group, completion
            self._slot_rows.add(request, ending, bad_words)
            self.scheduler.add(request)
        self.trace.added(requests, begin)

    def _check(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        vocab = self.runner.decoder.vocab_size
        if request_id in self._groups:
            raise ValueError(f"request id {request_id!r} is in use: give every unfinished request its own")
        outside = next((t for t in prompt if not 0 <= t < vocab), None)
        if outside is not None:
            raise ValueError(f"prompt token id {outside} is outside of the vocabulary (0 to {vocab - 1})")
        params.check_vocabulary(vocab)
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop and bad_words need a tokenizer, and this engine has none (skip_tokenizer_init)")
        room = self.scheduler.config.max_model_len - len(prompt)
        self.scheduler.check_fits(len(prompt), room if params.max_tokens is None else params.max_tokens)

    def _seed_of(self, params: SamplingParams, index: int) -> int:
        """64 bits: the request's own seed plus the completion's index, or one drawn from the engine's seed."""
        if params.seed is not None:
            return (params.seed + index) % 2**64
        text = f"{self.seed}:{self._num_requests}:{index}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its output so far, or None if it is not known."""
        group = self._groups.get(request_id)
        if group is None:
            return None
        for completion in group.completions:
            if completion.request.finish_reason is None:
                self.scheduler.finish(completion.request, "abort")
                self._note_end(completion)
        output = self._collect([group], final=True)[0]
        if not self._groups:
            self.trace.rested()
        return output

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    @property
    def is_busy(self) -> bool:
        """Whether a step has something to do: for a request, or to read what is in flight for one that was aborted."""
        return bool(self._groups) or self._in_flight is not None

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""
        self.scheduler.reset_prefix_cache()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """One step of every replica. Returns the outputs of the requests that advanced."""
        self.trace.begin()
        try:
            with self.journal:
                outputs = self._overlapped_step() if self.async_scheduling else self._plain_step()
        except BaseException:
            # Blocks may be named whose contents were never computed, and nobody will read what is in flight.
            self._in_flight = None
            if self._pipeline is not None:
                self._pipeline.clear()
            self.scheduler.reset_prefix_cache()
            self.trace.failed()
            raise
        self.trace.end(self.is_busy)
        return outputs

    def _plain_step(self) -> list[RequestOutput]:
        """Start a step and wait for it."""
        started = self._start()
        return self._land(started) if started else self._rest()

    def _overlapped_step(self) -> list[RequestOutput]:
        """Start a step, then read the one before it: the host works while the devices do."""
        started = self._start()
        before, self._in_flight = self._in_flight, started
        if before is None:
            return [] if started else self._rest()
        outputs = self._land(before)
        if not self._groups and self._in_flight is not None:  # started for requests that had ended
            last, self._in_flight = self._in_flight, None
            self._land(last)
        if not self._groups and self._pipeline is not None:
            self._pipeline.clear()
            self.journal.write("clear")
        return outputs

    def _start(self) -> InFlight | None:
        """Schedule a step and hand it to the devices; None if there is nothing to compute."""
        start = time.perf_counter()
        schedule = self.scheduler.schedule(time.monotonic())
        self.trace.mark("schedule")
        if schedule.preempted:
            self.trace.preempted(schedule.preempted)
        if schedule.swap_outs or schedule.swap_ins or schedule.dropped:
            self.runner.move_blocks(schedule.swap_outs, schedule.swap_ins, schedule.dropped)
            self.trace.mark("move blocks")
        if schedule.is_empty and (self._pipeline is None or self._pipeline.is_empty):
            return None
        rows = schedule.bucket or self.runner.config.decode_buckets[0]
        batch = self._batches.build(
            schedule, self.runner.config.layout(rows, schedule.one_token_each, schedule.num_steps)
        )
        self.trace.mark("build batch")
        self._slot_rows.write(schedule)
        self.trace.mark("write sampler rows")
        self._note_idle()
        if self._pipeline is None:
            started, stages = InFlight(schedule, self.runner.step(batch)), [schedule]
        else:
            started = InFlight(*self._pipeline.tick(schedule, batch))
            stages = self._pipeline.schedules
        self._note_scheduled(schedule)
        self.trace.mark("dispatch")
        self.trace.started(stages, started.pending.program)
        self.metrics.host_seconds += time.perf_counter() - start
        return started

    def _land(self, step: InFlight) -> list[RequestOutput]:
        """Wait for a step's tokens and hand them out."""
        if step.schedule.is_empty:  # the pipeline is being filled
            self.trace.passed()
            return []
        self.trace.flush()
        late, start = step.pending.is_ready(), time.perf_counter()
        output = step.pending.output()
        landed = self._seen_busy = time.perf_counter()
        self.trace.mark("wait for the devices")
        tokens = output.rows(step.schedule)
        owners, announce = self._owners, self.journal.send
        add_logprobs(step.schedule, tokens, step.pending, owners, self.runner, self.tokenizer, announce)
        self.metrics.num_late_rows += sum(
            s.request.status is Status.FINISHED for rows in step.schedule.replicas for s in rows
        )
        self.trace.mark("log-probabilities")
        advanced = self.scheduler.update(step.schedule, tokens)
        self.trace.landed(advanced, landed, late)
        self.trace.mark("update")
        outputs = self._deliver(advanced)
        self.trace.mark("detokenise")
        self.metrics.wait_seconds += landed - start
        self.metrics.host_seconds += time.perf_counter() - landed
        if not self._groups:
            self._seen_busy = None
        return outputs

    def _rest(self) -> list[RequestOutput]:
        """Nobody may run now; somebody may later."""
        if self._groups:
            time.sleep(IDLE_SECONDS)
            self.trace.mark("nobody may run")
        return []

    def _deliver(self, advanced: list[Advanced]) -> list[RequestOutput]:
        """Text, stop strings and outputs of the requests that got tokens."""
        now = time.monotonic()
        groups: dict[str, RequestGroup] = {}
        for request, token_ids in advanced:
            group, completion = self._owners[request.request_id]
            groups[group.request_id] = group
            metrics = request.metrics
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
            self._append(completion, token_ids)
            self.metrics.num_generation_tokens += len(token_ids)
            if request.finish_reason is not None:
                self._note_end(completion)
        return self._collect(list(groups.values()))

    def _append(self, completion: Completion, token_ids: list[int]) -> None:
        """Add tokens to the text, up to the first stop string."""
        request = completion.request
        before = len(request.output_token_ids) - len(token_ids)
        for count, token_id in enumerate(token_ids, before + 1):
            matched = completion.append(token_id, count)
            if matched is not None:
                self.scheduler.finish(request, "stop", matched, keep=count)
                return

    def _note_end(self, completion: Completion) -> None:
        request = completion.request
        request.metrics.finished_time = time.monotonic()
        matched = completion.finish()
        if matched is not None:
            request.finish_reason, request.stop_reason = "stop", matched
        self._slot_rows.remove(request)
        self.trace.ended(request)
        self.metrics.num_finished[request.finish_reason or "abort"] += 1

    def _collect(self, groups: list[RequestGroup], final: bool = False) -> list[RequestOutput]:
        """Outputs of the groups; what is finished is forgotten."""
        outputs = [output for group in groups if (output := group.output()) is not None]
        for group in groups:
            if group.finished or final:
                del self._groups[group.request_id]
                for completion in group.completions:
                    del self._owners[completion.request.request_id]
        return outputs

    def _note_idle(self) -> None:
        """Count for how long the devices may have had nothing to do."""
        busy = self._in_flight is not None and not self._in_flight.pending.is_ready()
        if self._seen_busy is not None and not busy:
            self.metrics.device_idle_seconds += time.perf_counter() - self._seen_busy

    def _note_scheduled(self, schedule: SchedulerOutput) -> None:
        now = time.monotonic()
        self.metrics.num_steps += 1
        for rows in schedule.replicas:
            for s in rows:
                prompt = len(s.request.prompt_token_ids)
                if s.start < prompt:
                    self.metrics.num_prompt_tokens += min(s.start + s.count, prompt) - s.start
                if s.is_new and s.request.metrics.first_scheduled_time is None:
                    s.request.metrics.first_scheduled_time = now


def _check_something_is_left(params: SamplingParams, ending: Sequence[int], bad_tokens: Sequence[int]) -> None:
    """ValueError if a token that comes first, or at any time, has been forbidden whichever it is."""
    if params.allowed_token_ids is None:
        return
    forbidden = {
        "bad_words": set(bad_tokens),
        f"min_tokens={params.min_tokens}": set(ending if params.min_tokens else ()),
    }
    if set(params.allowed_token_ids) <= set().union(*forbidden.values()):
        by = " and ".join(name for name, ids in forbidden.items() if ids & set(params.allowed_token_ids))
        raise ValueError(f"allowed_token_ids {list(params.allowed_token_ids)} are all forbidden, by {by}: allow others")
