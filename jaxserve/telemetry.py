"""Requests as OpenTelemetry spans, sent to a collector over OTLP/HTTP. No jax here.

One span per sequence, ``llm_request``, with a child for each of its phases. Of the attributes that the semantic
conventions for generative AI name (https://opentelemetry.io/docs/specs/semconv/gen-ai/) it has those in ``ATTRIBUTES``
and the finish reason; our own are under ``jaxserve.``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.trace import REQUESTS, Span

ATTRIBUTES = {
    "request": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "preemptions": "jaxserve.preemptions",
    "tenant": "jaxserve.tenant",
    "replica": "jaxserve.replica",
}
FLUSH_MILLISECONDS = 5000
MOST_QUEUED = 1 << 16
"""Spans that wait to be sent: those of many requests come at once. What is beyond is lost, and logged."""


class RequestSpans:
    """Sends them when a sequence has ended, in a thread of its own; what cannot be sent is lost, and logged by the
    OpenTelemetry library."""

    def __init__(self, endpoint: str) -> None:
        """NotImplementedError where the library is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise NotImplementedError(
                "otlp_traces_endpoint needs OpenTelemetry: pip install 'jaxserve[otel]'"
            ) from None
        # Spans count from a clock that nobody can set; collectors want the time of day.
        self._clock_ns = time.time_ns() - time.perf_counter_ns()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxserve"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint), max_queue_size=MOST_QUEUED))
        self._tracer = self._provider.get_tracer("jaxserve")

    def write(self, spans: Sequence[Span]) -> None:
        from opentelemetry.trace import set_span_in_context

        inside = None  # a request comes before its phases
        for span in spans:
            if span.group != REQUESTS:
                continue
            if span.name == "request":
                sent = self._start("llm_request", None, span, _attributes(span.args))
                inside = set_span_in_context(sent)
            else:
                sent = self._start(span.name, inside, span, {})
            sent.end(self._nanoseconds(span.end))

    def _start(self, name: str, inside: Any, span: Span, attributes: dict[str, Any]) -> Any:
        start = self._nanoseconds(span.start)
        return self._tracer.start_span(name, inside, attributes=attributes, start_time=start)

    def _nanoseconds(self, seconds: float) -> int:
        return self._clock_ns + round(seconds * 1e9)

    def close(self) -> None:
        self._provider.force_flush(FLUSH_MILLISECONDS)
        self._provider.shutdown()


def _attributes(args: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: args[key] for key, name in ATTRIBUTES.items()}
    return named | {"gen_ai.response.finish_reasons": [str(args["finish_reason"])]}
