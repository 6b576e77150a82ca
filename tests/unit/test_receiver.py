"""The embedded OTLP receiver, against the real exporters and against hand-made requests."""

from __future__ import annotations

import gzip
import http.client
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from opentelemetry.sdk.metrics import AlwaysOnExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from otel_tcppktlat.demo.receiver import (
    Delay,
    Fault,
    Hang,
    HttpStatus,
    InvalidArgument,
    PartialSuccess,
    Receiver,
    Request,
    ResourceExhausted,
    ServerTls,
    Unavailable,
    points_of,
)
from support.certificates import Certificates, make_certificates

Protocol = Literal["grpc", "http/protobuf"]
# Long enough for any machine; no test waits for it to pass.
LONG_S = 30.0
# Shorter than an exporter's first back-off (0.8 s at least), so that it fails at once and does not try again.
NO_RETRY_S = 0.7

both = pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_") or name.lower().endswith("_proxy") or name.endswith("CA_BUNDLE"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as started:
        yield started


def metric_exporter(receiver: Receiver, protocol: Protocol, *, timeout_s: float = LONG_S) -> MetricExporter:
    if protocol == "grpc":
        return GrpcMetricExporter(endpoint=receiver.grpc_endpoint, timeout=timeout_s)
    return HttpMetricExporter(endpoint=receiver.http_endpoint + "/v1/metrics", timeout=timeout_s)


def span_exporter(receiver: Receiver, protocol: Protocol, *, timeout_s: float = LONG_S) -> SpanExporter:
    if protocol == "grpc":
        return GrpcSpanExporter(endpoint=receiver.grpc_endpoint, timeout=timeout_s)
    return HttpSpanExporter(endpoint=receiver.http_endpoint + "/v1/traces", timeout=timeout_s)


def export(receiver: Receiver, protocol: Protocol, *, timeout_s: float = LONG_S) -> bool:
    """One export of `metrics_data`; whether the exporter calls it a success."""
    exporter = metric_exporter(receiver, protocol, timeout_s=timeout_s)
    try:
        return exporter.export(metrics_data()) is MetricExportResult.SUCCESS
    finally:
        exporter.shutdown()


def metrics_data() -> MetricsData:
    reader = InMemoryMetricReader()
    provider = MeterProvider(
        metric_readers=[reader],
        resource=Resource({"service.name": "tested", "ports": [1, 2]}),
        exemplar_filter=AlwaysOnExemplarFilter(),
        views=[View(instrument_name="exponential", aggregation=ExponentialBucketHistogramAggregation())],
        shutdown_on_exit=False,
    )
    meter = provider.get_meter("scope", "1.2", "https://example.org/schema")
    meter.create_counter("counted", "{packet}", "What was counted").add(3, {"a": "x", "b": True})
    meter.create_gauge("level", "s").set(1.5)
    explicit = meter.create_histogram("explicit", "s", explicit_bucket_boundaries_advisory=[1.0, 2.0])
    exponential = meter.create_histogram("exponential", "s")
    for value in (0.5, 1.5, 4.0):
        explicit.record(value, {"k": 1})
        exponential.record(value)
    data = reader.get_metrics_data()
    provider.shutdown()
    assert data is not None
    return data


def spans() -> list[ReadableSpan]:
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "tested"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("scope", "1.2", schema_url="https://example.org/schema")
    with tracer.start_as_current_span("outer", kind=SpanKind.CLIENT, attributes={"n": 7}) as span:
        span.set_status(StatusCode.ERROR, "broken")
        with tracer.start_as_current_span("inner"):
            pass
    provider.shutdown()
    return list(memory.get_finished_spans())


def message_with(points: int, *, name: str = "m") -> ExportMetricsServiceRequest:
    message = ExportMetricsServiceRequest()
    metric = message.resource_metrics.add().scope_metrics.add().metrics.add(name=name)
    for number in range(points):
        metric.gauge.data_points.add(as_int=number, time_unix_nano=number)
    return message


def post(
    receiver: Receiver, body: bytes, *, path: str = "/v1/metrics", method: str = "POST", **headers: str
) -> http.client.HTTPResponse:
    """One HTTP request on its own connection; the response's body is read (`response.body`)."""
    address = urlsplit(receiver.http_endpoint)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=LONG_S)
    try:
        return post_on(connection, body, path=path, method=method, **headers)
    finally:
        connection.close()


def post_on(
    connection: http.client.HTTPConnection,
    body: bytes,
    *,
    path: str = "/v1/metrics",
    method: str = "POST",
    **headers: str,
) -> http.client.HTTPResponse:
    sent = {"Content-Type": "application/x-protobuf"} | {name.replace("_", "-"): headers[name] for name in headers}
    connection.request(method, path, body, sent)
    response = connection.getresponse()
    vars(response)["body"] = response.read()
    return response


def call(receiver: Receiver, body: bytes, compression: grpc.Compression = grpc.Compression.NoCompression) -> bytes:
    """One gRPC metrics request with any bytes; the answer's bytes. Raises grpc.RpcError."""
    with grpc.insecure_channel(urlsplit(receiver.grpc_endpoint).netloc, compression=compression) as channel:
        method = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        answer: bytes = method(body, timeout=LONG_S)
        return answer


def connected(endpoint: str) -> socket.socket:
    address = urlsplit(endpoint)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=LONG_S)


def answers(receiver: Receiver) -> list[str]:
    return [request.answer for request in receiver.requests]


# ---------------------------------------------------------------------------------------------- what was exported


@both
def test_metrics_of_all_kinds(receiver: Receiver, protocol: Protocol) -> None:
    before = time.time_ns()
    assert export(receiver, protocol)
    after = time.time_ns()

    (request,) = receiver.requests
    assert (request.signal, request.protocol, request.answer, request.accepted) == ("metrics", protocol, "ok", True)
    assert before <= request.received_unix_ns <= after
    assert request.bytes == request.wire_bytes == request.message.ByteSize()

    (counted,) = receiver.points("counted")
    assert counted.resource == {"service.name": "tested", "ports": [1, 2]}
    assert (counted.scope_name, counted.scope_version) == ("scope", "1.2")
    assert counted.scope_schema_url == "https://example.org/schema"
    assert (counted.unit, counted.description) == ("{packet}", "What was counted")
    assert (counted.kind, counted.temporality, counted.monotonic) == ("sum", "cumulative", True)
    assert counted.attributes == {"a": "x", "b": True}
    assert counted.value == 3 and isinstance(counted.value, int)
    assert 0 < counted.start_unix_ns <= counted.time_unix_ns <= after
    (exemplar,) = counted.exemplars
    assert (exemplar.value, exemplar.trace_id, exemplar.span_id, exemplar.attributes) == (3, "", "", {})
    assert exemplar.time_unix_ns > 0

    (level,) = receiver.points("level")
    assert (level.kind, level.temporality, level.monotonic, level.value) == ("gauge", None, None, 1.5)
    assert (level.count, level.sum, level.min, level.max) == (None, None, None, None)

    (explicit,) = receiver.points("explicit")
    assert (explicit.kind, explicit.temporality, explicit.monotonic) == ("histogram", "cumulative", None)
    assert (explicit.value, explicit.count, explicit.sum, explicit.min, explicit.max) == (None, 3, 6.0, 0.5, 4.0)
    assert (explicit.bounds, explicit.bucket_counts) == ((1.0, 2.0), (1, 1, 1))
    assert sorted(exemplar.value or 0 for exemplar in explicit.exemplars) == [0.5, 1.5, 4.0]

    (exponential,) = receiver.points("exponential")
    assert exponential.kind == "exponential_histogram"
    assert (exponential.count, exponential.sum, exponential.zero_count) == (3, 6.0, 0)
    assert sum(exponential.positive_counts) == 3 and sum(exponential.negative_counts) == 0
    assert exponential.scale is not None and exponential.offset is not None
    base = 2 ** (2**-exponential.scale)
    assert base**exponential.offset < 0.5 <= base ** (exponential.offset + 1) * 1.000001

    assert receiver.points("no such metric") == []
    assert len(receiver.all_points()) == 4


def test_what_exporters_here_never_send() -> None:
    message = ExportMetricsServiceRequest()
    metrics = message.resource_metrics.add(schema_url="r").scope_metrics.add().metrics
    delta = metrics.add(name="delta")
    delta.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
    delta.sum.data_points.add(flags=1).exemplars.add(
        as_double=2.5, trace_id=b"\1" * 16, span_id=b"\2" * 8, filtered_attributes=[_pair("f", string_value="v")]
    )
    metrics.add(name="bare").histogram.data_points.add(count=4)
    metrics.add(name="summary").summary.data_points.add(count=2, sum=3.0)
    metrics.add(name="empty")
    delta_point, bare, summary = points_of(message)
    assert (delta_point.temporality, delta_point.monotonic, delta_point.value) == ("delta", False, None)
    assert (delta_point.flags, delta_point.resource_schema_url) == (1, "r")
    (exemplar,) = delta_point.exemplars
    assert (exemplar.value, exemplar.trace_id, exemplar.span_id) == (2.5, "01" * 16, "02" * 8)
    assert exemplar.attributes == {"f": "v"}
    assert (bare.temporality, bare.count, bare.sum, bare.min, bare.max) == (None, 4, None, None, None)
    assert (bare.bounds, bare.bucket_counts) == ((), ())
    assert (summary.kind, summary.count, summary.sum) == ("summary", 2, 3.0)


def test_attribute_values_of_all_types() -> None:
    message = message_with(1)
    nested = AnyValue(kvlist_value=KeyValueList(values=[_pair("k", int_value=1)]))
    message.resource_metrics[0].resource.attributes.extend(
        [
            _pair("string", string_value="s"),
            _pair("bool", bool_value=False),
            _pair("int", int_value=-5),
            _pair("double", double_value=0.5),
            _pair("bytes", bytes_value=b"\0"),
            _pair("array", array_value=ArrayValue(values=[AnyValue(int_value=1), nested])),
            _pair("unset"),
        ]
    )
    (point,) = points_of(message)
    assert point.resource == {
        "string": "s",
        "bool": False,
        "int": -5,
        "double": 0.5,
        "bytes": b"\0",
        "array": [1, {"k": 1}],
        "unset": None,
    }


def _pair(name: str, **value: Any) -> KeyValue:
    return KeyValue(key=name, value=AnyValue(**value))


@both
def test_spans(receiver: Receiver, protocol: Protocol) -> None:
    exporter = span_exporter(receiver, protocol)
    assert exporter.export(spans()) is SpanExportResult.SUCCESS
    exporter.shutdown()
    inner, outer = receiver.spans()
    assert (outer.name, outer.kind, outer.attributes) == ("outer", "client", {"n": 7})
    assert (outer.status, outer.status_message, outer.parent_span_id) == ("error", "broken", "")
    assert outer.resource == {"service.name": "tested"}
    assert (outer.scope_name, outer.scope_version) == ("scope", "1.2")
    assert outer.scope_schema_url == "https://example.org/schema"
    assert (inner.name, inner.kind, inner.status) == ("inner", "internal", "unset")
    assert (inner.trace_id, inner.parent_span_id) == (outer.trace_id, outer.span_id)
    assert len(inner.trace_id) == 32 and len(inner.span_id) == 16
    assert 0 < outer.start_unix_ns <= inner.start_unix_ns <= inner.end_unix_ns <= outer.end_unix_ns
    assert [request.signal for request in receiver.requests] == ["traces"]
    assert receiver.all_points() == []


@pytest.mark.parametrize(
    ("protocol", "compression", "header"),
    [
        ("grpc", "gzip", "grpc-encoding"),
        ("http/protobuf", "gzip", "content-encoding"),
        ("http/protobuf", "deflate", "content-encoding"),
    ],
)
def test_compression_and_headers(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, protocol: Protocol, compression: str, header: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Token=a%20b,other=c")
    assert export(receiver, protocol)
    (request,) = receiver.requests
    assert request.headers[header] == compression
    assert (request.headers["x-token"], request.headers["other"]) == ("a b", "c")
    assert "user-agent" in request.headers
    assert request.bytes == request.message.ByteSize() > request.wire_bytes > 0
    assert len(receiver.points("counted")) == 1


def test_grpc_encodings(receiver: Receiver) -> None:
    body = message_with(50).SerializeToString()
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Deflate, grpc.Compression.Gzip):
        call(receiver, body, compression)
    assert [request.headers["grpc-encoding"] for request in receiver.requests] == ["identity", "deflate", "gzip"]
    assert {request.bytes for request in receiver.requests} == {len(body)}
    assert len(receiver.points("m")) == 150


def test_an_empty_request_is_a_good_one(receiver: Receiver) -> None:
    assert post(receiver, b"").status == 200
    assert call(receiver, b"") == b""
    assert answers(receiver) == ["ok", "ok"]


# --------------------------------------------------------------------------------------------------------- TLS


def use_certificates(
    monkeypatch: pytest.MonkeyPatch, certificates: Certificates, *, client: bool, prefix: str = "OTEL_EXPORTER_OTLP"
) -> None:
    monkeypatch.setenv(f"{prefix}_CERTIFICATE", str(certificates.ca))
    if client:
        monkeypatch.setenv(f"{prefix}_CLIENT_CERTIFICATE", str(certificates.client_certificate))
        monkeypatch.setenv(f"{prefix}_CLIENT_KEY", str(certificates.client_key))


def server_tls(certificates: Certificates, *, client_ca: Path | None = None) -> ServerTls:
    return ServerTls(certificates.server_certificate, certificates.server_key, client_ca)


@both
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("prefix", ["OTEL_EXPORTER_OTLP", "OTEL_EXPORTER_OTLP_METRICS"])
def test_tls(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, protocol: Protocol, mutual: bool, prefix: str
) -> None:
    use_certificates(monkeypatch, certificates, client=mutual, prefix=prefix)
    with Receiver(tls=server_tls(certificates, client_ca=certificates.ca if mutual else None)) as receiver:
        assert receiver.grpc_endpoint.startswith("https://127.0.0.1:")
        assert receiver.http_endpoint.startswith("https://127.0.0.1:")
        assert export(receiver, protocol)
        assert len(receiver.points("counted")) == 1


@both
def test_spans_over_mutual_tls(certificates: Certificates, monkeypatch: pytest.MonkeyPatch, protocol: Protocol) -> None:
    use_certificates(monkeypatch, certificates, client=True)
    with Receiver(tls=server_tls(certificates, client_ca=certificates.ca)) as receiver:
        exporter = span_exporter(receiver, protocol)
        assert exporter.export(spans()) is SpanExportResult.SUCCESS
        exporter.shutdown()
        assert len(receiver.spans()) == 2


@both
def test_mutual_tls_refuses_a_client_without_certificate(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    use_certificates(monkeypatch, certificates, client=False)
    with Receiver(tls=server_tls(certificates, client_ca=certificates.ca)) as receiver:
        assert not export(receiver, protocol, timeout_s=NO_RETRY_S)
        assert receiver.requests == []


@both
def test_mutual_tls_refuses_a_client_of_another_authority(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    other = make_certificates(tmp_path, name="other")
    use_certificates(monkeypatch, certificates, client=True)
    with Receiver(tls=server_tls(certificates, client_ca=other.ca)) as receiver:
        assert not export(receiver, protocol, timeout_s=NO_RETRY_S)
        assert receiver.requests == []


@both
def test_mutual_tls_refuses_an_expired_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    expired = make_certificates(tmp_path, client_expired=True)
    use_certificates(monkeypatch, expired, client=True)
    with Receiver(tls=server_tls(expired, client_ca=expired.ca)) as receiver:
        assert not export(receiver, protocol, timeout_s=NO_RETRY_S)
        assert receiver.requests == []


@both
def test_an_expired_server_is_refused_by_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    expired = make_certificates(tmp_path, server_expired=True)
    use_certificates(monkeypatch, expired, client=False)
    with Receiver(tls=server_tls(expired)) as receiver:
        assert not export(receiver, protocol, timeout_s=NO_RETRY_S)
        assert receiver.requests == []


def test_a_failed_handshake_disturbs_nobody_else(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use_certificates(monkeypatch, certificates, client=False)
    with Receiver(tls=server_tls(certificates)) as receiver:
        silent = connected(receiver.http_endpoint)
        rude = connected(receiver.http_endpoint)
        rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while rude.recv(100):
            pass
        assert export(receiver, "http/protobuf")
        silent.close()
        rude.close()
    assert capfd.readouterr().err == ""


def test_missing_certificates_are_told_and_leave_nothing_open(tmp_path: Path) -> None:
    receiver = Receiver(tls=ServerTls(tmp_path / "no.pem", tmp_path / "no.key"))
    with pytest.raises(FileNotFoundError):
        receiver.start()
    with pytest.raises(RuntimeError, match="no ports"):
        _ = receiver.grpc_endpoint


# ------------------------------------------------------------------------------------------------------ faults


@both
@pytest.mark.parametrize(
    ("fault", "name"), [(Unavailable(0.01), "unavailable"), (ResourceExhausted(0.01), "resource_exhausted")]
)
def test_the_exporter_tries_again_when_told_so(receiver: Receiver, protocol: Protocol, fault: Fault, name: str) -> None:
    receiver.answer_with(fault, count=2)
    assert export(receiver, protocol)
    assert answers(receiver) == [name, name, "ok"]
    assert [request.accepted for request in receiver.requests] == [False, False, True]
    assert len(receiver.points("counted")) == 1


@both
def test_the_exporter_tries_again_by_itself(receiver: Receiver, protocol: Protocol) -> None:
    receiver.answer_with(Unavailable(), count=1)
    assert export(receiver, protocol)
    assert answers(receiver) == ["unavailable", "ok"]


@both
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (InvalidArgument(), "invalid_argument"),
        (HttpStatus(401), "http_status_401"),
        (HttpStatus(404), "http_status_404"),
        (HttpStatus(500), "http_status_500"),
    ],
)
def test_the_exporter_gives_up(receiver: Receiver, protocol: Protocol, fault: Fault, name: str) -> None:
    receiver.answer_with(fault)
    assert not export(receiver, protocol)
    assert answers(receiver) == [name]
    assert receiver.all_points() == []


@both
def test_partial_success_refuses_the_last_points(receiver: Receiver, protocol: Protocol) -> None:
    receiver.answer_with(PartialSuccess(1, "one too many"))
    body = message_with(3).SerializeToString()
    if protocol == "grpc":
        answer = call(receiver, body)
    else:
        response = post(receiver, body)
        assert (response.status, response.headers["Content-Type"]) == (200, "application/x-protobuf")
        answer = vars(response)["body"]
    partial = ExportMetricsServiceResponse.FromString(answer).partial_success
    assert (partial.rejected_data_points, partial.error_message) == (1, "one too many")
    assert [point.value for point in receiver.points("m")] == [0, 1]
    (request,) = receiver.requests
    assert (request.answer, request.rejected, request.accepted) == ("partial_success", 1, True)


@both
def test_partial_success_with_exporters(receiver: Receiver, protocol: Protocol) -> None:
    receiver.answer_with(PartialSuccess(1))
    exporter = span_exporter(receiver, protocol)
    assert exporter.export(spans()) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert [span.name for span in receiver.spans()] == ["inner"]
    receiver.answer_with(PartialSuccess(100))
    assert export(receiver, protocol)
    assert receiver.all_points() == []


@both
def test_hang_ends_with_a_refusal(receiver: Receiver, protocol: Protocol) -> None:
    receiver.answer_with(Hang(0.01), count=1)
    assert export(receiver, protocol)  # sent again after the 503 or UNAVAILABLE
    assert answers(receiver) == ["hang", "ok"]
    assert len(receiver.points("counted")) == 1


@both
def test_hang_outlasts_the_exporter_and_not_stop(protocol: Protocol) -> None:
    with Receiver() as receiver:
        receiver.answer_with(Hang(3600))
        assert not export(receiver, protocol, timeout_s=2.0)
        assert set(answers(receiver)) == {"hang"}
        began = time.monotonic()
    assert time.monotonic() - began < LONG_S


@both
def test_stop_ends_a_hang_at_once(protocol: Protocol) -> None:
    with Receiver() as receiver:
        receiver.answer_with(Hang(3600))
        body = message_with(1).SerializeToString()
        errors: list[BaseException] = []

        def send() -> None:
            try:
                call(receiver, body) if protocol == "grpc" else post(receiver, body)
            except (grpc.RpcError, OSError, http.client.HTTPException) as error:
                errors.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        receiver.wait_for(lambda r: len(r.requests) == 1, LONG_S)
        receiver.stop()
        thread.join(LONG_S)
        assert not thread.is_alive() and len(errors) == 1


@both
def test_delay_accepts_first_and_answers_later(receiver: Receiver, protocol: Protocol) -> None:
    receiver.answer_with(Delay(0.05))
    assert export(receiver, protocol)
    assert answers(receiver) == ["delay"]
    assert len(receiver.points("counted")) == 1


def test_refusals_over_http_follow_the_specification(receiver: Receiver) -> None:
    receiver.answer_with(Unavailable(1.5))
    response = post(receiver, b"")
    assert (response.status, response.headers["Retry-After"]) == (503, "1.5")
    assert response.headers["Content-Type"] == "application/x-protobuf"
    status = Status.FromString(vars(response)["body"])
    assert status.code == grpc.StatusCode.UNAVAILABLE.value[0]
    info = RetryInfo()
    assert status.details[0].Unpack(info) and info.retry_delay.ToNanoseconds() == 1_500_000_000
    receiver.answer_with(ResourceExhausted())
    response = post(receiver, b"")
    assert (response.status, response.headers["Retry-After"]) == (429, None)


def test_grpc_refusals_carry_retry_info(receiver: Receiver) -> None:
    receiver.answer_with(ResourceExhausted(2))
    with pytest.raises(grpc.RpcError) as raised:
        call(receiver, b"")
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(raised.value.trailing_metadata())
    assert "google.rpc.retryinfo-bin" in trailers
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, len(status.details)) == (8, 1)


def test_http_statuses_over_grpc(receiver: Receiver) -> None:
    for code, expected in [(401, "UNAUTHENTICATED"), (429, "UNAVAILABLE"), (404, "UNIMPLEMENTED"), (418, "UNKNOWN")]:
        receiver.answer_with(HttpStatus(code), count=1)
        with pytest.raises(grpc.RpcError) as raised:
            call(receiver, b"")
        assert raised.value.code().name == expected


def test_faults_by_signal_and_count(receiver: Receiver) -> None:
    def answered(path: str) -> int:
        return post(receiver, b"", path=path).status

    receiver.answer_with(HttpStatus(500), signal="traces")
    assert [answered("/v1/metrics"), answered("/v1/traces"), answered("/v1/traces")] == [200, 500, 500]
    receiver.answer_with(HttpStatus(501), count=2)
    assert [answered("/v1/metrics"), answered("/v1/traces")] == [501, 501]
    assert [answered("/v1/metrics"), answered("/v1/traces")] == [200, 200]
    receiver.answer_with(HttpStatus(502))
    receiver.answer_with(None, signal="metrics")
    assert [answered("/v1/metrics"), answered("/v1/traces")] == [200, 502]
    receiver.answer_with(None)
    assert answered("/v1/traces") == 200


def test_senseless_faults_are_refused(receiver: Receiver) -> None:
    with pytest.raises(ValueError, match="count"):
        receiver.answer_with(Unavailable(), count=0)
    with pytest.raises(ValueError, match="200"):
        HttpStatus(200)


# --------------------------------------------------------------------------------------------- requests gone wrong


def test_undecodable_over_http(receiver: Receiver) -> None:
    receiver.answer_with(Unavailable(), count=1)
    assert post(receiver, b"\xff\xff\xff").status == 400
    assert post(receiver, b"no gzip", Content_Encoding="gzip").status == 400
    assert post(receiver, b"no zlib", Content_Encoding="deflate").status == 400
    assert post(receiver, gzip.compress(b"")[:-1], Content_Encoding="gzip").status == 400
    assert post(receiver, gzip.compress(b"") + b"more", Content_Encoding="gzip").status == 400
    assert answers(receiver) == ["undecodable"] * 5
    assert all(request.message == ExportMetricsServiceRequest() for request in receiver.requests)
    assert receiver.requests[0].bytes == receiver.requests[0].wire_bytes == 3
    assert post(receiver, b"").status == 503  # the fault was not used up


def test_undecodable_over_grpc(receiver: Receiver) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        call(receiver, b"\xff\xff\xff")
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert answers(receiver) == ["undecodable"]
    assert call(receiver, b"") == b""


@pytest.mark.parametrize("compressed", [False, True])
def test_too_large(compressed: bool) -> None:
    body = message_with(1, name="m" * 5000).SerializeToString()
    fits = message_with(1, name="m" * 50).SerializeToString()
    with Receiver(max_request_bytes=1000) as receiver:
        compression = grpc.Compression.Gzip if compressed else grpc.Compression.NoCompression
        with pytest.raises(grpc.RpcError) as raised:
            call(receiver, body, compression)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        if compressed:
            response = post(receiver, gzip.compress(body), Content_Encoding="gzip")
        else:
            response = post(receiver, body)
        assert response.status == 413
        call(receiver, fits, compression)
        assert post(receiver, fits).status == 200
        assert answers(receiver) == ["too_large", "too_large", "ok", "ok"]


def test_http_requests_that_are_not_taken(receiver: Receiver) -> None:
    assert post(receiver, b"", path="/v1/logs").status == 404
    assert post(receiver, b"", method="GET").status == 405
    assert receiver.requests == []
    assert post(receiver, b"{}", Content_Type="application/json").status == 415
    assert post(receiver, b"", Content_Encoding="br").status == 415
    assert answers(receiver) == ["unsupported", "unsupported"]
    assert post(receiver, b"", Content_Length="many").status == 411
    assert post(receiver, b"", Content_Length=str(1 << 40)).status == 413


def test_http_connections_are_kept(receiver: Receiver) -> None:
    address = urlsplit(receiver.http_endpoint)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=LONG_S)
    connection.connect()
    kept = connection.sock
    body = message_with(1).SerializeToString()
    assert post_on(connection, body).status == 200
    assert post_on(connection, b"\xff").status == 400
    assert post_on(connection, body, path="/elsewhere").status == 404
    assert post_on(connection, zlib.compress(body), Content_Encoding="deflate").status == 200
    assert connection.sock is kept
    connection.close()
    assert answers(receiver) == ["ok", "undecodable", "ok"]


# ------------------------------------------------------------------------------------------------- the receiver


def refused(endpoint: str) -> bool:
    try:
        connected(endpoint).close()
    except ConnectionRefusedError:
        return True
    return False


def test_it_goes_away_and_comes_back() -> None:
    receiver = Receiver()
    with pytest.raises(RuntimeError):
        _ = receiver.http_endpoint
    with receiver:
        endpoints = (receiver.grpc_endpoint, receiver.http_endpoint)
        assert post(receiver, b"").status == 200
        receiver.stop()
        receiver.stop()
        assert all(refused(endpoint) for endpoint in endpoints)
        assert (receiver.grpc_endpoint, receiver.http_endpoint) == endpoints
        assert answers(receiver) == ["ok"]
        receiver.start()
        with pytest.raises(RuntimeError, match="already started"):
            receiver.start()
        for _ in range(10):
            receiver.restart()
        assert (receiver.grpc_endpoint, receiver.http_endpoint) == endpoints
        assert post(receiver, b"").status == 200
        assert call(receiver, b"") == b""
    assert all(refused(endpoint) for endpoint in endpoints)


@both
def test_an_exporter_survives_a_restart(receiver: Receiver, protocol: Protocol) -> None:
    exporter = metric_exporter(receiver, protocol)
    assert exporter.export(metrics_data()) is MetricExportResult.SUCCESS
    receiver.restart()
    assert exporter.export(metrics_data()) is MetricExportResult.SUCCESS
    exporter.shutdown()
    assert len(receiver.points("counted")) == 2


@both
def test_an_exporter_waits_for_it_to_come_back(receiver: Receiver, protocol: Protocol) -> None:
    receiver.stop()
    exporter = metric_exporter(receiver, protocol)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(exporter.export(metrics_data())))
    thread.start()
    receiver.start()
    receiver.wait_for(lambda r: bool(r.points("counted")), LONG_S)
    thread.join(LONG_S)
    exporter.shutdown()
    assert results == [MetricExportResult.SUCCESS]


def test_given_ports() -> None:
    with Receiver() as first:
        ports = [urlsplit(endpoint).port or 0 for endpoint in (first.grpc_endpoint, first.http_endpoint)]
        second = Receiver(grpc_port=ports[0], http_port=ports[1])
        with pytest.raises(OSError):
            second.start()
    with second:
        assert [urlsplit(endpoint).port for endpoint in (second.grpc_endpoint, second.http_endpoint)] == ports


def test_wait_for(receiver: Receiver) -> None:
    thread = threading.Thread(target=post, args=(receiver, message_with(2).SerializeToString()))
    thread.start()
    receiver.wait_for(lambda r: len(r.points("m")) == 2, LONG_S)
    thread.join(LONG_S)
    receiver.answer_with(InvalidArgument())
    post(receiver, b"")
    with pytest.raises(TimeoutError) as raised:
        receiver.wait_for(lambda r: False, 0.01)
    text = str(raised.value)
    assert "0.01 s" in text and "m (2)" in text
    assert "1 x metrics http/protobuf ok" in text and "1 x metrics http/protobuf invalid_argument" in text
    receiver.clear()
    with pytest.raises(TimeoutError, match="no request"):
        receiver.wait_for(lambda r: bool(r.requests), 0)


def test_on_request_is_told_of_all_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Request] = []

    def fail(request: Request) -> None:
        seen.append(request)
        raise ZeroDivisionError

    with Receiver(on_request=fail) as receiver:
        assert post(receiver, b"").status == 200
        assert post(receiver, b"\xff").status == 400
        assert call(receiver, b"") == b""
        assert seen == receiver.requests and len(seen) == 3
    assert "on_request failed" in caplog.text


def test_many_at_once(receiver: Receiver) -> None:
    body = message_with(1).SerializeToString()
    senders: list[Callable[[], object]] = [lambda: post(receiver, body), lambda: call(receiver, body)]
    threads = [threading.Thread(target=senders[number % 2]) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert answers(receiver) == ["ok"] * 40
    assert len(receiver.points("m")) == 40
