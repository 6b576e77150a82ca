"""A collector that is away, refuses, hangs or comes back: no count is lost, and none comes twice."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_tcppktlat.demo.receiver import (
    Fault,
    Hang,
    HttpStatus,
    InvalidArgument,
    PartialSuccess,
    Receiver,
    ResourceExhausted,
    ServerTls,
    Unavailable,
    points_of,
    spans_of,
)
from support.certificates import Certificates, make_certificates
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


def refused(receiver: Receiver, signal: str = "metrics") -> int:
    """Requests of a signal that were not taken."""
    return sum(one.signal == signal and not one.accepted for one in receiver.requests)


@pytest.mark.parametrize(
    "fault",
    [Unavailable(), HttpStatus(500), Hang(30)],
    ids=str,
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


@pytest.mark.parametrize("fault", [Unavailable(), Hang(30)], ids=str)
def test_refused_spans_are_sent_again(scene: Scene, fault: Fault) -> None:
    """None is lost, and none comes twice, while metrics go on; their exemplars point to those spans."""
    sender, reader = scene.listener.connect()
    before = {span.span_id for span in scene.receiver.spans()}
    scene.receiver.answer_with(fault, signal="traces")
    for _ in range(2):
        count = refused(scene.receiver, "traces")
        for _ in range(5):
            deliver(sender, reader)
        scene.receiver.wait_for(lambda seen, count=count: refused(seen, "traces") > count + 1, 60)  # type: ignore[misc]
    scene.settle()
    assert {span.span_id for span in scene.receiver.spans()} == before
    scene.receiver.answer_with(None, signal="traces")
    observed = told.check_balance(scene.receiver)["observed"]
    scene.receiver.wait_for(lambda seen: len(seen.spans()) == observed, 60)
    spans = told.spans_by_id(scene.receiver)
    assert len(spans) == observed == len(before) + 10
    ids = {(one.trace_id, one.span_id) for _, one in told.exemplars(scene.receiver)}
    assert ids <= set(spans)
    assert told.dropped(scene.receiver, "queue_full") == told.dropped(scene.receiver, "rejected") == 0


def test_a_receiver_that_asks_for_time_gets_it(scene: Scene) -> None:
    """RetryInfo and Retry-After; longer than an interval, a pause between batches, and the SDK's own patience."""
    sender, reader = scene.listener.connect()
    scene.receiver.answer_with(ResourceExhausted(retry_after_s=1.5))
    before = len(scene.receiver.requests)
    deliver(sender, reader)
    for signal in ("metrics", "traces"):
        count = refused(scene.receiver, signal)
        scene.receiver.wait_for(lambda seen, signal=signal, count=count: refused(seen, signal) >= count + 2, 60)  # type: ignore[misc]
    scene.receiver.answer_with(None)
    asked = scene.receiver.requests[before:]
    for signal in ("metrics", "traces"):
        times_ns = [one.received_unix_ns for one in asked if one.signal == signal and not one.accepted]
        gaps_ns = [later - earlier for earlier, later in zip(times_ns, times_ns[1:], strict=False)]
        assert gaps_ns and min(gaps_ns) >= 1.49e9, gaps_ns
    scene.settle()
    observed = told.check_balance(scene.receiver)["observed"]
    scene.receiver.wait_for(lambda seen: len(seen.spans()) == observed, 60)


def test_restarted_during_an_export(scene: Scene) -> None:
    """Both signals' requests are under way when the receiver goes; its port comes back."""
    sender, reader = scene.listener.connect()
    scene.receiver.answer_with(Hang(60))
    hung = sum(one.answer == "hang" for one in scene.receiver.requests)
    deliver(sender, reader)
    scene.receiver.wait_for(lambda seen: sum(one.answer == "hang" for one in seen.requests) >= hung + 2, 60)
    scene.receiver.stop()
    deliver(sender, reader)
    scene.receiver.answer_with(None)
    scene.receiver.start()
    scene.settle()
    observed = told.check_balance(scene.receiver)["observed"]
    scene.receiver.wait_for(lambda seen: len(seen.spans()) == observed, 60)
    assert len(told.spans_by_id(scene.receiver)) == observed


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


def lines_about(scene: Scene, text: str) -> list[str]:
    """What the agent says of it to whoever does not ask for -v."""
    return [line for line in scene.agent.stderr.splitlines() if text in line and "Failed to export" not in line]


def test_partial_success(scene: Scene) -> None:
    """What the receiver takes a request without is not sent again, is counted, and one line says why, once."""
    sender, reader = scene.listener.connect()
    before = {name: told.number(scene.receiver, name) for name in (told.REJECTED, told.DROPPED)}
    spans_before = len(scene.receiver.spans())
    observed = told.check_balance(scene.receiver)["observed"]

    def answered(times: int) -> None:
        scene.receiver.wait_for(lambda seen: sum(one.answer == "partial_success" for one in seen.requests) == times, 60)

    for number, request in enumerate(("1f0e-ab", "c0ffee-d4", "9ad7-b"), 1):
        message = f"point 7 of tenant 12, request {request}, is\nodd"
        scene.receiver.answer_with(PartialSuccess(1, message), signal="metrics", count=1)
        answered(number)
    scene.receiver.answer_with(PartialSuccess(1, "span 8 is odd"), signal="traces", count=1)
    deliver(sender, reader)
    answered(4)
    scene.settle()
    assert told.number(scene.receiver, told.REJECTED) == before[told.REJECTED] + 3
    assert told.number(scene.receiver, told.DROPPED) == before[told.DROPPED] + 1
    assert told.dropped(scene.receiver, "rejected") == 1
    assert len(scene.receiver.spans()) == spans_before
    assert told.check_balance(scene.receiver)["observed"] == observed + 1
    (line,) = lines_about(scene, "tenant 12")
    assert "refuses 1 data points for good, which are dropped: point 7 of tenant 12, request 1f0e-ab, is odd" in line
    (line,) = lines_about(scene, "span 8 is odd")
    assert "refuses 1 spans for good" in line


def test_what_the_receiver_refuses_for_good(scene: Scene) -> None:
    """INVALID_ARGUMENT, HTTP 400. Deltas: each observation is in one acknowledged or refused point. Spans go once."""
    sender, reader = scene.listener.connect()
    before = told.waits(scene.receiver).count
    rejected, dropped = (told.number(scene.receiver, name) for name in (told.REJECTED, told.DROPPED))
    first = len(scene.receiver.requests)
    deliver(sender, reader)
    scene.receiver.answer_with(InvalidArgument())
    for _ in range(3):
        count = len(scene.receiver.requests)
        deliver(sender, reader)
        scene.receiver.wait_for(lambda seen, count=count: len(seen.requests) > count + 4, 60)  # type: ignore[misc]
    scene.receiver.answer_with(None)
    deliver(sender, reader)
    scene.settle()
    requests = scene.receiver.requests[first:]
    refused_points = [
        point
        for one in requests
        if isinstance(one.message, ExportMetricsServiceRequest) and not one.accepted
        for point in points_of(one.message)
    ]
    refused_spans = [
        span
        for one in requests
        if isinstance(one.message, ExportTraceServiceRequest) and not one.accepted
        for span in spans_of(one.message)
    ]
    assert told.number(scene.receiver, told.REJECTED) == rejected + len(refused_points)
    assert told.number(scene.receiver, told.DROPPED) == dropped + len(refused_spans)
    acknowledged = told.waits(scene.receiver).count - before
    if refused_points[0].temporality == "delta" or scene.receiver.points(DURATION)[0].temporality == "delta":
        lost = sum(point.count or 0 for point in refused_points if point.name == DURATION)
        assert lost >= 2 and acknowledged + lost == 5
    else:
        assert acknowledged == 5
    ids = [(span.trace_id, span.span_id) for span in [*scene.receiver.spans(), *refused_spans]]
    assert len(set(ids)) == len(ids)
    for what in ("metrics", "spans"):
        lines = lines_about(scene, f"{what} cannot be delivered")
        assert any(line.endswith("; what it refuses is dropped") for line in lines), lines


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


def settled(receiver: Receiver, count: int) -> None:
    """So many observations, each in one point and with one span."""
    told.settle(receiver)
    assert told.check_balance(receiver)["observed"] == count
    receiver.wait_for(lambda seen: len(seen.spans()) >= count, 60)
    assert len(told.spans_by_id(receiver)) == len(receiver.spans()) == count


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_an_expired_certificate_that_is_renewed(protocol: str, tmp_path: pathlib.Path) -> None:
    made = [make_certificates(tmp_path / name, server_expired=name == "expired") for name in ("expired", "renewed")]
    trusted, certificate, key = (tmp_path / name for name in ("trusted", "certificate", "key"))
    trusted.write_bytes(b"".join(one.ca.read_bytes() for one in made))

    def install(one: Certificates) -> None:
        certificate.write_bytes(one.server_certificate.read_bytes())
        key.write_bytes(one.server_key.read_bytes())

    install(made[0])
    with Receiver(tls=ServerTls(certificate, key)) as receiver:
        environment = {PREFERENCE: "delta", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.7"}
        environment |= {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(trusted)}
        with told.scene(tmp_path, "0", environment=environment, protocol=protocol, receiver=receiver) as scene:
            connection = scene.listener.connect()
            deliver(*connection)
            for what in ("metrics", "spans"):
                scene.agent.wait_for_stderr(f"otel-tcppktlat: {what} cannot be delivered")
            assert receiver.requests == []
            install(made[1])
            receiver.restart()
            deliver(*connection)
            settled(receiver, 2)
            assert "certificate has expired" in scene.agent.stderr


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_name_that_does_not_resolve_yet(protocol: str, tmp_path: pathlib.Path) -> None:
    """The agent has an /etc/hosts of its own."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    script = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    prefix = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    with Receiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        environment = {
            PREFERENCE: "delta",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "0.7",
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint.replace("127.0.0.1", "collector.invalid"),
        }
        with told.scene(
            tmp_path, "0", environment=environment, protocol=protocol, receiver=receiver, prefix=prefix
        ) as scene:
            connection = scene.listener.connect()
            deliver(*connection)
            for what in ("metrics", "spans"):
                scene.agent.wait_for_stderr(f"otel-tcppktlat: {what} cannot be delivered")
            with hosts.open("a") as file:
                file.write("127.0.0.1 collector.invalid\n")
            deliver(*connection)
            settled(receiver, 2)
            assert "the name collector.invalid does not resolve" in scene.agent.stderr


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_request_over_the_receivers_limit(protocol: str, tmp_path: pathlib.Path) -> None:
    """Metrics and spans go again at once in smaller requests, and in such ones from then on."""
    addresses, limit = 120, 10_000
    with Receiver(max_request_bytes=limit) as receiver:
        environment = {PREFERENCE: "delta", "OTEL_METRIC_EXPORT_INTERVAL": "400", "OTEL_BSP_SCHEDULE_DELAY": "400"}
        arguments = ("--attributes", "server.address", "--span-rate", "1000", "0")
        with told.scene(
            tmp_path, *arguments, environment=environment, protocol=protocol, receiver=receiver, host="0.0.0.0"
        ) as scene:
            for round_number in range(2):
                if round_number:
                    receiver.wait_for(lambda seen: len(seen.spans()) == addresses, 60)
                    scene.settle()
                    first = [one.answer for one in receiver.requests].count("too_large")
                    assert {one.signal for one in receiver.requests if not one.accepted} == {"metrics", "traces"}
                for number in range(addresses):
                    connection = scene.listener.connect(f"127.1.0.{number + 1}")
                    deliver(*connection)
                    for sock in connection:
                        sock.close()
            settled(receiver, 2 * addresses)
            assert {one.count for one in told.waits_by_attributes(receiver).values()} == {2}
            answers = Counter(one.answer for one in receiver.requests)
            assert set(answers) == {"ok", "too_large"}
            assert answers["too_large"] - first <= 1  # a batch of spans with longer names, at most
            assert told.number(receiver, told.REJECTED) == told.number(receiver, told.DROPPED) == 0
            assert lines_about(scene, "cannot be delivered") == []


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_limit_below_what_can_be_split(protocol: str, tmp_path: pathlib.Path) -> None:
    """What the agent counts itself fits in no request, which is said once; histogram and spans do."""
    with Receiver(max_request_bytes=3000) as receiver:
        environment = {PREFERENCE: "delta"}
        with told.scene(tmp_path, "0", environment=environment, protocol=protocol, receiver=receiver) as scene:
            connection = scene.listener.connect()
            for count in range(1, 4):
                deliver(*connection)
                receiver.wait_for(lambda seen, count=count: told.waits(seen).count == count == len(seen.spans()), 60)  # type: ignore[misc]
            assert receiver.points(RECEIVED) == []
            (line,) = lines_about(scene, "metrics cannot be delivered")
            assert "larger than 3000 bytes" in line or "413" in line


def test_away_for_30_s(tmp_path: pathlib.Path) -> None:
    """Memory has a bound: spans that the queue and one batch hold are kept, and the others never made, and counted."""
    queue, batch, pickups = 50, 10, 600
    environment = {
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "OTEL_BSP_MAX_QUEUE_SIZE": str(queue),
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": str(batch),
    }
    with contextlib.ExitStack() as stack:
        scenes = []
        for protocol, preference in (("grpc", "delta"), ("http/protobuf", "cumulative")):
            folder = tmp_path / preference
            folder.mkdir()
            environment |= {PREFERENCE: preference}
            scenes.append(
                stack.enter_context(
                    told.scene(folder, "0", "--span-rate", "10000", environment=environment, protocol=protocol)
                )
            )
        connections = [scene.listener.connect() for scene in scenes]
        for scene in scenes:
            scene.receiver.stop()
        end_s = time.monotonic() + 30
        for _ in range(pickups):
            for connection in connections:
                deliver(*connection)
            time.sleep(max(0.0, (end_s - time.monotonic()) / pickups))
        time.sleep(max(0.0, end_s - time.monotonic()))
        for scene in scenes:
            scene.receiver.start()
        for scene in scenes:
            receiver = scene.receiver
            scene.settle()
            assert told.check_balance(receiver)["observed"] == pickups

            def without_span(receiver: Receiver = receiver) -> int:
                return told.number(receiver, told.SUPPRESSED) + told.number(receiver, told.DROPPED)

            receiver.wait_for(lambda seen: len(seen.spans()) + without_span(seen) == pickups, 60)
            spans = told.spans_by_id(receiver)
            assert queue <= len(spans) <= queue + batch
            assert told.dropped(receiver, "queue_full") == without_span() >= pickups - queue - batch
            ids = {(one.trace_id, one.span_id) for _, one in told.exemplars(receiver) if one.span_id}
            assert ids and ids <= set(spans)
            assert "Traceback" not in scene.agent.stderr
