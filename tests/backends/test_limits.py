"""A real Collector that takes small requests only says so in its own way, and gets what it takes."""

from __future__ import annotations

import pathlib
import re

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from backends.servers import Collector, free_port
from otel_tcppktlat.telemetry import exporters
from otel_tcppktlat.telemetry.sending import Sender
from otel_tcppktlat.telemetry.spans import Handover
from telemetry.told import eventually

SPANS, SPAN_BYTES, LIMIT = 2000, 1000, 1 << 20


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_too_large_for_a_collector(protocol: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC: RESOURCE_EXHAUSTED. HTTP: 400, "request body too large"."""
    ports = {"grpc": free_port(), "http/protobuf": free_port()}
    limits = {
        "grpc": {"endpoint": f"127.0.0.1:{ports['grpc']}", "max_recv_msg_size_mib": LIMIT >> 20},
        "http": {"endpoint": f"127.0.0.1:{ports['http/protobuf']}", "max_request_body_size": LIMIT},
    }
    configuration = {
        "receivers": {"otlp": {"protocols": limits}},
        "exporters": {"debug": {}},
        "service": {"pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["debug"]}}},
    }
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{ports[protocol]}")
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    spans = []
    for _ in range(SPANS):
        span = tracer.start_span("span", attributes={"text": "x" * SPAN_BYTES})
        span.end()
        assert isinstance(span, ReadableSpan)
        spans.append(span)
    collector = Collector(tmp_path, configuration)
    collector.ready = f"127.0.0.1:{ports[protocol]}"
    with collector:
        make = exporters.span_exporter_maker()
        assert make
        sender = Sender(make, exporters.make_watch("traces"), SpanExportResult.SUCCESS)
        handover = Handover(sender, 1.0)
        assert handover.export(spans) is SpanExportResult.SUCCESS
        assert handover.rejected == 0
        eventually(lambda: sum(map(int, re.findall(r'"spans": (\d+)', collector.log))) == SPANS, what=collector.log)
        handover.shutdown()
