"""The instrumentor itself: in code, twice, switched off, its variables, and every kind of reader."""

from __future__ import annotations

import itertools
import logging
import os
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry import context, metrics, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler

from instrumentation.programs import BIN, Script, environment
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.demo.receiver.faults import Delay
from otel_tcppktlat.instrumentation import TcpReceiveQueueInstrumentor
from otel_tcppktlat.instrumentation.settings import PluginSettings, export_ports, read_settings
from otel_tcppktlat.series import DEFAULT_ATTRIBUTES
from otel_tcppktlat.serving.connection import Connection
from support.agent import LONG_S
from telemetry.told import DURATION, Listener, deliver, eventually

CUMULATIVE, DELTA = AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA


class Instrumented:
    """This process, instrumented in code; a context manager. `spans` has what it made since."""

    def __init__(
        self,
        agent: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        *readers: InMemoryMetricReader,
        sampler: Sampler = ALWAYS_ON,
        meter_provider: metrics.MeterProvider | None = None,
        **variables: str,
    ) -> None:
        settings = {"SOCKET": str(agent), "LOAD": "false", "THRESHOLD": "10", **variables}
        for name, value in settings.items():
            monkeypatch.setenv(f"OTEL_PYTHON_TCPPKTLAT_{name}", value)
        self.exporter = InMemorySpanExporter()
        self.traces = TracerProvider(sampler=ParentBased(sampler), shutdown_on_exit=False)
        self.traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.traces.get_tracer("test")
        self.metrics = MeterProvider(readers, shutdown_on_exit=False)
        self.meter_provider = meter_provider or self.metrics
        self.plugin = TcpReceiveQueueInstrumentor()

    def __enter__(self) -> Instrumented:
        self.plugin.instrument(tracer_provider=self.traces, meter_provider=self.meter_provider)
        eventually(lambda: self.plugin._service and self.plugin._service._connection, what="no agent")
        return self

    def __exit__(self, *_: object) -> None:
        if self.plugin.is_instrumented_by_opentelemetry:
            self.plugin.uninstrument()
        self.metrics.shutdown()

    def receives(self) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == "tcp receive"]


def points(reader: InMemoryMetricReader, port: int) -> list[HistogramDataPoint]:
    """Of the server's side on this port, as the reader collects them now."""
    data = reader.get_metrics_data()
    metrics = [
        metric
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == DURATION
    ]
    found: list[Any] = [point for metric in metrics for point in metric.data.data_points]
    wanted = {"server.port": port, "tcppktlat.role": "server"}
    return [point for point in found if wanted.items() <= point.attributes.items()]


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as it:
        yield it


def test_in_code_twice_and_undone(
    serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards everything is as it was, and it may begin again."""
    before = dict(vars(context._RUNTIME_CONTEXT))
    sender, reading = listener.connect()
    for _ in range(2):
        reader = InMemoryMetricReader()
        with Instrumented(serving, monkeypatch, reader) as it:
            it.plugin.instrument()
            assert "already instrumented" in caplog.text
            with it.tracer.start_as_current_span("work") as work:
                deliver(sender, reading, 0.02)
            eventually(lambda it=it: it.receives())  # type: ignore[misc]
            (span,) = it.receives()
            assert span.parent and span.parent.span_id == work.get_span_context().span_id
            counted = points(reader, listener.port)[0].count
            callback = reader._collect
            it.plugin.uninstrument()
            it.plugin.uninstrument()
            assert reader._collect is not callback
            deliver(sender, reading, 0.02)
            assert points(reader, listener.port) == [] and len(it.receives()) == 1
        assert dict(vars(context._RUNTIME_CONTEXT)) == before
        assert counted
    assert [record for record in caplog.records if record.name.startswith("otel_tcppktlat")] == []


def test_each_reader_has_its_own_temporality(
    serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    """Exact in each, collection by collection; each has the exemplar once, in the bucket that it is in."""
    total, growth = InMemoryMetricReader(), InMemoryMetricReader(preferred_temporality={Histogram: DELTA})
    sender, reading = listener.connect()
    with Instrumented(serving, monkeypatch, total, growth) as it:
        seen = 0
        for count in (3, 0, 2):
            for _ in range(count):
                deliver(sender, reading)
            if count:
                with it.tracer.start_as_current_span("work"):
                    deliver(sender, reading, 0.02)
                seen += count + 1
            (point,) = points(total, listener.port)
            assert point.count == seen
            delta = points(growth, listener.port)
            assert [one.count for one in delta] == ([count + 1] if count else [])
            for one in (point, *delta):
                exemplars = [exemplar for exemplar in one.exemplars if exemplar.value >= 0.02]
                assert len(exemplars) == bool(count)
                for exemplar in exemplars:
                    span = next(span for span in it.receives() if span.context.span_id == exemplar.span_id)
                    assert span.context.trace_id == exemplar.trace_id
                    assert (span.end_time or 0) - (span.start_time or 0) == round(exemplar.value * 1e9)
                assert sum(one.bucket_counts) == one.count


def test_the_parents_decision_holds(serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    """A trace that is not sampled gets no span, and no exemplar; one that is gets both."""
    reader = InMemoryMetricReader()
    sender, reading = listener.connect()
    with Instrumented(serving, monkeypatch, reader) as it:
        for sampled in (False, True):
            flags = trace.TraceFlags(sampled)
            remote = trace.SpanContext(0xABC + sampled, 0xDEF, is_remote=True, trace_flags=flags)
            parent = trace.set_span_in_context(trace.NonRecordingSpan(remote))
            with it.tracer.start_as_current_span("work", context=parent):
                deliver(sender, reading, 0.02)
        eventually(it.receives)
        (span,) = it.receives()
        assert span.context.trace_id == 0xABC + 1
        (point,) = points(reader, listener.port)
        assert {exemplar.trace_id for exemplar in point.exemplars if exemplar.value >= 0.02} == {0xABC + 1}


def test_roots_are_the_samplers(serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    for sampler, spans in ((ALWAYS_ON, 1), (ALWAYS_OFF, 0)):
        reader = InMemoryMetricReader()
        sender, reading = listener.connect()
        with Instrumented(serving, monkeypatch, reader, sampler=sampler) as it:
            deliver(sender, reading, 0.02)
            (point,) = points(reader, listener.port)  # when it has heard all
            assert [span.parent for span in it.receives()] == [None] * spans
            assert len([exemplar for exemplar in point.exemplars if exemplar.value >= 0.02]) == spans


def test_its_own_exports_make_no_span(
    serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    """What is read while instrumentation is suppressed, as the SDK does when it exports."""
    sender, reading = listener.connect()
    with Instrumented(serving, monkeypatch, InMemoryMetricReader()) as it:
        with suppress_instrumentation():
            deliver(sender, reading, 0.02)
        with it.tracer.start_as_current_span("work"):
            deliver(sender, reading, 0.02)
        eventually(it.receives)
        assert [span.parent is None for span in it.receives()] == [False]


def test_its_own_exports_over_grpc_make_no_span(
    serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path
) -> None:
    """gRPC's own threads read the answers: one comes while the process is stopped."""
    variables = environment(
        serving,
        receiver.grpc_endpoint,
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        OTEL_METRIC_EXPORT_INTERVAL="60000",
        OTEL_BSP_SCHEDULE_DELAY="60000",
    )
    receiver.answer_with(Delay(0.1), signal="traces", count=1)
    with Script(tmp_path, variables, ["served", "span:0.02", "flush", "span:0.02", "flush"]) as script:
        receiver.wait_for(lambda seen: any(one.signal == "traces" for one in seen.requests), LONG_S)
        script.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        script.process.send_signal(signal.SIGCONT)
        assert script.process.wait(60) == 0, script.said
    ports = [span.attributes["network.peer.port"] for span in receiver.spans() if span.name == "tcp receive"]
    assert len(ports) == 2 and urlsplit(receiver.grpc_endpoint).port not in ports


def test_where_exports_go() -> None:
    variables = {
        "TRACES_ENDPOINT": "collector:4317",
        "METRICS_ENDPOINT": "http://a:1234/v1/metrics",
        "ENDPOINT": "https://b",
    }
    assert export_ports({f"OTEL_EXPORTER_OTLP_{name}": url for name, url in variables.items()}) == {4317, 1234}
    assert export_ports({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:b"}) == set() and export_ports({}) == {4317}


def test_no_more_spans_than_wanted(serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    """The first, and what is twice as slow; the rest is counted, and in the histogram all the same."""
    reader = InMemoryMetricReader()
    sender, reading = listener.connect()
    with Instrumented(serving, monkeypatch, reader, SPAN_RATE="0.001", THRESHOLD="5") as it:
        for _ in range(5):
            deliver(sender, reading, 0.01)
        (point,) = points(reader, listener.port)
        assert point.count == 5
        waits_ns = [(span.end_time or 0) - (span.start_time or 0) for span in it.receives()]
        assert waits_ns and all(later >= 2 * earlier for earlier, later in itertools.pairwise(waits_ns))
        service = it.plugin._service
        assert service and service._suppressed() + len(waits_ns) == 5


def test_no_span_at_all(serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    reader = InMemoryMetricReader()
    sender, reading = listener.connect()
    with Instrumented(serving, monkeypatch, reader, SPAN_RATE="0") as it:
        deliver(sender, reading, 0.02)
        (point,) = points(reader, listener.port)
        assert point.count == 1 and not point.exemplars and it.receives() == []


def test_spans_without_an_sdk_for_metrics(
    serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    """They come at once; and in between, the plugin's thread waits."""
    asked: list[float] = []
    has_news = Connection.has_news

    def counting(connection: Connection, timeout_s: float) -> bool:
        asked.append(timeout_s)
        return has_news(connection, timeout_s)

    monkeypatch.setattr(Connection, "has_news", counting)
    sender, reading = listener.connect()
    with Instrumented(serving, monkeypatch, meter_provider=metrics.NoOpMeterProvider()) as it:
        for count in (1, 2):
            with it.tracer.start_as_current_span("work"):
                deliver(sender, reading, 0.02 * count)
            eventually(lambda count=count: len(it.receives()) == count)  # type: ignore[misc]
        asked.clear()
        time.sleep(0.5)
        assert sum(asked[:-1]) <= 0.5


def test_whatever_it_raises_is_nobodys(
    serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No thread can be started: one line says so, and everything is as it was."""
    before = dict(vars(context._RUNTIME_CONTEXT))

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setenv("OTEL_PYTHON_TCPPKTLAT_SOCKET", str(serving))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    plugin = TcpReceiveQueueInstrumentor()
    plugin.instrument()
    plugin.uninstrument()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("otel_tcppktlat")] == [
        """receive-queue waits are not measured: RuntimeError("can't start new thread")"""
    ]
    assert dict(vars(context._RUNTIME_CONTEXT)) == before


def test_without_proc(serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """As in a chroot: no name of the program, and all the rest."""
    hidden = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        'mount -t tmpfs none /proc && exec "$@"',
        "sh",
    ]
    with Script(
        tmp_path, environment(serving, receiver.http_endpoint), ["served", "span:0.02", "flush"], hidden
    ) as script:
        assert script.process.wait(60) == 0, script.said
    assert "Traceback" not in script.said
    assert {span.name for span in receiver.spans()} == {"work", "tcp receive"}


def test_attributes_of_choice(serving: pathlib.Path, monkeypatch: pytest.MonkeyPatch, listener: Listener) -> None:
    reader = InMemoryMetricReader()
    sender, reading = listener.connect()
    names = "server.port, tcppktlat.role, process.pid, tcppktlat.process.comm"
    with Instrumented(serving, monkeypatch, reader, ATTRIBUTES=names) as it:
        deliver(sender, reading, 0.02)
        (point,) = points(reader, listener.port)
        assert {*(point.attributes or {})} == {*map(str.strip, names.split(","))}
        assert (point.attributes or {})["process.pid"] == os.getpid()
        eventually(it.receives)
        assert {*(point.attributes or {})} <= {*(it.receives()[0].attributes or {})}


def test_bad_variables_are_named_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    bad = {"THRESHOLD": "soon", "SPAN_RATE": "-1", "ATTRIBUTES": "colour", "LOAD": "maybe", "SOCKET": " "}
    with caplog.at_level(logging.WARNING):
        found = read_settings({f"OTEL_PYTHON_TCPPKTLAT_{name}": value for name, value in bad.items()})
    assert found == PluginSettings()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4 and all(any(f"_{name}=" in line for line in lines) for name in list(bad)[:4])


def test_good_variables() -> None:
    good = {"THRESHOLD": "2.5", "SPAN_RATE": "7", "ATTRIBUTES": "server.port", "LOAD": "False", "SOCKET": "/run/x"}
    found = read_settings({f"OTEL_PYTHON_TCPPKTLAT_{name}": value for name, value in good.items()})
    assert found == PluginSettings("/run/x", 2_500_000, 7, ("server.port",), False)
    assert read_settings({}).attributes == DEFAULT_ATTRIBUTES


def test_disabled_as_any_other(serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path) -> None:
    variables = environment(serving, receiver.http_endpoint, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="redis, tcppktlat")
    with Script(tmp_path, variables, ["span:0.02", "flush"]) as script:
        assert script.process.wait(60) == 0, script.said
    assert [span.name for span in receiver.spans()] == ["work"] and receiver.points(DURATION) == []
    assert "receive-queue" not in script.said


def test_its_variables_are_listed() -> None:
    help_text = subprocess.run([BIN / "opentelemetry-instrument", "--help"], capture_output=True, text=True).stdout
    for name in ("socket", "threshold", "span_rate", "attributes", "load"):
        assert f"--tcppktlat_{name}" in help_text


def test_without_the_sdk_nothing_happens(serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path) -> None:
    variables = environment(serving, receiver.http_endpoint, OTEL_SDK_DISABLED="true")
    with Script(tmp_path, variables, ["read:0.02"]) as script:
        assert script.process.wait(60) == 0, script.said
        assert script.said == "done\n"
