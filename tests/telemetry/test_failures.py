"""A collector that is away, refuses, hangs or comes back: no count is lost, and none comes twice."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterator

import pytest

from otel_tcppktlat.demo.receiver import (
    Fault,
    Hang,
    HttpStatus,
    InvalidArgument,
    Receiver,
    ResourceExhausted,
    Unavailable,
)
from telemetry import told
from telemetry.told import DURATION, RECEIVED, Scene, deliver

PREFERENCE = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"


@pytest.fixture(scope="module", params=["grpc delta", "http/protobuf delta", "grpc cumulative"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    protocol, preference = request.param.split()
    environment = {
        PREFERENCE: preference,
        AGGREGATION: "base2_exponential_bucket_histogram" if protocol == "grpc" else "",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.7",  # less than the first retry takes
    }
    folder = tmp_path_factory.mktemp("agent")
    with told.scene(folder, "0", "--span-rate", "10000", environment=environment, protocol=protocol) as it:
        it.settle()
        yield it


def refused(receiver: Receiver) -> int:
    """Requests with metrics that were not taken."""
    return sum(one.signal == "metrics" and not one.accepted for one in receiver.requests)


@pytest.mark.parametrize(
    "fault",
    [Unavailable(), InvalidArgument(), ResourceExhausted(retry_after_s=5), HttpStatus(500), Hang(30)],
    ids=lambda fault: type(fault).__name__,
)
def test_refused_metrics_are_made_good(scene: Scene, fault: Fault) -> None:
    """Two intervals that fail, each with waits of its own; then all is there, exemplars and all."""
    sender, reader = scene.listener.connect()
    before = told.check_balance(scene.receiver)
    for wait_s in (0.0, 0.03):
        deliver(sender, reader, wait_s)
    scene.receiver.answer_with(fault, signal="metrics")
    for wait_s in (0.25, 0.0):
        count = refused(scene.receiver)
        deliver(sender, reader, wait_s)
        scene.receiver.wait_for(lambda seen, count=count: refused(seen) > count + 1, 60)  # type: ignore[misc]
    scene.receiver.answer_with(None, signal="metrics")
    scene.settle()
    after = told.check_balance(scene.receiver)
    assert after["received"] == before["received"] + 4
    lengths_ns = [told.length_ns(span) for span in scene.receiver.spans()]
    assert len(lengths_ns) == after["received"]
    points = scene.receiver.points(DURATION)
    total = told.waits(scene.receiver)
    assert total.buckets == Counter(told.bucket_of(points[-1], ns / 1e9) for ns in lengths_ns)
    assert total.sum_s == pytest.approx(sum(lengths_ns) / 1e9, rel=1e-9)
    slowest_s = max(lengths_ns[-4:]) / 1e9
    (exemplar,) = (exemplar for _, exemplar in told.exemplars(scene.receiver) if exemplar.value == slowest_s)
    assert (exemplar.trace_id, exemplar.span_id) in told.spans_by_id(scene.receiver)


def test_points_go_on_where_the_last_accepted_ones_ended(scene: Scene) -> None:
    """Deltas leave no gap and no overlap, whatever failed between them; cumulative ones keep their start."""
    for name in (RECEIVED, DURATION):
        points = scene.receiver.points(name)
        if points[0].temporality == "delta":
            assert all(
                one.time_unix_ns == next_one.start_unix_ns for one, next_one in zip(points, points[1:], strict=False)
            )
        else:
            assert len({point.start_unix_ns for point in points}) == 1


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_comes_late_and_goes(protocol: str, tmp_path: pathlib.Path) -> None:
    """Away at the start, there, away, and there again."""
    with Receiver() as receiver:
        receiver.stop()
        environment = {PREFERENCE: "delta", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.7"}
        with told.scene(tmp_path, "0", environment=environment, protocol=protocol, receiver=receiver) as scene:
            sender, reader = scene.listener.connect()
            for round_number in range(1, 3):
                deliver(sender, reader, 0.1)
                errors = scene.agent.stderr.count("Failed to export")
                told.eventually(lambda errors=errors: scene.agent.stderr.count("Failed to export") > errors)  # type: ignore[misc]
                receiver.start()
                deliver(sender, reader)
                scene.settle()
                assert told.check_balance(receiver)["observed"] == 2 * round_number
                receiver.stop()
            receiver.start()
            scene.settle()
            assert scene.agent.stop() == 0
        assert told.check_balance(receiver)["observed"] == 4
        assert "Traceback" not in scene.agent.stderr
