"""Traces: whole, nested, valid, and true to what was computed; requests' spans at a collector; profiles."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tiny_models import SMALL, run

from jaxserve import LLM, AsyncLLM, SamplingParams, engine
from jaxserve.batch import BatchLayout
from jaxserve.engine_args import EngineArgs
from jaxserve.evaluation.engine_trace import EngineTraceFile, Event
from jaxserve.evaluation.profile import busy_seconds, collective_seconds, covered, read_operations
from jaxserve.step_costs import step_cost
from jaxserve.telemetry import RequestSpans
from jaxserve.trace import EngineTrace, Sink, Span, StepCost
from jaxserve.trace_file import TraceFile
from sharding.hardware import find_gpu
from sharding.mesh import MeshConfig
from sharding.model_shape import ModelShape

SCHEMA = json.loads((Path(__file__).parent / "trace_schema.json").read_text())
COST = StepCost({"tp": 4096}, collective_seconds=2e-5, sampling_seconds=1e-6)
MakeLLM = Callable[..., LLM]
Tracing = Callable[..., tuple[LLM, Path]]


@pytest.fixture
def tracing(make_llm: MakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracing]:
    """(model, **options) -> an engine that writes a trace from now on, and where."""

    def start(directory: Path, **options: Any) -> tuple[LLM, Path]:
        llm, path = make_llm(directory, **options), tmp_path / "trace.json"
        runner = llm.engine.runner
        costs = {runner.step_name(layout): COST for layout in runner.config.layouts}
        replicas, stages = runner.mesh.shape["dp"], runner.decoder.num_stages
        trace = EngineTrace([TraceFile(path, replicas, stages, "h100", True, costs)], stages, costs)
        monkeypatch.setattr(llm.engine, "trace", trace)
        return llm, path

    yield start


def read(path: Path) -> EngineTraceFile:
    """With everything checked that holds for every trace."""
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    trace = EngineTraceFile(path)
    assert trace.misnested() == []
    assert 0.95 <= trace.covered_share <= 1.001
    assert unmatched(json.loads(path.read_text())["traceEvents"]) == []
    if trace.steps:
        causes = trace.causes()
        assert sum(c.seconds for c in causes) == pytest.approx(trace.busy_seconds, rel=0.02, abs=1e-4)
        assert all(c.seconds >= 0 for c in causes)
    return trace


def unmatched(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ends that do not close what was opened last, events of one time being in the file's order."""
    open_: dict[int, list[str]] = {}
    wrong = []
    for event in sorted((e for e in events if e["ph"] in "be"), key=lambda e: e["ts"]):
        names = open_.setdefault(event["id"], [])
        if event["ph"] == "b":
            names.append(event["name"])
        elif not names or names.pop() != event["name"]:
            wrong.append(event)
    return wrong


def computed(trace: EngineTraceFile, number: int, stage: int = 0) -> tuple[list[tuple[int, int]], int]:
    """Chunks (start, count) of a request that a stage computed, and for how many of its tokens it decoded."""
    steps = [e for e in trace.steps if (e.track - 1) % trace.num_stages == stage]
    chunks = [(start, count) for e in steps for n, start, count in e.args["chunks"] if n == number]
    return chunks, sum(n == number for e in steps for n in e.args["decodes"])


PROMPTS = [[7, 8, 9] * 15, [3, 4], [5] * 33]


def test_every_token_is_in_a_step(tracing: Tracing, tiny_model: Path) -> None:
    llm, path = tracing(tiny_model, enable_prefix_caching=False)
    run(llm, [*PROMPTS, "some text"], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    trace = read(path)
    assert [j.name for j in trace.journeys] == sorted((j.name for j in trace.journeys), key=int)
    for journey in trace.journeys:
        chunks, decoded = computed(trace, journey.number)
        assert [start for start, _ in chunks] == [sum(c for _, c in chunks[:i]) for i in range(len(chunks))]
        assert sum(count for _, count in chunks) == journey.whole.args["prompt_tokens"]
        assert decoded == journey.whole.args["output_tokens"] - 1 == 4
        assert [p.name for p in journey.phases] == ["queued", "prefill", "decode"]
        assert sum(p.seconds for p in journey.phases) == pytest.approx(journey.whole.seconds)
    assert len(trace.tokenized) == 4 and trace.tokenized[-1].args["tokens"] == len("some text")
    names = {e.name for e in trace.engine}
    assert {"step", "schedule", "build batch", "dispatch", "wait for the devices", "detokenise", "outside"} <= names
    assert {e.name for e in trace.steps} <= {"decode", "prompts", "mixed"}


def test_devices_do_one_step_after_the_other_between_dispatch_and_wait(tracing: Tracing, odd_model: Path) -> None:
    llm, path = tracing(odd_model, mesh="dp=2", num_gpu_blocks_override=21)
    run(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    trace = read(path)
    assert {e.track for e in trace.steps} == {1, 2}
    waits = [e for e in trace.engine if e.name == "wait for the devices"]
    for track in (1, 2):
        steps = [e for e in trace.steps if e.track == track]
        assert all(a.end <= b.start + 1e-8 for a, b in pairwise(steps))
        assert len(steps) == llm.engine.trace._num_steps  # pyright: ignore[reportAttributeAccessIssue]
    assert all(min(abs(e.end - wait.end) for e in trace.steps) < 1e-3 for wait in waits)
    replicas = {j.number: j.whole.args["replica"] for j in trace.journeys}
    for step in trace.steps:
        assert all(replicas[n] == step.track - 1 for n in step.args["decodes"])
    predicted = [e for e in trace.events if e.name == "collectives (predicted)"]
    assert len(predicted) == len(trace.steps) and predicted[0].args["bytes"] == {"tp": 4096}


def test_preempted_aborted_and_several_at_once(tracing: Tracing, odd_model: Path) -> None:
    llm, path = tracing(odd_model, num_gpu_blocks_override=21)
    run(llm, [[i] * 20 for i in range(1, 7)], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    run(llm, [[5, 6, 7]], SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True))
    stream = llm.stream([[9, 9]], SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    stream.close()
    while llm.engine.is_busy:  # what is in flight for it
        llm.engine.step()
    trace = read(path)
    preempted = [j for j in trace.journeys if j.whole.args["preemptions"]]
    assert preempted
    for journey in preempted:
        names = [p.name for p in journey.phases]
        assert names.count("preempted") == journey.whole.args["preemptions"] <= names.count("prefill")
    assert {"0", "1"} <= {j.name.partition("/")[2] for j in trace.journeys}
    assert [j.whole.args["finish_reason"] for j in trace.journeys].count("abort") == 1


def test_a_pipeline_passes_requests_on(tracing: Tracing, deep_model: Path) -> None:
    llm, path = tracing(deep_model, mesh="pp=2")
    llm.reset_prefix_cache()
    for _ in range(2):  # filled twice
        run(llm, PROMPTS[:2], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    trace = read(path)
    for journey in trace.journeys:
        assert computed(trace, journey.number, 0)[0] == computed(trace, journey.number, 1)[0]
    for stage in (0, 1):
        steps = [e.args["step"] for e in trace.steps if e.track - 1 == stage]
        assert sorted(set(steps)) == steps and len(steps) > 8
    first, second = (
        {(n, at): e.args["step"] for e in trace.steps if e.track == t for n, at, _ in e.args["chunks"]} for t in (1, 2)
    )
    assert {second[key] - first[key] for key in second} == {1}
    assert any(e.name == "bubble" for e in trace.steps)
    assert trace.device_seconds_by("bubble") > 0


def test_a_failed_step_leaves_a_whole_file(tracing: Tracing, odd_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, path = tracing(odd_model)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with monkeypatch.context() as broken:
        broken.setattr(llm.engine.runner, "step", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate([[1, 2]], params, use_tqdm=False)
    read(path)
    llm.generate([[1, 2]], params, use_tqdm=False)
    assert [j.whole.args["finish_reason"] for j in read(path).journeys] == ["abort", "length"]


def test_the_host_is_named(tracing: Tracing, odd_model: Path) -> None:
    """A caller who takes his time between two steps: the devices have long been done."""
    llm, path = tracing(odd_model)
    for _ in llm.stream([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)):
        time.sleep(0.05)
    first = read(path).causes()[0]
    assert first.name == "the host" and "'outside'" in first.evidence


def test_a_pause_is_nobodys_time(tracing: Tracing, deep_model: Path) -> None:
    """After an abort the devices do not compute until somebody asks again, whatever is left in a pipeline."""
    llm, path = tracing(deep_model, mesh="pp=2")
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for _ in range(2):
        stream = llm.stream([[1, 2, 3]], params)
        next(stream)
        stream.close()
        assert len(read(path).journeys) > 0
        time.sleep(0.5)
    run(llm, [[4, 5]], params)
    trace = read(path)
    assert trace.host_seconds["idle"] > 0.9
    assert trace.busy_seconds < trace.wall_seconds - 0.9
    assert [j.whole.args["finish_reason"] for j in trace.journeys] == ["abort", "abort", "length"]


def test_what_is_computed_again_is_no_decoding(tracing: Tracing, odd_model: Path) -> None:
    llm, path = tracing(odd_model, num_gpu_blocks_override=21, enable_prefix_caching=False)
    counters = llm.engine.scheduler.counters
    before = llm.get_metrics().snapshot()
    run(llm, [[i] * 20 for i in range(1, 7)], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    assert counters.num_preemptions > before.num_preemptions
    trace = read(path)
    for step in trace.steps:
        chunks = sum(count for _, _, count in step.args["chunks"])
        assert step.args["tokens"] == chunks + len(step.args["decodes"])
    assert any(start + count > 20 for e in trace.steps for _, start, count in e.args["chunks"])


def test_tokenizers_of_many_threads(tracing: Tracing, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, path = tracing(tiny_model)
    real = engine.read_prompt
    monkeypatch.setattr(engine, "read_prompt", lambda *a: (time.sleep(0.05), real(*a))[1])
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    async def ask(client: AsyncLLM, prompt: str) -> None:
        async for _ in client.generate(prompt, params):
            pass

    async def main() -> None:
        async with AsyncLLM.from_engine(llm.engine) as client:
            await asyncio.gather(*(ask(client, f"text {i}") for i in range(6)))

    asyncio.run(main())
    trace = read(path)
    assert len(trace.tokenized) == 6 and len({e.track for e in trace.tokenized}) > 1


def test_of_many_callers(tracing: Tracing, odd_model: Path) -> None:
    llm, path = tracing(odd_model)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    async def ask(client: AsyncLLM, prompt: list[int]) -> None:
        async for _ in client.generate(prompt, params):
            pass

    async def main() -> None:
        async with AsyncLLM.from_engine(llm.engine) as client:
            await asyncio.gather(*(ask(client, [i, i]) for i in range(5)))

    asyncio.run(main())
    trace = read(path)
    assert len(trace.journeys) == len(trace.tokenized) == 5
    assert {e.args["request"] for e in trace.tokenized} == {j.name.partition("#")[0] for j in trace.journeys}


def test_spans_that_do_not_nest_are_found(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    TraceFile(path, 1, 1, None, True, {})
    trace = EngineTraceFile(path)
    step, inside = Event(1, 1, "step", 0, 2, {}), Event(1, 1, "schedule", 1, 2, {})
    trace.events = [step, inside]
    assert trace.misnested() == []
    trace.events = [step, replace(inside, end=3), replace(inside, track=2)]
    assert trace.misnested() == ["'schedule' at 1.000000 s ends after 'step', in which it began"]


def test_options(odd_model: Path, tmp_path: Path, make_llm: MakeLLM) -> None:
    """As a user would give them; what cannot be is refused."""
    path = tmp_path / "trace.json"
    options = SMALL | {"num_gpu_blocks_override": 21, "skip_tokenizer_init": True, "use_tqdm_on_load": False}
    llm = LLM(odd_model, trace=path, mesh="tp=2", **options)
    run(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    trace = read(path)
    runner = llm.engine.runner
    assert trace.programs.keys() == {runner.step_name(layout) for layout in runner.config.layouts}
    assert all(cost["collective_bytes"]["tp"] > 0 for cost in trace.programs.values())
    llm.close()
    with pytest.raises(ValueError, match=r"trace='/no/such/t\.json': /no/such is no directory"):
        LLM(odd_model, trace="/no/such/t.json", **options)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"otlp_traces_endpoint": "localhost"}, "otlp_traces_endpoint='localhost': it is a URL"),
        ({"trace": tmp_path}, "it is a directory"),
        ({"trace": path, "record": path}, "give each a file of its own"),
    ]
    for given, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            EngineArgs(model="demo", **given)


def test_step_cost() -> None:
    shape = ModelShape(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        gated=True,
        tied=False,
    )
    mesh = MeshConfig(tp=8)
    cost = step_cost(shape.fit_to(mesh), mesh, find_gpu("h200"), BatchLayout(64, 64, 10, one_token_each=True))
    assert cost.collective_bytes == {"tp": (2 * 32 + 1) * 64 * 4096 * 2 + 2 * 64 * 8}
    assert 0 < cost.sampling_seconds < 1e-3 and 0 < cost.collective_seconds < 1e-2


# -- a collector -------------------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Its URL, and what it was sent."""
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    server.server_close()


def test_requests_reach_a_collector(
    make_llm: MakeLLM, odd_model: Path, collector: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, received = collector
    llm = make_llm(odd_model)
    sinks: list[Sink] = [RequestSpans(url)]
    monkeypatch.setattr(llm.engine, "trace", EngineTrace(sinks, 1, {}))
    run(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    llm.engine.trace.close()
    bodies = [gzip.decompress(b) if b.startswith(b"\x1f\x8b") else b for b in received]
    sent = [s for b in bodies for r in ExportTraceServiceRequest.FromString(b).resource_spans for s in r.scope_spans]
    spans = [span for scope in sent for span in scope.spans]
    parents = {s.span_id: s for s in spans if s.name == "llm_request"}
    assert Counter(s.name for s in spans) == {"llm_request": 3, "queued": 3, "prefill": 3, "decode": 3}
    for span in spans:
        if span.name != "llm_request":
            parent = parents[span.parent_span_id]
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
    usage = [{a.key: a.value.int_value for a in s.attributes} for s in parents.values()]
    assert sorted(u["gen_ai.usage.input_tokens"] for u in usage) == sorted(map(len, PROMPTS))
    assert {u["gen_ai.usage.output_tokens"] for u in usage} == {3}


def test_telemetry_ignores_what_is_no_request(collector: tuple[str, list[bytes]]) -> None:
    spans = RequestSpans(collector[0])
    spans.write([Span(1, 1, "step", 0, 1)])
    spans.close()
    assert collector[1] == []


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_profile(make_llm: MakeLLM, odd_model: Path, tmp_path: Path) -> None:
    llm = make_llm(odd_model, mesh="tp=2")
    llm.start_profile(tmp_path / "profile")
    with pytest.raises(RuntimeError, match="profile"):
        llm.start_profile(tmp_path / "profile")
    run(llm, [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    llm.stop_profile()
    operations = read_operations(tmp_path / "profile")
    busy, links = busy_seconds(operations), collective_seconds(operations)
    assert busy.keys() == links.keys() == {0, 1}
    assert all(0 < s < 60 for s in (*busy.values(), *links.values()))
    with pytest.raises(ValueError, match="no profile in it"):
        read_operations(tmp_path / "nothing")


def test_scopes(make_llm: MakeLLM, odd_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a profile's operations are named after: the layer, its part and what that does."""
    runner = make_llm(odd_model).engine.runner
    # Not compiled: a compiled program that the cache kept has the names that it had then.
    monkeypatch.setattr(runner, "compile", lambda name, key, lower: lower())
    text = runner.step_program(runner.config.layout(24, False), runner.num_blocks).as_text(debug_info=True)
    attention = [f"layer_1/attention/{part}" for part in ("qkv", "out")]
    inside = ["kv_write/", "paged_attention/"]  # of the part that runs on each device
    for scope in (*attention, *inside, "layer_1/mlp/up", "layer_1/mlp/down", "layer_1/norm", "/embed/", "/sample/"):
        assert scope in text, scope


def test_covered() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.6)]) == pytest.approx(4)
    assert covered([]) == 0
