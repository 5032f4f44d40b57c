"""The loop: schedule, run, update. Read ``Engine.step`` first."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from jaxserve.batch import build_batch
from jaxserve.completion import Completion, RequestGroup, logprob_entry
from jaxserve.logit_edits import LogitEdits, edits_logits, has_penalties, token_counts
from jaxserve.outputs import RequestMetrics, RequestOutput
from jaxserve.request import Request
from jaxserve.runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduled, Scheduler, SchedulerOutput
from jaxserve.tokenizer import bad_word_token_sequences


@dataclass
class EngineMetrics:
    """Counters since the engine was made; times in seconds."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed, again after a preemption included."""
    num_generation_tokens: int = 0
    num_padding_tokens: int = 0
    """Token rows of steps that held no token."""
    num_preemptions: int = 0
    num_finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})
    host_seconds: float = 0.0
    """Scheduling, building batches, updating, detokenising."""
    device_seconds: float = 0.0
    """Transfers and waiting for the step's tokens."""

    @property
    def host_share(self) -> float:
        """Share of the time in ``step`` that the device half waited for the host half."""
        total = self.host_seconds + self.device_seconds
        return self.host_seconds / total if total else 0.0


class Engine:
    """Requests in, request outputs out, one step at a time."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Any | None,
        eos_token_ids: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.scheduler, self.runner, self.tokenizer = scheduler, runner, tokenizer
        self.eos_token_ids, self.seed = tuple(eos_token_ids), seed
        self.metrics = EngineMetrics()
        self._groups: dict[str, RequestGroup] = {}
        self._owner: dict[str, tuple[RequestGroup, Completion]] = {}
        self._edits: dict[str, LogitEdits] = {}
        self._biased_slots: set[tuple[int, int]] = set()
        self._num_requests = 0

    # -- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> None:
        """Queue a request. Raises ValueError, and queues nothing, if it could not be served."""
        vocab = self.runner.decoder.vocab_size
        self._check(request_id, prompt_token_ids, params, vocab)
        ending = params.all_stop_token_ids(self.eos_token_ids)
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
            )
            for i in range(params.n)
        ]
        self._num_requests += 1
        bad_words: list[tuple[int, ...]] = []
        if params.bad_words and self.tokenizer is not None:
            bad_words = bad_word_token_sequences(self.tokenizer, params.bad_words)
        completions = [Completion(i, request, self.tokenizer) for i, request in enumerate(requests)]
        group = RequestGroup(request_id, prompt, params, completions)
        self._groups[request_id] = group
        for request, completion in zip(requests, completions, strict=True):
            self._owner[request.request_id] = group, completion
            if edits_logits(params):
                self._edits[request.request_id] = LogitEdits(params, vocab, ending, bad_words)
            self.scheduler.add(request)

    def _check(self, request_id: str, prompt: list[int], params: SamplingParams, vocab: int) -> None:
        if request_id in self._groups:
            raise ValueError(f"request id {request_id!r} is in use: give every unfinished request its own")
        outside = next((t for t in prompt if not 0 <= t < vocab), None)
        if outside is not None:
            raise ValueError(f"prompt token id {outside} is outside of the vocabulary (0 to {vocab - 1})")
        params.check_vocabulary(vocab)
        if params.allowed_token_ids is not None and params.min_tokens:
            ending = params.all_stop_token_ids(self.eos_token_ids)
            if set(params.allowed_token_ids) <= set(ending):
                raise ValueError(
                    f"min_tokens={params.min_tokens} forbids the tokens that end a request, and allowed_token_ids "
                    f"allows no others: {list(params.allowed_token_ids)}"
                )
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
        return self._collect([group], final=True)[0]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """One step of every replica. Returns the outputs of the requests that advanced."""
        start = time.perf_counter()
        schedule = self.scheduler.schedule()
        if schedule.is_empty:
            return []
        layout = self.runner.config.layout(schedule.num_tokens, schedule.one_token_each)
        batch = build_batch(schedule, layout, self.scheduler.config.block_size)
        self._note_scheduled(schedule, batch.layout.num_tokens)
        built = time.perf_counter()
        self._write_slots(schedule)
        output, hidden = self.runner.step(batch)
        self._score(schedule, output.token_ids, hidden)
        ran = time.perf_counter()
        tokens = [
            [int(output.token_ids[i, row]) for row in range(len(rows))] for i, rows in enumerate(schedule.replicas)
        ]
        outputs = self._deliver(self.scheduler.update(schedule, tokens))
        self.metrics.device_seconds += ran - built
        self.metrics.host_seconds += time.perf_counter() - ran + built - start
        return outputs

    def _write_slots(self, schedule: SchedulerOutput) -> None:
        """Bring the device's sampler rows up to date for requests that enter a slot or whose edits changed."""
        vocab = self.runner.decoder.vocab_size
        for replica, rows in enumerate(schedule.replicas):
            for s in rows:
                request, slot = s.request, (replica, s.slot)
                edits, output = self._edits.get(request.request_id), request.output_token_ids
                bias = None if edits is None else edits.row(output, rewrite=s.is_new)
                stale = s.is_new and (has_penalties(request.params) or slot in self._biased_slots)
                if bias is None and not stale:
                    continue
                (self._biased_slots.discard if bias is None else self._biased_slots.add)(slot)
                counts = token_counts(request.prompt_token_ids, output, vocab)
                self.runner.write_slot(*slot, np.zeros(vocab, np.float32) if bias is None else bias, counts)

    def _deliver(self, advanced: list[Request]) -> list[RequestOutput]:
        """Text, stop strings and outputs of the requests that got a token."""
        now = time.monotonic()
        groups: dict[str, RequestGroup] = {}
        for request in advanced:
            group, completion = self._owner[request.request_id]
            groups[group.request_id] = group
            metrics = request.metrics
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
            self.metrics.num_generation_tokens += 1
            matched = completion.append(request.output_token_ids[-1])
            if matched is not None:
                self.scheduler.finish(request, "stop", matched)
                request.finish_reason, request.stop_reason = "stop", matched
            if request.finish_reason is not None:
                self._note_end(completion)
        return self._collect(list(groups.values()))

    def _note_end(self, completion: Completion) -> None:
        request = completion.request
        request.metrics.finished_time = time.monotonic()
        matched = completion.finish()
        if matched is not None:
            request.finish_reason, request.stop_reason = "stop", matched
        self._edits.pop(request.request_id, None)
        self.metrics.num_finished[request.finish_reason or "abort"] += 1

    def _collect(self, groups: list[RequestGroup], final: bool = False) -> list[RequestOutput]:
        """Outputs of the groups; what is finished is forgotten."""
        outputs = [output for group in groups if (output := group.output()) is not None]
        for group in groups:
            if group.finished or final:
                del self._groups[group.request_id]
                for completion in group.completions:
                    del self._owner[completion.request.request_id]
        return outputs

    def _note_scheduled(self, schedule: SchedulerOutput, bucket: int) -> None:
        metrics, now = self.metrics, time.monotonic()
        metrics.num_steps += 1
        metrics.num_preemptions += len(schedule.preempted)
        for rows in schedule.replicas:
            metrics.num_padding_tokens += bucket
            for s in rows:
                prompt = max(0, min(s.start + s.count, s.request.num_prompt_tokens) - s.start)
                metrics.num_prompt_tokens += prompt
                metrics.num_padding_tokens -= s.count
                s.request.metrics.first_scheduled_time = s.request.metrics.first_scheduled_time or now

    # -- log-probabilities -------------------------------------------------------------------------------------------

    def _score(self, schedule: SchedulerOutput, tokens: np.ndarray, hidden: Array) -> None:
        """Log-probabilities that requests asked for, of sampled tokens and of prompt tokens."""
        wanted = [w for i, rows in enumerate(schedule.replicas) for w in self._wanted_scores(i, rows, tokens)]
        if not wanted:
            return
        states = np.asarray(hidden)
        rows = np.stack([states[w.replica, w.row] for w in wanted])
        targets = np.array([w.target for w in wanted])
        num_top = -1 if any(w.num_top < 0 for w in wanted) else max(w.num_top for w in wanted)
        scores = self.runner.score(rows, targets, num_top)
        for i, w in enumerate(wanted):
            top = slice(None) if w.num_top < 0 else slice(w.num_top)
            chosen = (w.target, float(scores.target[i]), int(scores.rank[i]))
            tokenizer = self.tokenizer if w.request.params.detokenize else None
            entry = logprob_entry(
                chosen, scores.top_ids[i, top].tolist(), scores.top_logprobs[i, top].tolist(), tokenizer
            )
            group, completion = self._owner[w.request.request_id]
            if w.is_prompt:
                assert group.prompt_logprobs is not None
                group.prompt_logprobs.append(entry)
            else:
                completion.add_logprobs(entry, w.target)

    def _wanted_scores(self, replica: int, rows: list[Scheduled], tokens: np.ndarray) -> list[_WantedScore]:
        wanted, at = [], 0
        for row, s in enumerate(rows):
            request, params = s.request, s.request.params
            group, completion = self._owner[request.request_id]
            if group.prompt_logprobs is not None and completion.index == 0:
                have = len(group.prompt_logprobs)
                for position in range(max(s.start + 1, have), min(s.start + s.count + 1, request.num_prompt_tokens)):
                    token = request.prompt_token_ids[position]
                    num_top = params.prompt_logprobs or 0
                    wanted.append(_WantedScore(request, replica, at + position - 1 - s.start, token, num_top, True))
            if s.samples and params.logprobs is not None:
                token = int(tokens[replica, row])
                wanted.append(_WantedScore(request, replica, at + s.count - 1, token, params.logprobs, False))
            at += s.count
        return wanted


@dataclass(frozen=True)
class _WantedScore:
    """The log-probability of ``target`` after row ``row`` of a replica's tokens, and of ``num_top`` others."""

    request: Request
    replica: int
    row: int
    target: int
    num_top: int
    is_prompt: bool
