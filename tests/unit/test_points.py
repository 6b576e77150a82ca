"""From what the kernel counted to what a receiver adds up, whatever exports fail on the way.

The probe and the collector's answers are made up here; the encoders are OTLP's own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast
from unittest import mock
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_tcppktlat.buckets import FIRST_EXPONENT, Buckets, explicit_buckets, exponential_buckets
from otel_tcppktlat.demo.receiver import Point, points_of
from otel_tcppktlat.probe.layout import BOOKS, Event, Identity, ProcessKey, SeriesKey
from otel_tcppktlat.probe.probe import Delta, Harvest, Probe, Series
from otel_tcppktlat.series import SeriesTotals, Totals
from otel_tcppktlat.telemetry import collector as collector_module
from otel_tcppktlat.telemetry.collector import Collector, Temporality
from otel_tcppktlat.telemetry.diagnosis import Failure, Target, Watch
from otel_tcppktlat.telemetry.injection import InjectingExporter
from otel_tcppktlat.telemetry.points import Acknowledged, histogram_data, histogram_point, most_encoded_bytes
from otel_tcppktlat.telemetry.sending import Sender
from otel_tcppktlat.telemetry.spans import SpanBudget

CUMULATIVE, DELTA = AggregationTemporality.CUMULATIVE, AggregationTemporality.DELTA
DURATION, REJECTED = collector_module.DURATION, collector_module.REJECTED
RECEIVED, SETTLED = "tcppktlat.segments.received", "tcppktlat.segments.settled"
BUCKETS = {"explicit": explicit_buckets((0.001, 0.01, 0.1)), "exponential": exponential_buckets()}


def series(number: int) -> Series:
    """Three processes, of which each listens on two ports."""
    key = SeriesKey(process=ProcessKey(1, 100 + number // 2, 0), port=1000 + number % 2, family=2)
    return Series(key, Identity(1, b"comm", b"exe"))


class MadeUp:
    """A probe whose intervals a test makes up: {series: {bucket: count}}, each of 1 ms an observation."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self.next: Mapping[int, Mapping[int, int]] = {}
        self.observed = 0

    side = 0

    def harvest(self, all_rows: bool = True) -> Harvest:
        began_ns, deltas = time.monotonic_ns(), []
        events: list[tuple[Series | None, Event]] = []
        for number, counts in self.next.items():
            row = [0] * (len(self._buckets.bounds_ns) + 1)
            for bucket, count in counts.items():
                row[bucket] = count
                events.append(
                    (series(number), Event(picked_ns=began_ns, wait_ns=int(self._buckets.limits_s(bucket)[0] * 1e9) + 2,
                                           series=2 + number, bucket=bucket, tid=number, kind=1, family=2))
                )  # fmt: skip
            deltas.append(Delta(series(number), sum(row) * 1_000_000, row))
            self.observed += sum(row)
        self.next = {}
        return Harvest(began_ns, time.monotonic_ns(), deltas, events, {})

    def books(self) -> dict[str, int]:
        return {**dict.fromkeys(BOOKS, 0), "received": self.observed + 3, "observed": self.observed}

    def statistics(self) -> dict[str, tuple[int, int, int]]:
        return {}


class Answers(MetricExporter):
    """Encodes each request as OTLP; keeps those that are to succeed, and those that are to be refused for good."""

    def __init__(self) -> None:
        super().__init__()
        self.next: list[int] = []  # HTTP statuses
        self.requests: list[list[Point]] = []
        self.refused: list[list[Point]] = []
        names = dict.fromkeys(("HEADERS", "PROTOCOL", "TIMEOUT", "ENDPOINT"), "VARIABLE")
        self.watch = Watch(Target("metrics", "http/protobuf", urlsplit("http://h/v1/metrics"), False, [], names))

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        points = points_of(encode_metrics(metrics_data))
        status = self.next.pop(0) if self.next else 200
        if status == 200:
            self.requests.append(points)
            return MetricExportResult.SUCCESS
        parts = sum(point.name == DURATION for point in points) + any(point.name != DURATION for point in points)
        if status == 400 or status == 413 and parts == 1:
            self.refused.append(points)
        self.watch.note(Failure(status, ""))
        return MetricExportResult.FAILURE

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        pass


def counts_of(point: Point) -> Counter[int]:
    """By the kernel's bucket."""
    if point.kind == "histogram":
        return Counter({index: count for index, count in enumerate(point.bucket_counts) if count})
    assert point.offset is not None
    first = point.offset - (FIRST_EXPONENT - 1)
    return Counter({first + index: count for index, count in enumerate(point.positive_counts) if count})


INTERVALS = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 5), st.dictionaries(st.integers(0, 3), st.integers(1, 2**32), min_size=1)),
        st.lists(st.sampled_from([200, 503, 400, 413]), max_size=4),  # how requests are answered
        st.booleans(),  # a sweep before
    ),
    max_size=8,
)


@pytest.mark.parametrize("kind", BUCKETS)
@pytest.mark.parametrize("temporality", [CUMULATIVE, DELTA])
@pytest.mark.parametrize("attributes", [("server.port",), ("process.pid", "server.port"), ()])
@settings(max_examples=40, deadline=None)
@given(INTERVALS)
def test_nothing_is_lost_and_nothing_comes_twice(
    kind: str,
    temporality: AggregationTemporality,
    attributes: Sequence[str],
    intervals: list[tuple[dict[int, dict[int, int]], list[int], bool]],
) -> None:
    """Failures hit any request of an interval; the last interval succeeds. What is refused for good is counted."""
    buckets, answers = BUCKETS[kind], Answers()
    probe = MadeUp(buckets)
    with mock.patch.object(collector_module, "BATCH_POINTS", 2):
        totals = SeriesTotals(attributes, len(buckets.bounds_ns) + 1, limit=4)
        collector = Collector(
            cast(Probe, probe), buckets, totals, SpanBudget(None, None, 0, 0, 1), Temporality(temporality, temporality)
        )
        exporter = InjectingExporter(Sender(lambda: answers, answers.watch, MetricExportResult.SUCCESS), collector)
        nothing = MetricsData([ResourceMetrics(Resource({}), [], "")])
        truth: dict[frozenset[tuple[str, Any]], Counter[int]] = {}
        for interval, statuses, sweep in [*intervals, ({}, [], False), ({}, [], False)]:
            probe.next, answers.next = interval, list(statuses)
            for number, counts in interval.items():
                known = {"process.pid": 100 + number // 2, "server.port": 1000 + number % 2}
                key = frozenset((name, known[name]) for name in attributes)
                if key not in truth and len([one for one in truth if one != OVERFLOW]) == 4:
                    key = OVERFLOW
                truth.setdefault(key, Counter()).update(counts)
            if sweep:
                collector.sweep()
            exporter.export(nothing)
    told: dict[frozenset[tuple[str, Any]], Counter[int]] = {}
    sums: Counter[frozenset[tuple[str, Any]]] = Counter()
    numbers: Counter[str] = Counter()
    ended: dict[tuple[str, frozenset[tuple[str, Any]]], int] = {}
    refused = [point for request in answers.refused for point in request]
    lost = refused if temporality == DELTA else []
    for point in [*lost, *(point for request in answers.requests for point in request)]:
        key = frozenset(point.attributes.items())
        if temporality == DELTA and point.name != "tcppktlat.segments.queued" and not refused:
            assert ended.get((point.name, key), point.start_unix_ns) == point.start_unix_ns
            ended[point.name, key] = point.time_unix_ns
        if point.name == DURATION:
            assert point.count == sum(counts_of(point).values())
            before = told.get(key, Counter()) if temporality == DELTA else Counter()
            told[key] = before + counts_of(point)
            sums[key] = (sums[key] if temporality == DELTA else 0) + round((point.sum or 0) * 1000)
        elif point.name == RECEIVED or point.attributes.get("tcppktlat.outcome") == "observed":
            numbers[point.name] = (numbers[point.name] if temporality == DELTA else 0) + int(point.value or 0)
    assert told == truth
    assert sums == {key: sum(counts.values()) for key, counts in truth.items()}
    assert numbers == Counter({RECEIVED: probe.observed + 3, SETTLED: probe.observed})
    rejected = [int(point.value or 0) for request in answers.requests for point in request if point.name == REJECTED]
    assert (sum(rejected) if temporality == DELTA else rejected[-1]) == len(refused)


OVERFLOW: frozenset[tuple[str, Any]] = frozenset({("otel.metric.overflow", True)})

NAMES = st.text(max_size=64)


@pytest.mark.parametrize("kind", BUCKETS)
@given(st.data())
def test_the_bound_of_a_points_size_holds(kind: str, data: st.DataObject) -> None:
    """Whatever processes call themselves, and however large the counts are."""
    buckets = BUCKETS[kind]
    count = len(buckets.bounds_ns) + 1
    counts = data.draw(st.lists(st.integers(0, 2**57), min_size=count, max_size=count))
    attributes = (("process.executable.name", data.draw(NAMES)), ("server.port", 65535), ("x", True))
    exemplars = [
        Exemplar({"process.pid": 2**22, "thread.name": name}, 1.0, 2**63, span_id=2**64 - 1, trace_id=2**128 - 1)
        for name in data.draw(st.lists(NAMES, max_size=5))
    ]
    nothing = Acknowledged((0,) * count, 0, 2**62)
    point = histogram_point(buckets, attributes, Totals(counts, 2**62), nothing, 2**63, exemplars)
    metric = Metric("m", "", "s", histogram_data([point], CUMULATIVE))
    scope = InstrumentationScope("s")
    message = encode_metrics(MetricsData([ResourceMetrics(Resource({}), [ScopeMetrics(scope, [metric], "")], "")]))
    metrics = message.resource_metrics[0].scope_metrics[0].metrics[0]
    encoded = (metrics.histogram if kind == "explicit" else metrics.exponential_histogram).data_points[0]
    assert encoded.ByteSize() <= most_encoded_bytes(point)
    assert encoded.count == sum(counts)
