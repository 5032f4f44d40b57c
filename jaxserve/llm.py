"""The offline interface: prompts in, completions out."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import GEN_CLOSED, getgeneratorstate
from itertools import count
from pathlib import Path
from typing import Any, Unpack

from tqdm import tqdm

from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams, plan_searches, run_searches
from jaxserve.build import build_engine, join
from jaxserve.engine import Engine
from jaxserve.engine_args import EngineArgs, EngineOptions
from jaxserve.follower import Follower
from jaxserve.inputs import (
    Prompt,
    as_conversations,
    as_prompts,
    check_template_options,
    naming,
    need_tokenizer,
    one_each,
    read_conversation,
    read_prompt,
    refuse,
)
from jaxserve.layer_digest import LayerDigest, layer_digests
from jaxserve.metrics import EngineMetrics
from jaxserve.outputs import RequestOutput
from jaxserve.profiling import start_profile, stop_profile
from jaxserve.runner import CompileRecord
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.tokenizer import apply_chat_template


class LLM:
    """A model, loaded and compiled, that answers prompts.

    ``LLM("demo")``, ``LLM("path/to/checkpoint", tensor_parallel_size=4)``. ``EngineArgs`` lists the options;
    raises ValueError, NotImplementedError or FileNotFoundError with one clear line where they cannot be met.

    Where several processes are one engine, all run the same script, and only process 0 comes back from the
    constructor: the others compute with it until it ends or calls ``close``, and then exit (SystemExit).
    """

    def __init__(self, model: str | Path, **options: Unpack[EngineOptions]) -> None:
        self.args = EngineArgs.of(model, **options)
        self.engine: Engine = open_engine(self.args)
        self._ids = count()
        self._beginning = threading.Lock()  # of a call, so that two threads do not begin at once
        self._latest: Callable[[], Generator[Any, None, None] | None] = lambda: None  # refers to its outputs, weakly

    def close(self) -> None:
        """Let the other processes of the job end, if there are any; nothing can be generated afterwards. Happens by
        itself at the end of the program."""
        self.engine.journal.close()
        self.engine.trace.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tenant: str | Sequence[str] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts.

        sampling_params: one for all, or one each; None = ``SamplingParams()``. priority (lower goes first, under the
        priority policy) and tenant (whose service it is, under the fair policy): the same. Bad input raises
        ValueError before anything runs, QueueFullError where the queue has no room for all of it. Interrupted or
        failed, nothing of the call stays behind in the engine. One call at a time: RuntimeError while another thread's
        runs or a stream is open (``AsyncLLM`` serves many callers at once).
        """
        refuse(lora_request=lora_request)
        calls = self._calls(prompts, sampling_params, priority, tenant, final_only=True)
        finished = {o.request_id: o for o in self._start(calls, use_tqdm)}
        return [finished[request_id] for request_id in sorted(finished, key=int)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Outputs as they come, step by step, of the kind that ``SamplingParams.output_kind`` asks for.

        The call itself raises what ``generate`` raises, and queues the requests. Leaving the loop early aborts what is
        unfinished. One call at a time: while a stream is open, another call raises RuntimeError.
        """
        return self._start(self._calls(prompts, sampling_params, None, None, final_only=False), use_tqdm=False)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of {"role", "content"} messages) or a list of them. Content is text, or a
        list of {"type": "text", "text": ...} parts; ValueError for other parts, and for tools that the template
        ignores."""
        refuse(lora_request=lora_request)
        prompts = self.chat_prompts(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The ``params.beam_width`` likeliest continuations of every prompt, in the order of the prompts. At
        temperature 0 those of a prompt do not depend on what is searched with it.

        A round is one call of the engine: one token and its likeliest 2 * beam_width log-probabilities, of every beam
        of ``concurrency_limit`` prompts (None: all of them). The prefix cache has what a beam's earlier rounds and its
        siblings computed, so a round computes the tokens of a beam's last, partial block (1 to block_size of them). It
        computes every beam from its first token on, a cost that is quadratic in the length, with
        enable_prefix_caching=False, for models whose rope angles depend on the prompt's length, and where the cache is
        too small for all beams: lower ``concurrency_limit`` then.

        Bad input raises ValueError before anything runs, QueueFullError where the queue has no room for a round.
        Interrupted or failed, nothing of the call stays behind in the engine.
        """
        refuse(lora_request=lora_request)
        engine, vocab = self.engine, self.engine.runner.decoder.vocab_size
        known = engine.tokenizer, engine.eos_token_ids, vocab, engine.scheduler
        batches = plan_searches(as_prompts(prompts), params, concurrency_limit, *known)
        before, one_token = engine.metrics.snapshot(), params.of_a_round(vocab)
        with tqdm(total=sum(map(len, batches)), desc="searching", unit="prompt", disable=not use_tqdm) as bar:

            def ask(beams: list[Prompt]) -> list[RequestOutput]:
                outputs = self.generate(beams, one_token, use_tqdm=False)
                if use_tqdm:
                    _show_rates(bar, before, engine.metrics)
                bar.update(0)
                return outputs

            for batch in batches:
                for _ in run_searches(batch, ask):
                    bar.update()
        return [search.output(engine.tokenizer) for batch in batches for search in batch]

    def chat_prompts(self, messages: Any, **template_options: Any) -> list[list[int]]:
        """Token ids of conversations, through the checkpoint's chat template (or ``chat_template``)."""
        check_template_options(**template_options)
        tokenizer, conversations, prompts = self.get_tokenizer(), as_conversations(messages), []
        for i, conversation in enumerate(conversations):
            with naming("messages", i, len(conversations)):
                prompts.append(_chat_prompt(tokenizer, read_conversation(conversation), template_options))
        return prompts

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return need_tokenizer(self.engine.tokenizer)

    def get_metrics(self) -> EngineMetrics:
        """Counters since the engine was made."""
        return self.engine.metrics

    def layer_digests(self, prompt: Prompt) -> list[LayerDigest]:
        """Mean, rms and largest value of every layer's output for a prompt: compared between two meshes or dtypes by
        ``layer_digest.first_difference``, they name the first layer that differs."""
        if self.engine.runner.is_shared:
            raise NotImplementedError("layer digests are not supported with several processes: ask a single one")
        return layer_digests(self.engine.runner, read_prompt(prompt, self.engine.tokenizer)["prompt_token_ids"])

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix, as after a change of weights. Always succeeds: running requests keep the blocks
        that they hold, and nobody finds them any more."""
        self.engine.reset_prefix_cache()
        return True

    def start_profile(self, directory: str | Path = "profile") -> None:
        """Record what every device does, operation by operation, until ``stop_profile``; a few steps are enough. Scopes
        name the layer and its part. RuntimeError if a profile is being recorded."""
        start_profile(directory)

    def stop_profile(self) -> None:
        """Write the profile: for TensorBoard or Perfetto, and ``scripts/trace_report.py``."""
        stop_profile()

    def compiled_programs(self) -> list[CompileRecord]:
        """Every program that was compiled, when, and how long it took; after the constructor there are no more."""
        return list(self.engine.runner.compiled)

    # -- how a call runs ---------------------------------------------------------------------------------------------

    def _calls(
        self, prompts: Any, sampling_params: Any, priority: Any, tenant: Any, final_only: bool
    ) -> list[dict[str, Any]]:
        """Keyword arguments of ``Engine.add_request``, one per prompt."""
        prompts = as_prompts(prompts)
        params = one_each("sampling_params", SamplingParams, sampling_params, SamplingParams(), len(prompts))
        if final_only:
            params = [replace_kind(p, RequestOutputKind.FINAL_ONLY) for p in params]
        priorities = one_each("priority", int, priority, 0, len(prompts))
        tenants = one_each("tenant", str, tenant, "", len(prompts))
        ids, read = [str(next(self._ids)) for _ in prompts], []
        for i, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
            with naming("prompts", i, len(prompts)):
                read.append(self.engine.read_prompt(request_id, prompt))
        return [
            {"request_id": i, **prompt, "params": p, "priority": rank, "tenant": name}
            for i, prompt, p, rank, name in zip(ids, read, params, priorities, tenants, strict=True)
        ]

    def _start(self, calls: list[dict[str, Any]], use_tqdm: bool) -> Generator[RequestOutput, None, None]:
        """Queue the requests; their outputs as they come."""
        outputs = self._run(calls, use_tqdm)
        with self._beginning:
            latest = self._latest()
            if self.engine.has_unfinished or (latest is not None and getgeneratorstate(latest) != GEN_CLOSED):
                raise RuntimeError(
                    "this LLM is in another call, or has a stream open: let the one end, read the other to its end or "
                    "close() it (AsyncLLM takes calls from several threads at once)"
                )
            self._latest = weakref.ref(outputs)
        next(outputs)  # a generator that has begun cleans up when it is closed or forgotten, one that has not does not
        return outputs

    def _run(self, calls: list[dict[str, Any]], use_tqdm: bool) -> Generator[Any, None, None]:
        """None once the requests are queued, and then outputs."""
        ids = [call["request_id"] for call in calls]
        try:
            for i, call in enumerate(calls):
                with naming("prompts", i, len(calls)):
                    self.engine.add_request(**call)
            yield None
            yield from self._drain(len(ids), use_tqdm)
        finally:
            for request_id in ids:
                self.engine.abort(request_id)

    def _drain(self, num_requests: int, use_tqdm: bool) -> Generator[RequestOutput, None, None]:
        """Step until nothing is left; the bar counts finished requests and shows tokens per second."""
        before = self.engine.metrics.snapshot()
        with tqdm(total=num_requests, desc="generating", unit="req", disable=not use_tqdm) as bar:
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    bar.update(output.finished)
                    yield output
                if use_tqdm:
                    _show_rates(bar, before, self.engine.metrics)


def open_engine(args: EngineArgs) -> Engine:
    """Join the job, if there are several processes, and build the engine. Comes back in process 0 only: the others
    follow it and then exit (SystemExit). They are let go at the end of the program, if not before."""
    job = join(args)
    with nullcontext() if job is None else job.reporting():
        engine = build_engine(args, job)
    if job is not None and not job.is_leader:
        Follower(engine, job).run()
        raise SystemExit(0)
    if job is not None:
        atexit.register(engine.journal.close)
    weakref.finalize(engine, engine.trace.close)  # with the engine, or at the end of the program
    return engine


def _chat_prompt(tokenizer: Any, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> list[int]:
    """Token ids of a conversation; ValueError for tools that the template leaves out."""
    prompt = apply_chat_template(tokenizer, messages, **options)
    without: dict[str, Any] = {**options, "tools": None}
    if options.get("tools") and prompt == apply_chat_template(tokenizer, messages, **without):
        raise ValueError("tools: this model's chat template takes no tools, the prompt is the same without them")
    return prompt


def replace_kind(params: SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    return params if params.output_kind is kind else replace(params, output_kind=kind)


def _show_rates(bar: Any, before: EngineMetrics, now: EngineMetrics) -> None:
    seconds = bar.format_dict["elapsed"] or 1e-9
    read = (now.num_prompt_tokens - before.num_prompt_tokens) / seconds
    written = (now.num_generation_tokens - before.num_generation_tokens) / seconds
    bar.set_postfix_str(f"{read:.0f} prompt tok/s, {written:.0f} output tok/s", refresh=False)
