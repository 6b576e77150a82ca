"""The histogram, its exemplars, their spans and the books, as a collector receives them, in each form they may have."""

from __future__ import annotations

import math
import os
import platform
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from otel_tcppktlat import __version__
from otel_tcppktlat.demo.receiver import Kind, Temporality
from telemetry import told
from telemetry.told import BOOKS, DURATION, QUEUED, RECEIVED, SETTLED, Scene, deliver

AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
PREFERENCE = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
EXPONENTIAL = "base2_exponential_bucket_histogram"
WAITS_S = (0.0, 0.0, 0.0, 0.002, 0.012, 0.03, 0.06, 0.11)


@dataclass(frozen=True)
class Form:
    """How an agent was told to export, and what that has to look like."""

    preference: str
    protocol: str
    kind: Kind
    histogram: Temporality
    counter: Temporality
    bounds_s: tuple[float, ...] = ()
    arguments: tuple[str, ...] = ()


FORMS = {
    "explicit": Form("cumulative", "grpc", "histogram", "cumulative", "cumulative", told.DEFAULT_BOUNDS_S),
    "boundaries": Form(
        "LowMemory", "http/protobuf", "histogram", "delta", "cumulative", (0.001, 0.02, 0.05),
        ("--boundaries", "0.001,0.02,0.05"),
    ),
    "exponential": Form("", "http/protobuf", "exponential_histogram", "cumulative", "cumulative"),
    "exponential, delta": Form("delta", "grpc", "exponential_histogram", "delta", "delta"),
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS.values(), ids=list(FORMS))
def form(request: pytest.FixtureRequest) -> Form:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def scene(form: Form, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Waits of each length, each in a pickup of its own, each with a span; all exported."""
    environment = {
        PREFERENCE: form.preference,
        AGGREGATION: EXPONENTIAL if form.kind == "exponential_histogram" else "",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.version=7",
    }
    folder = tmp_path_factory.mktemp("agent")
    arguments = (*form.arguments, "--span-rate", "1000000", "0")
    with told.scene(folder, *arguments, environment=environment, protocol=form.protocol) as it:
        sender, reader = it.listener.connect()
        for _ in range(2):
            for wait_s in WAITS_S:
                deliver(sender, reader, wait_s)
            time.sleep(0.5)
        it.settle()
        yield it


def test_every_wait_is_in_its_bucket(scene: Scene, form: Form) -> None:
    """Each pickup was one segment, and its span says how long exactly it waited."""
    lengths_ns = [told.length_ns(span) for span in scene.receiver.spans()]
    assert len(lengths_ns) == 2 * len(WAITS_S)
    point = scene.receiver.points(DURATION)[-1]
    total = told.waits(scene.receiver)
    assert total.buckets == Counter(told.bucket_of(point, ns / 1e9) for ns in lengths_ns)
    assert total.count == len(lengths_ns)
    assert math.isclose(total.sum_s, sum(lengths_ns) / 1e9, rel_tol=1e-9)
    assert sorted(lengths_ns)[-1] >= 110_000_000


def test_form(scene: Scene, form: Form) -> None:
    points = scene.receiver.points(DURATION)
    assert points
    for point in points:
        assert (point.kind, point.temporality, point.unit) == (form.kind, form.histogram, "s")
        assert point.bounds == form.bounds_s
        assert point.scale == (2 if form.kind == "exponential_histogram" else None)
        assert point.min is None and point.max is None
        assert point.count == sum(told.bucket_counts(point).values())
        assert point.start_unix_ns < point.time_unix_ns
    for name in BOOKS:
        expected = "cumulative" if name == QUEUED else form.counter
        assert {point.temporality for point in scene.receiver.points(name)} == {expected}
    assert {point.monotonic for name in (RECEIVED, SETTLED) for point in scene.receiver.points(name)} == {True}
    assert {point.monotonic for point in scene.receiver.points(QUEUED)} == {False}


def test_times_follow_the_temporality(scene: Scene, form: Form) -> None:
    """Cumulative points share their start; each delta starts where the last one ended."""
    for name, temporality in ((DURATION, form.histogram), (RECEIVED, form.counter)):
        points = scene.receiver.points(name)
        if temporality == "cumulative":
            assert len({point.start_unix_ns for point in points}) == 1
            assert sorted(points, key=lambda point: point.time_unix_ns) == points
        else:
            for one, next_one in zip(points, points[1:], strict=False):
                assert one.time_unix_ns == next_one.start_unix_ns


def test_default_attributes(scene: Scene) -> None:
    executable = os.path.basename(os.readlink("/proc/self/exe"))
    assert list(told.waits_by_attributes(scene.receiver)) == [
        frozenset(
            {
                "process.executable.name": executable,
                "server.port": scene.listener.port,
                "network.type": "ipv4",
                "tcppktlat.role": "server",
            }.items()
        )
    ]


def test_every_bucket_that_grew_has_an_exemplar(scene: Scene, form: Form) -> None:
    """Its value in the bucket, its time in the interval."""
    before_unix_ns, counts_before = 0, Counter[int]()
    for point in scene.receiver.points(DURATION):
        counts = Counter(told.bucket_counts(point))
        grown = set(counts - counts_before) if form.histogram == "cumulative" else set(counts)
        assert {told.bucket_of(point, float(exemplar.value or 0)) for exemplar in point.exemplars} == grown
        assert len(point.exemplars) == len(grown)
        for exemplar in point.exemplars:
            assert max(before_unix_ns, point.start_unix_ns) < exemplar.time_unix_ns <= point.time_unix_ns
        before_unix_ns, counts_before = point.time_unix_ns, counts


def test_exemplars_point_to_spans(scene: Scene) -> None:
    spans = told.spans_by_id(scene.receiver)
    found = told.exemplars(scene.receiver)
    assert found
    for _, exemplar in found:
        span = spans[exemplar.trace_id, exemplar.span_id]
        assert told.length_ns(span) / 1e9 == exemplar.value
        assert abs(span.end_unix_ns - exemplar.time_unix_ns) < 1_000_000
        assert exemplar.attributes == {
            "process.pid": os.getpid(),
            "thread.id": threading.get_native_id(),
            "thread.name": open(f"/proc/self/task/{threading.get_native_id()}/comm").read().strip(),
        }


def test_spans(scene: Scene) -> None:
    spans = scene.receiver.spans()
    assert len({span.trace_id for span in spans}) == len({span.span_id for span in spans}) == len(spans)
    reader_port = scene.listener.port
    for span in spans:
        assert (span.name, span.kind, span.parent_span_id, span.status) == ("tcp receive", "internal", "", "unset")
        assert (span.scope_name, span.scope_version) == ("otel_tcppktlat", __version__)
        assert span.scope_schema_url == "https://opentelemetry.io/schemas/1.44.0"
        attributes = dict(span.attributes)
        assert isinstance(attributes.pop("network.peer.port"), int)
        assert attributes == {
            "process.executable.name": os.path.basename(os.readlink("/proc/self/exe")),
            "process.pid": os.getpid(),
            "thread.id": threading.get_native_id(),
            "thread.name": open("/proc/self/comm").read().strip(),
            "network.local.address": "127.0.0.1",
            "network.local.port": reader_port,
            "network.peer.address": "127.0.0.1",
            "network.transport": "tcp",
            "network.type": "ipv4",
            "server.port": reader_port,
            "tcppktlat.role": "server",
            "tcppktlat.segments": 1,
            "tcppktlat.bytes": 100,
        }


def test_who_measures(scene: Scene) -> None:
    """The resource, the scope, and a unit and a description on every metric."""
    points = scene.receiver.all_points()
    resources = [point.resource for point in points] + [span.resource for span in scene.receiver.spans()]
    for resource in resources:
        assert resource["service.name"] == "otel-tcppktlat"
        assert resource["service.version"] == "7"
        assert resource["deployment.environment.name"] == "test"
        assert resource["host.name"] == socket.gethostname()
        assert resource["os.type"] == platform.system().lower()
        assert resource["telemetry.sdk.name"] == "opentelemetry"
    for point in points:
        assert point.description and point.unit
        assert point.scope_name in ("otel_tcppktlat", "otel_tcppktlat.self")
        assert point.scope_version == __version__
        assert point.scope_schema_url == "https://opentelemetry.io/schemas/1.44.0"
        assert point.name.startswith("tcppktlat.")
    assert {point.unit for point in points if point.name in BOOKS} == {"{segment}"}


def test_books_balance(scene: Scene) -> None:
    """Also with segments unread, and with some that never will be."""
    before = told.check_balance(scene.receiver)
    assert before == {"received": 2 * len(WAITS_S), "observed": 2 * len(WAITS_S), "queued": 0}
    sender, reader = scene.listener.connect()
    for count in range(1, 6):
        sender.sendall(b"y" * 10)
        told.queued_for(reader, 10 * count)
    scene.settle()
    assert told.check_balance(scene.receiver) == {**before, "received": before["received"] + 5, "queued": 5}
    assert len(reader.recv(20)) == 20
    reader.close()
    scene.settle()
    assert told.check_balance(scene.receiver) == {
        "received": before["received"] + 5,
        "observed": before["observed"] + 2,
        "unread": 3,
        "queued": 0,
    }
