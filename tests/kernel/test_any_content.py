"""Events and map values of any content: no crash, no bad OTLP, bounded memory, and a table of whole, printable rows.

The maps are real, and written to by the test; of a ring buffer only the programs could, so that records are handed to
what it hands them to. FUZZ_RECORDS=1000000 makes it a long run, with seeds of its own (`make fuzz`).
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import math
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import Histogram, ObservableCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from kernel.traced import Traced, options
from otel_tcppktlat.buckets import explicit_buckets
from otel_tcppktlat.demo.receiver import Point, SpanRecord, points_of, spans_of
from otel_tcppktlat.probe.layout import Event, ProcessKey, SeriesKey
from otel_tcppktlat.series import ATTRIBUTES, SeriesTotals
from otel_tcppktlat.table import Table
from otel_tcppktlat.telemetry.collector import Collector, Temporality
from otel_tcppktlat.telemetry.diagnosis import Watch
from otel_tcppktlat.telemetry.injection import InjectingExporter
from otel_tcppktlat.telemetry.sending import Sender
from otel_tcppktlat.telemetry.spans import Handover, SpanBudget

RECORDS = int(os.environ.get("FUZZ_RECORDS", "10000"))
RECORDS_EACH = 500
MAX_SERIES, SERIES_LIMIT, ROOM = 64, 200, 2048
BUCKETS = explicit_buckets()
ROW = re.compile(r"\d\d:\d\d:\d\d +\d+ +\d+ .* [0-9a-f.:]+ +\d+ +[0-9a-f.:]+ +\d+ +\d+\.\d\d")
NAMES = (
    b"",
    b"nginx",
    b"\x1b[2J\x1b]0;pwned\x07",
    b"a\nb\r\n",
    b"\xff\xfe\x80",
    b"\xc3",
    b"\xe2\x80\xae",
    b"\xed\xa0\x80",
    b"a\0b",
)


@dataclass
class Encoded(MetricExporter):
    """Takes metrics as OTLP's bytes, or refuses them."""

    rng: random.Random
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        delta = AggregationTemporality.DELTA
        super().__init__(preferred_temporality={Histogram: delta, ObservableCounter: delta})

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        self.points += points_of(
            ExportMetricsServiceRequest.FromString(encode_metrics(metrics_data).SerializeToString())
        )
        return self.rng.choice((MetricExportResult.SUCCESS, MetricExportResult.FAILURE))

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        pass


class EncodedSpans(SpanExporter):
    """Takes spans as OTLP's bytes."""

    def __init__(self) -> None:
        self.spans: list[SpanRecord] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans_of(ExportTraceServiceRequest.FromString(encode_spans(spans).SerializeToString()))
        return SpanExportResult.SUCCESS


class World:
    """A probe, with all that comes behind it."""

    def __init__(self, delta: bool) -> None:
        kind = AggregationTemporality.DELTA if delta else AggregationTemporality.CUMULATIVE
        self.rng = random.Random()
        self.rows_fd = os.memfd_create("rows")
        self.table = Table(self.rows_fd, timestamp=True, wide=True)
        self.traced = Traced(replace(options("auto"), bounds_ns=BUCKETS.bounds_ns, lport=1, max_series=MAX_SERIES))
        self.probe = self.traced.probe
        self.probe._on_row = self.on_row
        self.metrics, self.traces = Encoded(self.rng), EncodedSpans()
        handover = Handover(Sender(lambda: self.traces, Watch(None), SpanExportResult.SUCCESS), 0.01)
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(handover, ROOM))
        self.spans = SpanBudget(self.provider.get_tracer("test"), handover, 10**6, ROOM, 1.0)
        self.totals = SeriesTotals(tuple(ATTRIBUTES), len(BUCKETS.bounds_ns) + 1, SERIES_LIMIT)
        self.collector = Collector(self.probe, BUCKETS, self.totals, self.spans, Temporality(kind, kind))
        sender = Sender(lambda: self.metrics, Watch(None), MetricExportResult.SUCCESS)
        self.exporter = InjectingExporter(sender, self.collector)
        self.records = 0

    def on_row(self, event: Event) -> None:
        self.table.row(event)
        self.spans.offer_row(event)

    def close(self) -> None:
        self.provider.shutdown()
        self.probe.close()
        os.close(self.rows_fd)


@pytest.fixture(scope="module", params=["delta", "cumulative"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    it = World(request.param == "delta")
    yield it
    it.close()
    print(f"\n{it.records} records ({request.param})")


def number(rng: random.Random, bits: int) -> int:
    """Small, at an edge, or any."""
    most = 2**bits - 1
    return rng.choice(
        (0, 1, 2, 3, 10, most, most - 1, most // 2, most // 2 + 1, rng.getrandbits(bits), rng.getrandbits(bits))
    )


def event(rng: random.Random) -> bytes:
    """Mostly as the kernel makes them, but for some fields; some are of any content, and some of any length."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.choice((0, 1, ct.sizeof(Event) - 1, ct.sizeof(Event) + 1, rng.randrange(400))))
    if rng.random() < 0.05:
        return rng.randbytes(ct.sizeof(Event))
    wait_ns = rng.randrange(1, 10**10)
    made = Event(
        picked_ns=time.monotonic_ns(), wait_ns=wait_ns, tgid=rng.getrandbits(22), tid=rng.getrandbits(22),
        series=rng.randrange(MAX_SERIES), side=rng.randrange(2), segments=1, bytes=100, local_port=1,
        remote_port=rng.getrandbits(16), family=rng.choice((2, 10)), kind=rng.randrange(1, 4), role=rng.randrange(2),
        bucket=rng.randrange(len(BUCKETS.bounds_ns) + 1), comm=rng.choice(NAMES),
    )  # fmt: skip
    ct.memmove(made.local_address, rng.randbytes(16), 16)
    record = bytearray(bytes(made))
    for name, *_ in rng.sample(Event._fields_, rng.choice((0, 0, 1, 1, 2, 5))):
        place = getattr(Event, name)
        record[place.offset : place.offset + place.size] = number(rng, 8 * place.size).to_bytes(place.size, "little")
    return bytes(record)


def scribble(world: World) -> None:
    """Writes to a map what no program would."""
    rng, probe = world.rng, world.probe

    def key(size: int) -> bytes:
        return b"".join(number(rng, 32).to_bytes(4, "little") for _ in range(size // 4))

    def series() -> None:
        probe._series.update(
            key(ct.sizeof(SeriesKey)), rng.choice((rng.randrange(MAX_SERIES), number(rng, 32))).to_bytes(4, "little")
        )

    def identities() -> None:
        name = rng.choice(NAMES) + rng.randbytes(3)
        value = (
            rng.randbytes(8) + name[:16].ljust(16, b"\0") + rng.choice((b"", name, rng.randbytes(64))).ljust(64, b"\0")
        )
        probe._identities.update(rng.randrange(MAX_SERIES).to_bytes(4, "little"), value)

    def histograms() -> None:
        size = probe._histograms.value_bytes
        value = b"".join(number(rng, 32).to_bytes(4, "little") for _ in range(size // 4))
        probe._histograms.update(rng.randrange(2 * MAX_SERIES).to_bytes(4, "little"), value)

    def books() -> None:
        size = probe._books.value_bytes
        probe._books.update(bytes(4), b"".join(number(rng, 64).to_bytes(8, "little") for _ in range(size // 8)))

    def processes() -> None:
        known = [bytes(SeriesKey.from_buffer_copy(key).process) for key, _ in probe._series.items()]
        probe._processes.update(rng.choice([key(ct.sizeof(ProcessKey)), *known]), number(rng, 64).to_bytes(8, "little"))

    with contextlib.suppress(OSError):  # a map that is full, or that nobody may write to
        rng.choice((series, series, identities, histograms, histograms, books, processes))()


def check_points(points: Sequence[Point]) -> None:
    for point in points:
        assert 0 < point.start_unix_ns < point.time_unix_ns < time.time_ns() + 10**9
        if point.kind == "histogram":
            assert len(point.bucket_counts) == len(point.bounds) + 1
            assert point.count == sum(point.bucket_counts)
            assert point.sum is not None and math.isfinite(point.sum) and point.sum >= 0
            assert all(exemplar.time_unix_ns <= point.time_unix_ns for exemplar in point.exemplars)
            assert all(0 <= float(exemplar.value or 0) < 10**10 for exemplar in point.exemplars)
        elif point.monotonic:
            assert float(point.value or 0) >= 0


def check_spans(spans: Sequence[SpanRecord]) -> None:
    now_ns = time.time_ns() + 10**9
    for span in spans:
        assert 0 < span.start_unix_ns <= span.end_unix_ns < now_ns
        assert int(span.trace_id, 16) and int(span.span_id, 16)


@pytest.mark.timeout(180 + RECORDS // 400)
@settings(
    max_examples=max(1, RECORDS // 2 // RECORDS_EACH),
    deadline=None,
    derandomize=RECORDS <= 10_000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**64 - 1))
def test_any_content(
    world: World, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    world.rng.seed(seed)
    for _ in range(world.rng.randrange(1, 6)):
        for _ in range(world.rng.randrange(5)):
            scribble(world)
        for _ in range(RECORDS_EACH // 3):
            world.probe._receive(event(world.rng))
            world.records += 1
        if world.rng.random() < 0.2:
            world.collector.sweep()
        world.exporter.export(MetricsData([ResourceMetrics(Resource({}), [], "")]))
        world.provider.force_flush()
    world.table.flush()
    check_points(world.metrics.points)
    check_spans(world.traces.spans)
    assert {point.name for point in world.metrics.points} >= {"tcppktlat.segments.received", "tcppktlat.events.lost"}
    assert len(world.totals.totals) <= SERIES_LIMIT + 1
    assert len(world.probe._live) <= MAX_SERIES
    rows = os.pread(world.rows_fd, 1 << 30, 0).decode()
    assert all(line.isprintable() and ROW.fullmatch(line) for line in rows.splitlines())
    assert rows.count("\n") == len(rows.splitlines())
    world.metrics.points.clear()
    world.traces.spans.clear()
    os.ftruncate(world.rows_fd, 0)
    os.lseek(world.rows_fd, 0, os.SEEK_SET)
    assert capfd.readouterr().err == "" and caplog.records == []  # the encoder logs what it has to leave out
