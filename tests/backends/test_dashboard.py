"""The dashboard at the settings that nobody touched: an agent that exports once a minute, a Grafana as installed."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from backends import dashboard
from backends.chain import AGGREGATION, HISTOGRAM, KINDS, SERVER
from backends.servers import Prometheus
from otel_tcppktlat.demo.receiver import Receiver, points_of
from telemetry.told import DURATION, deliver, scene

INTERVAL_S = 60  # between exports, by default
EXPORTS = 6
S = 10**9


def exports(receiver: Receiver) -> list[ExportMetricsServiceRequest]:
    """The exports that carry the histogram: of so few series, each is one request."""
    messages = [one.message for one in receiver.requests if isinstance(one.message, ExportMetricsServiceRequest)]
    return [one for one in messages if any(point.name == DURATION for point in points_of(one))]


def points(message: ExportMetricsServiceRequest) -> Iterator[Any]:
    """All points of a request, to be written to."""
    for resource in message.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                yield from getattr(metric, metric.WhichOneof("data")).data_points


def moved(message: ExportMetricsServiceRequest, start_unix_ns: int, time_unix_ns: int) -> ExportMetricsServiceRequest:
    """The same as if it had been collected then."""
    copy = ExportMetricsServiceRequest()
    copy.CopyFrom(message)
    for point in points(copy):
        later_ns = time_unix_ns - point.time_unix_nano
        point.start_time_unix_nano, point.time_unix_nano = start_unix_ns, time_unix_ns
        for exemplar in getattr(point, "exemplars", ()):
            exemplar.time_unix_nano += later_ns
    return copy


def send(prometheus: Prometheus, message: ExportMetricsServiceRequest) -> None:
    """By OTLP."""
    url, headers = f"{prometheus.url}/api/v1/otlp/v1/metrics", {"Content-Type": "application/x-protobuf"}
    answer = requests.post(url, message.SerializeToString(), headers=headers, timeout=30)
    assert answer.ok, answer.text


@pytest.mark.parametrize("kind", KINDS)
def test_no_panel_has_a_gap_at_the_default_interval(tmp_path: pathlib.Path, kind: str) -> None:
    """What the real agent exported in consecutive intervals, set a minute apart; every ten seconds has its value."""
    with scene(tmp_path, environment={AGGREGATION: KINDS[kind]}) as told:
        client, server = told.listener.connect()
        while len(exports(told.receiver)) <= EXPORTS:
            deliver(client, server, 0.05)
    collected = exports(told.receiver)[:EXPORTS]
    with Prometheus(tmp_path) as prometheus:
        end_unix_s = int(time.time())
        times_unix_s = [end_unix_s - INTERVAL_S * back for back in reversed(range(EXPORTS))]
        start_unix_s = times_unix_s[0] - INTERVAL_S
        for time_unix_s, message in zip(times_unix_s, collected, strict=True):
            send(prometheus, moved(message, start_unix_s * S, time_unix_s * S))

        def times_with_a_value(promql: str) -> set[float]:
            found = prometheus.over_time(promql, times_unix_s[1], end_unix_s, 10)
            values = {at for series in found for at, value in series.get("values", []) if not math.isnan(float(value))}
            return values | {at for series in found for at, _ in series.get("histograms", [])}

        for title, promql, wants_exemplars in dashboard.queries():
            assert times_with_a_value(promql) == set(range(times_unix_s[1], end_unix_s + 1, 10)), title
            assert not wants_exemplars or prometheus.exemplars(promql, start_unix_s), title
        # With Grafana's own default there would be nothing to see.
        name = HISTOGRAM + ("_count" if kind == "explicit" else "")
        assert not times_with_a_value(f"rate({name}{SERVER}[{dashboard.rate_interval_s('')}s])")


def test_the_data_source_knows_the_agents_interval() -> None:
    """For queries that are not the dashboard's."""
    (prometheus,) = (one for one in dashboard.DATA_SOURCES if one["type"] == "prometheus")
    assert dashboard.seconds(prometheus["jsonData"]["timeInterval"]) == INTERVAL_S
