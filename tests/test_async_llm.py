"""The engine behind asyncio: the answers of ``LLM``, whoever is slow, leaves early, or comes from another loop; and a
clear end when it fails or is shut down."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_models import PROMPT, SMALL, run

from jaxserve import LLM, AsyncLLM, EngineDeadError, RequestOutput, RequestOutputKind, SamplingParams
from jaxserve.async_llm import async_llm, engine_thread
from jaxserve.engine import Engine
from jaxserve.journal import Journal
from jaxserve.outputs import CompletionOutput
from jaxserve.scheduler import QueueFullError, Scheduler

CUMULATIVE, DELTA, FINAL = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
TOLERANCE = 2e-4
"""Of log-probabilities: requests meet others in their steps than with ``LLM``."""
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, output_kind=DELTA)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PATIENCE = 30.0
"""Seconds after which a test gives up waiting."""
LONGEST = 150.0
"""The same where processes are started."""


def serve[T](engine: Engine, callers: Callable[[AsyncLLM], Awaitable[T]]) -> T:
    """Run ``callers`` with the engine behind asyncio, and see that nothing is left behind."""

    async def main() -> T:
        async with AsyncLLM.from_engine(engine) as llm:
            result = await asyncio.wait_for(callers(llm), PATIENCE)
            await idle(llm)
        return result

    result = asyncio.run(main())
    check_nothing_is_left(engine)
    return result


class Gate:
    """In front of an engine's steps: how many may be taken. So that who comes first is not a matter of luck: a step of
    so small a model takes less time than a thread may wait for its turn."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.step = engine, engine.step
        self.is_open = False
        self._allowed = threading.Semaphore(0)

    def take_step(self) -> list[RequestOutput]:
        """In place of ``Engine.step``; requests may come and go while the gate is closed."""
        if self.is_open or not self.engine.has_unfinished or self._allowed.acquire(blocking=False):
            return self.step()
        time.sleep(0.001)
        return []

    def let(self, num_steps: int) -> None:
        self._allowed.release(num_steps)


@pytest.fixture
def gate(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Of ``tiny_llm``, closed; overlapped steps have their first output after two."""
    gate = Gate(tiny_llm.engine)
    monkeypatch.setattr(tiny_llm.engine, "step", gate.take_step)
    return gate


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def idle(llm: AsyncLLM) -> None:
    """Until the engine has ended what it was told to end; a turn of its loop comes before the answer to a call."""
    if llm.is_running:
        await asyncio.wrap_future(llm._thread.call(lambda: None))
        assert not llm._thread._streams and not llm._thread._engine_ids
        assert not llm.engine.has_unfinished


def check_nothing_is_left(engine: Engine) -> None:
    assert not engine.is_busy and not engine.scheduler.has_unfinished
    assert not engine._owners
    assert [replica.kv.num_held for replica in engine.scheduler.replicas] == [0]
    engine.scheduler.check_integrity()


async def collect(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    return (await collect(outputs))[-1]


def joined(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    """The completions of a request, from its deltas."""
    completions = [replace(c, token_ids=list(c.token_ids)) for c in outputs[0].outputs]
    for output in outputs[1:]:
        for whole, piece in zip(completions, output.outputs, strict=True):
            whole.text += piece.text
            whole.token_ids += piece.token_ids
            whole.logprobs = None if whole.logprobs is None else whole.logprobs + (piece.logprobs or [])
            whole.cumulative_logprob = piece.cumulative_logprob
            whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
    return completions


def whole(kind: RequestOutputKind, outputs: list[RequestOutput]) -> RequestOutput:
    """What the outputs of a request say, taken together."""
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert kind is not FINAL or len(outputs) == 1
    if kind is not DELTA:
        return outputs[-1]
    prompt = [entry for o in outputs for entry in o.prompt_logprobs or ()]
    return replace(outputs[-1], outputs=joined(outputs), prompt_logprobs=prompt or None)


def check_same(expected: RequestOutput, got: RequestOutput) -> None:
    assert (got.prompt, got.prompt_token_ids) == (expected.prompt, expected.prompt_token_ids)
    check_entries(expected.prompt_logprobs, got.prompt_logprobs)
    assert len(expected.outputs) == len(got.outputs)
    for a, b in zip(expected.outputs, got.outputs, strict=True):
        assert (b.index, b.text, b.token_ids) == (a.index, a.text, a.token_ids)
        assert (b.finish_reason, b.stop_reason) == (a.finish_reason, a.stop_reason)
        assert b.cumulative_logprob == pytest.approx(a.cumulative_logprob, abs=20 * TOLERANCE)
        check_entries(a.logprobs, b.logprobs)


def check_entries(expected: Any, got: Any) -> None:
    assert (expected is None) == (got is None)
    for a, b in zip(expected or [], got or [], strict=True):
        assert (a is None) == (b is None) and list(a or []) == list(b or [])
        for token in a or []:
            assert b[token].logprob == pytest.approx(a[token].logprob, abs=TOLERANCE)


# -- the same answers --------------------------------------------------------------------------------------------------


def requests(llm: LLM) -> list[tuple[Any, SamplingParams]]:
    """Of many kinds; the stop strings begin in one token and end in another."""
    text = run(llm, "hello bad world", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0].outputs[0].text
    sampled = SamplingParams(temperature=0.9, max_tokens=17, ignore_eos=True)
    return [
        ("hello bad world", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=[text[5:9], "?!?"])),
        ("hello bad world", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=text[12:15])),
        (PROMPT, replace(sampled, seed=3, logprobs=2, prompt_logprobs=1)),
        ({"prompt": "日本 hello", "cache_salt": "x"}, replace(sampled, seed=4, n=3, presence_penalty=0.7)),
        (list(range(1, 70)), replace(sampled, seed=5, n=2, logprobs=0)),
        ({"prompt_token_ids": [9] * 33}, SamplingParams(temperature=0, max_tokens=9)),
        ([7], replace(sampled, seed=6, bad_words=["bad"], max_tokens=30)),
    ]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_the_same_answers_as_llm(
    tiny_llm: LLM, gate: Gate, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    gate.is_open = True
    wanted = requests(tiny_llm)
    expected = run(tiny_llm, [prompt for prompt, _ in wanted], [params for _, params in wanted])
    kinds = [CUMULATIVE, DELTA, FINAL]
    gate.is_open = False
    calls = [(i, replace(wanted[i][1], output_kind=kind)) for i in range(len(wanted)) for kind in kinds]
    random.Random(async_scheduling).shuffle(calls)

    async def one(llm: AsyncLLM, at: int, i: int, params: SamplingParams) -> None:
        outputs = await collect(llm.generate(wanted[i][0], params, f"request {at}"))
        assert {o.request_id for o in outputs} == {f"request {at}"}
        check_same(expected[i], whole(params.output_kind, outputs))

    async def callers(llm: AsyncLLM) -> None:
        tasks = []
        for at, call in enumerate(calls):  # some at once, others while these run
            tasks.append(asyncio.create_task(one(llm, at, *call)))
            if at % 6 == 5:
                await until(lambda: llm._thread._num_requests == len(tasks))
                gate.let(5)
        gate.is_open = True
        await asyncio.gather(*tasks)

    monkeypatch.setattr(tiny_llm.engine, "async_scheduling", async_scheduling)
    before = tiny_llm.get_metrics().num_steps
    serve(tiny_llm.engine, callers)
    tokens = sum(len(c.token_ids) for o in expected for c in o.outputs) * len(kinds)
    assert tiny_llm.get_metrics().num_steps - before < tokens / 2  # they ran together


def test_outputs_come_one_by_one(tiny_llm: LLM, gate: Gate) -> None:
    async def callers(llm: AsyncLLM) -> list[RequestOutput]:
        outputs = []
        gate.is_open = False
        gate.let(2)
        async for output in llm.generate(PROMPT, replace(SHORT, output_kind=CUMULATIVE)):
            outputs.append(output)
            gate.let(1)
        return outputs

    gate.is_open = True
    (final,) = run(tiny_llm, [PROMPT], SHORT)
    outputs = serve(tiny_llm.engine, callers)
    tokens = final.outputs[0].token_ids
    assert [o.outputs[0].token_ids for o in outputs] == [tokens[:count] for count in range(1, 7)]


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_an_output_does_not_change_after_it_was_taken(tiny_llm: LLM, gate: Gate, kind: RequestOutputKind) -> None:
    async def callers(llm: AsyncLLM) -> None:
        params = replace(LONG, output_kind=kind, logprobs=0, prompt_logprobs=0)
        async with aclosing(llm.generate(PROMPT, params)) as outputs:
            gate.let(2)
            first = await anext(outputs)
            as_it_was = repr(first)
            gate.let(9)
            assert len((await anext(outputs)).outputs[0].token_ids) >= 1
            await anext(outputs)
        assert repr(first) == as_it_was

    serve(tiny_llm.engine, callers)


def test_what_the_scheduler_is_told(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    real = tiny_llm.engine.add_request

    def add_request(request_id: str, **arguments: Any) -> None:
        told.append(arguments)
        real(request_id, **arguments)

    async def callers(llm: AsyncLLM) -> None:
        await last(llm.generate({"prompt": "hello", "cache_salt": "s"}, priority=3, tenant="a"))
        await last(llm.generate(PROMPT, SHORT))

    monkeypatch.setattr(tiny_llm.engine, "add_request", add_request)
    serve(tiny_llm.engine, callers)
    rest = [{k: v for k, v in arguments.items() if k != "prompt_token_ids"} for arguments in told]
    assert rest[0] == {
        "params": SamplingParams(),
        "prompt": "hello",
        "cache_salt": "s",
        "priority": 3,
        "tenant": "a",
    }
    assert rest[1] == {"params": SHORT, "priority": 0, "tenant": ""}


def test_the_constructor_takes_the_options_of_llm(tiny_llm: LLM, tiny_model: Path) -> None:
    async def main() -> RequestOutput:
        async with AsyncLLM(tiny_model, use_tqdm_on_load=False, **SMALL) as llm:
            assert llm.is_running and llm.get_tokenizer() is llm.engine.tokenizer
            output = await last(llm.generate("hello", SHORT))
            assert await llm.reset_prefix_cache() is True
            assert llm.get_metrics().num_generation_tokens == 6
        assert not llm.is_running and not llm.errored
        return output

    check_same(run(tiny_llm, "hello", SHORT)[0], asyncio.run(main()))
    with pytest.raises(TypeError, match="unknown argument 'tensor_parallel'"):
        AsyncLLM(tiny_model, tensor_parallel=2)  # pyright: ignore[reportCallIssue]


# -- who leaves early --------------------------------------------------------------------------------------------------


async def cancelled(llm: AsyncLLM, gate: Gate) -> None:
    task = asyncio.create_task(collect(llm.generate(PROMPT, LONG)))
    await until(lambda: llm._thread._num_requests == 2)
    gate.let(2)
    await until(lambda: llm.engine.scheduler.num_running == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancelled_at_once(llm: AsyncLLM, gate: Gate) -> None:
    """At every point on the way into the engine."""
    gate.let(30)
    for turns in range(12):
        task = asyncio.create_task(collect(llm.generate(PROMPT, LONG, "always the same")))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def broken_out(llm: AsyncLLM, gate: Gate) -> None:
    gate.let(30)
    async for output in llm.generate(PROMPT, replace(LONG, n=2)):
        if output.outputs[1].token_ids:
            break
    await until(lambda: len(llm._thread._streams) == 1)  # asyncio closes a generator that nobody holds a moment later


async def closed(llm: AsyncLLM, gate: Gate) -> None:
    gate.let(30)
    async with aclosing(llm.generate(list(range(1, 90)), replace(LONG, max_tokens=38))) as outputs:
        await anext(outputs)


async def timed_out(llm: AsyncLLM, gate: Gate) -> None:
    gate.let(30)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await collect(llm.generate(PROMPT, LONG))


@pytest.mark.parametrize("leave", [cancelled, cancelled_at_once, broken_out, closed, timed_out])
@pytest.mark.parametrize("async_scheduling", [True, False])
def test_leaving_early_aborts(
    tiny_llm: LLM,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    leave: Callable[[AsyncLLM, Gate], Coroutine[Any, Any, None]],
    async_scheduling: bool,
) -> None:
    """Nobody else notices, and what was cached stays."""
    monkeypatch.setattr(tiny_llm.engine, "async_scheduling", async_scheduling)
    prompt, params = [8] * 41, replace(LONG, max_tokens=80)
    gate.is_open = True
    (expected,) = run(tiny_llm, [prompt], params)
    before = tiny_llm.get_metrics().num_finished["length"]

    async def callers(llm: AsyncLLM) -> tuple[list[RequestOutput], RequestOutput]:
        gate.is_open = False
        other = asyncio.create_task(collect(llm.generate(prompt, params)))
        await until(lambda: llm._thread._num_requests == 1)
        await leave(llm, gate)
        await asyncio.wrap_future(llm._thread.call(lambda: None))
        assert llm.engine.scheduler.num_running + llm.engine.scheduler.num_waiting == 1
        gate.is_open = True
        return await other, await last(llm.generate(prompt, SHORT))

    undisturbed, again = serve(tiny_llm.engine, callers)
    assert joined(undisturbed)[0].token_ids == expected.outputs[0].token_ids
    assert again.num_cached_tokens == 40
    assert tiny_llm.get_metrics().num_finished["length"] - before >= 2


def test_abort(tiny_llm: LLM, gate: Gate) -> None:
    async def callers(llm: AsyncLLM) -> None:
        await llm.abort("nobody's")
        for kind in (DELTA, CUMULATIVE, FINAL):
            task = asyncio.create_task(collect(llm.generate(PROMPT, replace(LONG, output_kind=kind), "mine")))
            gate.let(4)
            await until(lambda: llm.engine.scheduler.num_running)
            await llm.abort("mine")
            outputs = await task
            assert whole(kind, outputs).outputs[0].finish_reason == "abort"
            await llm.abort("mine")

    serve(tiny_llm.engine, callers)


def test_an_id_can_be_used_again_at_once(tiny_llm: LLM, gate: Gate) -> None:
    """A generator that is left late ends its own request, not the one that has its id now."""

    async def callers(llm: AsyncLLM) -> RequestOutput:
        early = llm.generate(PROMPT, replace(SHORT, output_kind=DELTA), "same")
        gate.let(2)
        await anext(early)
        gate.let(9)
        await until(lambda: not llm.engine.has_unfinished)
        later = asyncio.create_task(last(llm.generate(PROMPT, replace(LONG, output_kind=FINAL), "same")))
        await until(lambda: llm.engine.has_unfinished)
        await early.aclose()
        with pytest.raises(ValueError, match="'same' is in use"):
            await last(llm.generate(PROMPT, SHORT, "same"))
        gate.is_open = True
        return await later

    assert serve(tiny_llm.engine, callers).outputs[0].finish_reason == "length"


# -- who is slow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_a_slow_consumer_gets_everything_at_once(tiny_llm: LLM, gate: Gate, kind: RequestOutputKind) -> None:
    params = replace(LONG, output_kind=kind, n=2, seed=1, temperature=0.5, logprobs=1, prompt_logprobs=0, max_tokens=40)

    async def callers(llm: AsyncLLM) -> list[RequestOutput]:
        outputs = llm.generate(PROMPT, params)
        gate.is_open = False
        gate.let(2)
        taken = [await anext(outputs)]
        gate.is_open = True
        await until(lambda: not llm.engine.has_unfinished)  # nobody waits for us
        return taken + await collect(outputs)

    gate.is_open = True
    (expected,) = run(tiny_llm, [PROMPT], params)
    outputs = serve(tiny_llm.engine, callers)
    assert len(outputs) == 2
    check_same(expected, whole(kind, outputs))


def test_a_loop_that_hangs_gathers_no_calls(tiny_llm: LLM, gate: Gate) -> None:
    async def callers(llm: AsyncLLM) -> int:
        calls = count_wakes(asyncio.get_running_loop())
        outputs = llm.generate(PROMPT, LONG)
        gate.let(2)
        await anext(outputs)
        gate.is_open = True
        while llm.engine.has_unfinished:
            time.sleep(0.001)
        count = len(calls)
        assert len(joined(await collect(outputs))[0].token_ids) == 99
        return count

    assert serve(tiny_llm.engine, callers) == 2


def count_wakes(loop: asyncio.AbstractEventLoop) -> list[int]:
    """Grows by the number of streams with every call from the engine's thread into the loop to wake some."""
    calls, real = [], loop.call_soon_threadsafe

    def call(callback: Any, *args: Any, **options: Any) -> Any:
        if callback is engine_thread._wake_here:
            calls.append(len(args[0]))
        return real(callback, *args, **options)

    loop.call_soon_threadsafe = call
    return calls


def test_one_call_into_a_loop_per_step(tiny_llm: LLM, gate: Gate) -> None:
    async def callers(llm: AsyncLLM) -> None:
        calls = count_wakes(asyncio.get_running_loop())
        requests = [llm.generate([i], LONG) for i in range(4)]
        outputs = asyncio.gather(*[anext(request) for request in requests])
        await until(lambda: llm._thread._num_requests == 4)
        gate.let(2)
        await outputs
        gate.let(1)
        await asyncio.gather(*[anext(request) for request in requests])
        assert calls == [4, 4]
        for request in requests:
            await request.aclose()

    serve(tiny_llm.engine, callers)


def test_a_long_prompt_is_read_while_others_run(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this loop nor the engine waits for the tokenizer."""
    may_go_on = threading.Event()

    class Slow:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def encode(self, text: str, **options: Any) -> list[int]:
            assert text != "long" or may_go_on.wait(PATIENCE)
            return self.tokenizer.encode(text, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

    async def callers(llm: AsyncLLM) -> None:
        slow = asyncio.create_task(last(llm.generate("long", SHORT)))
        await last(llm.generate("short", LONG))
        assert not slow.done()
        may_go_on.set()
        assert (await slow).prompt == "long"

    monkeypatch.setattr(tiny_llm.engine, "tokenizer", Slow(tiny_llm.engine.tokenizer))
    serve(tiny_llm.engine, callers)


# -- several loops -----------------------------------------------------------------------------------------------------


def test_two_event_loops(tiny_llm: LLM) -> None:
    prompts = [[i + 1] * (3 + i) for i in range(8)]
    expected = run(tiny_llm, prompts, replace(LONG, max_tokens=20))

    async def some(llm: AsyncLLM, which: range) -> list[list[RequestOutput]]:
        params = replace(LONG, max_tokens=20)
        return await asyncio.gather(*[collect(llm.generate(prompts[i], params)) for i in which])

    async def callers(llm: AsyncLLM) -> list[list[RequestOutput]]:
        elsewhere = asyncio.to_thread(asyncio.run, some(llm, range(4, 8)))
        here, there = await asyncio.gather(some(llm, range(4)), elsewhere)
        return here + there

    for one, outputs in zip(expected, serve(tiny_llm.engine, callers), strict=True):
        check_same(one, whole(DELTA, outputs))


def test_requests_of_a_loop_that_is_gone_are_dropped(tiny_llm: LLM, gate: Gate) -> None:
    before = tiny_llm.get_metrics().num_finished["abort"]
    llm = AsyncLLM.from_engine(tiny_llm.engine)
    loop = asyncio.new_event_loop()
    outputs = llm.generate(PROMPT, LONG)
    gate.let(2)
    loop.run_until_complete(anext(outputs))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.is_open = True
    asyncio.run(asyncio.wait_for(until(lambda: not llm.engine.is_busy), PATIENCE))
    assert tiny_llm.get_metrics().num_finished["abort"] == before + 1
    asyncio.run(llm.shutdown())
    check_nothing_is_left(tiny_llm.engine)


# -- several processes -------------------------------------------------------------------------------------------------

JOB = """
import asyncio, json, sys
from jaxserve import AsyncLLM, RequestOutputKind, SamplingParams

model, options, requests = sys.argv[1], *map(json.loads, sys.argv[2:])

async def one(llm, prompt, params):
    params = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
    outputs = [output async for output in llm.generate(prompt, params)]
    return [completion.token_ids for completion in outputs[-1].outputs]

async def leave(llm):
    params = SamplingParams(max_tokens=60, ignore_eos=True, presence_penalty=1.0)
    for i in range(6):
        async for output in llm.generate([i + 3] * 40, params, "the same id"):
            break
        await asyncio.sleep(0)

async def main(llm):
    async with llm:
        *answers, _ = await asyncio.gather(*[one(llm, *request) for request in requests], leave(llm))
        await llm.reset_prefix_cache()
        assert await one(llm, *requests[5]) == answers[5]
    return answers

llm = AsyncLLM(model, use_tqdm_on_load=False, **options)
print(json.dumps(asyncio.run(main(llm))))
"""
"""Requests in a crowd of others that come, leave, and share an id one after the other."""


def test_several_processes(tiny_llm: LLM, tiny_model: Path) -> None:
    """Like a single one; a follower says nothing, and ends when its leader is shut down."""
    wanted: list[tuple[list[int], dict[str, Any]]] = []
    for i in range(8):
        params = {"seed": i, "n": 1 + i % 2, "presence_penalty": i % 3 * 0.7, "logprobs": i % 4}
        wanted.append(([i + 1] * (5 + 9 * i), {"max_tokens": 20, "ignore_eos": True} | params))
    expected = run(tiny_llm, [prompt for prompt, _ in wanted], [SamplingParams(**params) for _, params in wanted])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = [SMALL | {"mesh": "dp=2", "coordinator": address, "num_processes": 2, "process_id": i} for i in range(2)]
    leader, follower = answers(*[[str(tiny_model), json.dumps(o), json.dumps(wanted)] for o in options])
    assert json.loads(leader) == [[c.token_ids for c in o.outputs] for o in expected]
    assert follower == ""


def answers(*arguments: list[str]) -> list[str]:
    """What processes of ``JOB`` say, started at once."""
    cached = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "compilation_cache_max_size")
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env |= {f"JAX_{name.upper()}": str(getattr(jax.config, f"jax_{name}")) for name in cached}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", JOB, *given], env=env, **pipes) for given in arguments]
    try:
        said = [process.communicate(timeout=LONGEST) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * len(started), said
    return [out for out, _ in said]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompt": []}, ValueError, "the prompt is empty"),
        ({"prompt": [1] * 128}, ValueError, "max_model_len=128"),
        ({"prompt": [1, 999]}, ValueError, "token id 999"),
        ({"prompt": {"prompt": "x", "images": []}}, ValueError, "'images' is not supported"),
        ({"prompt": 5}, ValueError, "prompt 5"),
        ({"sampling_params": {"n": 2}}, ValueError, "sampling_params"),
        ({"request_id": 5}, ValueError, "request_id 5"),
        ({"priority": "high"}, ValueError, "priority 'high'"),
        ({"tenant": 5}, ValueError, "tenant 5"),
        ({"lora_request": "x"}, NotImplementedError, "lora_request"),
    ],
)
def test_bad_input_reaches_its_caller_only(
    tiny_llm: LLM, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    async def callers(llm: AsyncLLM) -> None:
        other = asyncio.create_task(last(llm.generate(PROMPT, SHORT)))
        with pytest.raises(error, match=words):
            await last(llm.generate(**{"prompt": PROMPT, "sampling_params": SHORT} | arguments))
        assert (await other).finished
        assert llm.is_running and not llm.errored

    serve(tiny_llm.engine, callers)


def test_a_full_queue_rejects(tiny_llm: LLM) -> None:
    engine, limit = tiny_llm.engine, 3
    scheduler = Scheduler(replace(engine.scheduler.config, max_num_queued_requests=limit))
    limited = Engine(scheduler, engine.runner, engine.tokenizer, engine.eos_token_ids)

    async def callers(llm: AsyncLLM) -> None:
        def all_at_once() -> None:  # the engine cannot start any of them before the last has come
            assert entered.wait(PATIENCE)

        entered = threading.Event()
        held = llm._thread.call(all_at_once)
        tasks = [asyncio.create_task(last(llm.generate([i + 1], SHORT, str(i)))) for i in range(5)]
        await until(lambda: len(llm._thread._commands) == 5)
        entered.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wrap_future(held)
        rejected = [r for r in results if isinstance(r, QueueFullError)]
        assert len(rejected) == 2 and "max_num_queued_requests=3" in str(rejected[0])
        assert sum(isinstance(r, RequestOutput) and r.finished for r in results) == limit
        assert (await last(llm.generate(PROMPT, SHORT))).finished

    serve(limited, callers)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_failure_of_the_engine_reaches_everybody(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, async_scheduling: bool
) -> None:
    engine, real, num_steps = tiny_llm.engine, tiny_llm.engine.runner.step, 0
    monkeypatch.setattr(engine, "async_scheduling", async_scheduling)

    def step(batch: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 9:
            raise ZeroDivisionError("the device is on fire\nand so on")
        return real(batch)

    async def main() -> None:
        llm = AsyncLLM.from_engine(engine)
        calls = [collect(llm.generate([i + 1], LONG)) for i in range(6)]  # two of them wait
        errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
        assert len({id(e) for e in errors}) == 6
        for error in errors:
            assert isinstance(error, EngineDeadError) and isinstance(error.__cause__, ZeroDivisionError)
            assert str(error).endswith("ZeroDivisionError: the device is on fire")
        assert llm.errored and not llm.is_running
        for call in (last(llm.generate(PROMPT, SHORT)), llm.abort("x"), llm.reset_prefix_cache()):
            with pytest.raises(EngineDeadError, match="on fire"):
                await call
        await llm.shutdown(drain=True)
        assert llm.errored and llm.get_metrics().num_steps > 0

    with monkeypatch.context() as fault:
        fault.setattr(engine.runner, "step", step)
        asyncio.run(main())
    check_nothing_is_left(engine)
    check_same(run(tiny_llm, [PROMPT], SHORT)[0], serve(engine, lambda llm: last(llm.generate(PROMPT, SHORT))))


def test_a_failure_between_steps_reaches_everybody(tiny_llm: LLM, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those whose calls come after the one that fails, in the same turn."""

    def fail() -> None:
        raise OSError("gone")

    async def main() -> None:
        llm = AsyncLLM.from_engine(tiny_llm.engine)
        started = asyncio.create_task(collect(llm.generate(PROMPT, LONG)))
        gate.let(3)
        await until(lambda: llm.engine.scheduler.num_running)
        entered = threading.Event()
        held = llm._thread.call(lambda: entered.wait(PATIENCE))
        failing = asyncio.create_task(llm.reset_prefix_cache())
        behind = asyncio.create_task(llm.abort("x"))
        await until(lambda: len(llm._thread._commands) == 2)
        entered.set()
        errors = await asyncio.gather(started, failing, behind, return_exceptions=True)
        assert [type(e) for e in errors] == [EngineDeadError] * 3
        assert [type(e.__cause__) for e in errors if isinstance(e, Exception)] == [OSError] * 3
        assert held.result() is True
        await llm.shutdown()

    with monkeypatch.context() as fault:
        fault.setattr(tiny_llm.engine, "reset_prefix_cache", fail)
        asyncio.run(asyncio.wait_for(main(), PATIENCE))
    gate.is_open = True
    run(tiny_llm, [PROMPT], SHORT)  # reads the step that was in flight
    check_nothing_is_left(tiny_llm.engine)


# -- the end -----------------------------------------------------------------------------------------------------------


def test_shutdown_drains(tiny_llm: LLM, gate: Gate) -> None:
    async def main() -> list[RequestOutput]:
        llm = AsyncLLM.from_engine(tiny_llm.engine)
        tasks = [asyncio.create_task(last(llm.generate([i + 1], replace(LONG, output_kind=FINAL)))) for i in range(6)]
        await until(lambda: llm._thread._num_requests == 6)
        gate.let(3)
        end = asyncio.create_task(llm.shutdown(drain=True))
        await until(lambda: not llm.is_running)
        with pytest.raises(EngineDeadError, match="shut down"):
            await last(llm.generate(PROMPT, SHORT))
        gate.is_open = True
        await end
        return await asyncio.gather(*tasks)

    assert [o.outputs[0].finish_reason for o in asyncio.run(asyncio.wait_for(main(), PATIENCE))] == ["length"] * 6
    check_nothing_is_left(tiny_llm.engine)


@pytest.mark.parametrize("options", [{}, {"drain": True, "timeout": 0.03}], ids=["at once", "after a while"])
def test_shutdown_aborts(tiny_llm: LLM, gate: Gate, options: dict[str, Any]) -> None:
    async def main() -> None:
        llm = AsyncLLM.from_engine(tiny_llm.engine)
        calls = [asyncio.create_task(collect(llm.generate([i + 1], LONG))) for i in range(9)]
        await until(lambda: llm._thread._num_requests == 9)
        gate.let(5)
        await until(lambda: llm.engine.scheduler.num_running == 4)
        await llm.shutdown(**options)
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, EngineDeadError) and "was shut down" in str(error)
        assert not llm._thread._thread.is_alive() and not llm.errored
        await llm.shutdown()  # again is no error

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    check_nothing_is_left(tiny_llm.engine)


def test_an_idle_engine_sleeps(tiny_llm: LLM) -> None:
    async def callers(llm: AsyncLLM) -> None:
        turns, real = [], llm._thread._turn

        def turn() -> bool:
            turns.append(None)
            return real()

        llm._thread._turn = turn
        await last(llm.generate(PROMPT, SHORT))
        await idle(llm)
        assert len(turns) > 6
        before = len(turns)
        await asyncio.sleep(0.3)
        assert len(turns) - before <= 1  # the one in which it sleeps
        await llm.reset_prefix_cache()
        assert len(turns) - before <= 3

    serve(tiny_llm.engine, callers)


@pytest.mark.parametrize("its_own", [True, False])
def test_the_job_ends_with_the_engine_that_was_made_for_it(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, its_own: bool
) -> None:
    closed: list[None] = []

    class Watched(Journal):
        def close(self) -> None:
            closed.append(None)

    monkeypatch.setattr(tiny_llm.engine, "journal", Watched())
    monkeypatch.setattr(async_llm, "open_engine", lambda args: tiny_llm.engine)
    llm = AsyncLLM("any") if its_own else AsyncLLM.from_engine(tiny_llm.engine)
    assert not closed
    asyncio.run(llm.shutdown())
    assert len(closed) == its_own


def test_an_engine_with_a_stream_open_is_refused(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream([PROMPT], LONG)
    next(stream)
    with pytest.raises(RuntimeError, match="unfinished"):
        AsyncLLM.from_engine(tiny_llm.engine)
    stream.close()
    assert serve(tiny_llm.engine, lambda llm: last(llm.generate(PROMPT, SHORT))).finished


def test_many_threads_and_requests(tiny_llm: LLM) -> None:
    """Loops that come and go, half of their requests left early."""

    async def some(llm: AsyncLLM, seed: int) -> None:
        async def one(i: int) -> None:
            async with aclosing(llm.generate([i + 1, seed], replace(LONG, max_tokens=8 + i))) as outputs:
                async for output in outputs:
                    if (i + seed) % 2 and output.outputs[0].token_ids:
                        break

        await asyncio.gather(*[one(i) for i in range(6)])

    async def callers(llm: AsyncLLM) -> None:
        with ThreadPoolExecutor(4) as pool:
            loop = asyncio.get_running_loop()
            await asyncio.gather(*[loop.run_in_executor(pool, asyncio.run, some(llm, seed)) for seed in range(8)])

    serve(tiny_llm.engine, callers)
