"""An OTLP receiver inside this process, on loopback: gRPC and HTTP/protobuf, TLS and mutual TLS, faults on demand.

The demo and the tests import this module; nothing else does. It takes metrics and traces, keeps every request whose
body reached it (those it refused, too) in memory without bound (`Receiver.clear` empties it), and gives typed views of
the data points and spans that it accepted.

    with Receiver() as receiver:
        ...export to receiver.grpc_endpoint or receiver.http_endpoint + "/v1/metrics"...
        receiver.wait_for(lambda r: bool(r.points("some.metric")), timeout_s=10)

Times are in nanoseconds of Unix time where a name ends in `_unix_ns`, durations in seconds where it ends in `_s`.
"""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from opentelemetry.proto.metrics.v1.metrics_pb2 import Exemplar as ExemplarMessage

_logger = logging.getLogger(__name__)

Signal = Literal["metrics", "traces"]
Protocol = Literal["grpc", "http/protobuf"]
Kind = Literal["sum", "gauge", "histogram", "exponential_histogram", "summary"]
Temporality = Literal["cumulative", "delta"]
Message = ExportMetricsServiceRequest | ExportTraceServiceRequest

_LOOPBACK = "127.0.0.1"
_SIGNALS: tuple[Signal, ...] = ("metrics", "traces")
_HTTP_PATHS: Mapping[str, Signal] = {"/v1/metrics": "metrics", "/v1/traces": "traces"}
# Bodies up to this size are read whole, so that a request above `max_request_bytes` is answered (and kept) by this
# module and not cut off by a library.
_MAX_WIRE_BYTES = 64 << 20
_GRPC_WORKERS = 16
_STOP_TIMEOUT_S = 0.8
_GRPC_GRACE_S = 0.1
_HTTP_POLL_S = 0.05


# ---------------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Unavailable:
    """gRPC UNAVAILABLE, HTTP 503; with `retry_after_s` also RetryInfo and Retry-After."""

    retry_after_s: float | None = None


@dataclass(frozen=True)
class ResourceExhausted:
    """gRPC RESOURCE_EXHAUSTED, HTTP 429; with `retry_after_s` also RetryInfo and Retry-After."""

    retry_after_s: float | None = None


@dataclass(frozen=True)
class InvalidArgument:
    """gRPC INVALID_ARGUMENT, HTTP 400: not to be sent again."""


@dataclass(frozen=True)
class PartialSuccess:
    """Success with a partial_success part. The last `rejected` points or spans of the request count as refused."""

    rejected: int
    message: str = ""


@dataclass(frozen=True)
class Hang:
    """No answer for `seconds`, then UNAVAILABLE or 503. The request is kept at once, as refused."""

    seconds: float


@dataclass(frozen=True)
class Delay:
    """The request is accepted at once, the answer (success) is given after `seconds`."""

    seconds: float


@dataclass(frozen=True)
class HttpStatus:
    """An HTTP status, 300 to 599; gRPC gets the status that gRPC's own table gives for it."""

    code: int

    def __post_init__(self) -> None:
        if not 300 <= self.code <= 599:
            raise ValueError(f"HTTP status {self.code} is no fault: expected 300 to 599")


Fault = Unavailable | ResourceExhausted | InvalidArgument | PartialSuccess | Hang | Delay | HttpStatus


@dataclass(frozen=True)
class _Answer:
    """What to do with one request, for both protocols."""

    name: str
    grpc_code: grpc.StatusCode = grpc.StatusCode.OK
    http_status: int = 200
    retry_after_s: float | None = None
    wait_s: float = 0.0
    rejected: int = 0
    message: str = ""

    @property
    def accepts(self) -> bool:
        return self.grpc_code is grpc.StatusCode.OK


_OK = _Answer("ok")
_GRPC_OF_HTTP: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}


def _plan(fault: Fault) -> _Answer:
    if isinstance(fault, Unavailable):
        return _Answer("unavailable", grpc.StatusCode.UNAVAILABLE, 503, fault.retry_after_s)
    if isinstance(fault, ResourceExhausted):
        return _Answer("resource_exhausted", grpc.StatusCode.RESOURCE_EXHAUSTED, 429, fault.retry_after_s)
    if isinstance(fault, InvalidArgument):
        return _Answer("invalid_argument", grpc.StatusCode.INVALID_ARGUMENT, 400)
    if isinstance(fault, PartialSuccess):
        return _Answer("partial_success", rejected=fault.rejected, message=fault.message)
    if isinstance(fault, Hang):
        return _Answer("hang", grpc.StatusCode.UNAVAILABLE, 503, wait_s=fault.seconds)
    if isinstance(fault, Delay):
        return _Answer("delay", wait_s=fault.seconds)
    code = _GRPC_OF_HTTP.get(fault.code, grpc.StatusCode.UNKNOWN)
    return _Answer(f"http_status_{fault.code}", code, fault.code)


# --------------------------------------------------------------------------------------------- what was received


@dataclass(frozen=True)
class ServerTls:
    """TLS of both servers: PEM files. With `client_ca`, a client must show a certificate signed by that authority."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class Request:
    """One request whose body reached the receiver.

    headers: names in lower case; equal names joined by ", ". HTTP: `content-encoding` as sent. gRPC: the metadata, and
    `grpc-encoding` ("identity", "gzip", "deflate") as found on the message.
    bytes: size of the body after decompression; of the body as sent when that could not be decompressed or is too
    large. wire_bytes: size as sent (without framing).
    message: empty when the answer is "undecodable", "too_large" or "unsupported".
    answer: "ok"; or the fault: "unavailable", "resource_exhausted", "invalid_argument", "partial_success", "hang",
    "delay", "http_status_<code>"; or what was wrong with it: "undecodable" (400, INVALID_ARGUMENT), "too_large" (413,
    RESOURCE_EXHAUSTED), "unsupported" (415: a content type or encoding that is not taken).
    rejected: with "partial_success", how many points or spans at the end of the message count as refused.
    """

    signal: Signal
    protocol: Protocol
    headers: Mapping[str, str]
    received_unix_ns: int
    bytes: int
    wire_bytes: int
    message: Message
    answer: str
    rejected: int = 0

    @property
    def accepted(self) -> bool:
        """Whether its points or spans count as taken (all but the last `rejected`)."""
        return self.answer in ("ok", "partial_success", "delay")


@dataclass(frozen=True)
class ExemplarRecord:
    """One exemplar; the ids in hex, empty when it has none. attributes: those filtered out of the point's own."""

    value: float | int | None
    time_unix_ns: int
    trace_id: str
    span_id: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One data point with all that identifies it.

    temporality: None for gauges and summaries, and when the sender left it unspecified. value: sums and gauges only
    (None when the point has no recorded value). count, sum, min, max: histograms (sum, min and max None when absent).
    bounds, bucket_counts: explicit histograms; n bounds, n + 1 counts (both empty when only count and sum were sent).
    scale, zero_count, zero_threshold, offset, positive_counts, negative_offset, negative_counts: exponential
    histograms; positive_counts[i] counts values in (base**(offset + i), base**(offset + i + 1)] with
    base = 2**(2**-scale).
    """

    resource: dict[str, Any]
    resource_schema_url: str
    scope_name: str
    scope_version: str
    scope_schema_url: str
    scope_attributes: dict[str, Any]
    name: str
    unit: str
    description: str
    kind: Kind
    temporality: Temporality | None
    monotonic: bool | None
    attributes: dict[str, Any]
    start_unix_ns: int
    time_unix_ns: int
    flags: int
    value: float | int | None = None
    count: int | None = None
    sum: float | None = None
    min: float | None = None
    max: float | None = None
    bounds: tuple[float, ...] = ()
    bucket_counts: tuple[int, ...] = ()
    scale: int | None = None
    zero_count: int | None = None
    zero_threshold: float | None = None
    offset: int | None = None
    positive_counts: tuple[int, ...] = ()
    negative_offset: int | None = None
    negative_counts: tuple[int, ...] = ()
    exemplars: list[ExemplarRecord] = field(default_factory=list)


@dataclass(frozen=True)
class SpanRecord:
    """One span; ids in hex, parent_span_id empty for a root span.

    kind: "unspecified", "internal", "server", "client", "producer" or "consumer". status: "unset", "ok" or "error".
    """

    resource: dict[str, Any]
    scope_name: str
    scope_version: str
    scope_schema_url: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_span_id: str
    start_unix_ns: int
    end_unix_ns: int
    attributes: dict[str, Any]
    status: str
    status_message: str


_SPAN_KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
_SPAN_STATUSES = ("unset", "ok", "error")


def _value(any_value: AnyValue) -> Any:
    which = any_value.WhichOneof("value")
    if which is None:
        return None
    if which == "array_value":
        return [_value(item) for item in any_value.array_value.values]
    if which == "kvlist_value":
        return _attributes(any_value.kvlist_value.values)
    return getattr(any_value, which)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _number(message: Any) -> float | int | None:
    which = message.WhichOneof("value")
    return None if which is None else cast("float | int", getattr(message, which))


def _exemplars(messages: Iterable[ExemplarMessage]) -> list[ExemplarRecord]:
    return [
        ExemplarRecord(
            value=_number(message),
            time_unix_ns=message.time_unix_nano,
            trace_id=message.trace_id.hex(),
            span_id=message.span_id.hex(),
            attributes=_attributes(message.filtered_attributes),
        )
        for message in messages
    ]


def _temporality(data: Any) -> Temporality | None:
    temporality = getattr(data, "aggregation_temporality", None)
    if temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE:
        return "cumulative"
    if temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA:
        return "delta"
    return None


def _numbers_of(kind: Kind, point: Any) -> dict[str, Any]:
    """The fields of `Point` that only this kind of metric has."""
    if kind in ("sum", "gauge"):
        return {"value": _number(point), "exemplars": _exemplars(point.exemplars)}
    if kind == "summary":
        return {"count": point.count, "sum": point.sum}
    shared = {
        "count": point.count,
        "sum": _optional(point, "sum"),
        "min": _optional(point, "min"),
        "max": _optional(point, "max"),
        "exemplars": _exemplars(point.exemplars),
    }
    if kind == "histogram":
        return shared | {"bounds": tuple(point.explicit_bounds), "bucket_counts": tuple(point.bucket_counts)}
    return shared | {
        "scale": point.scale,
        "zero_count": point.zero_count,
        "zero_threshold": point.zero_threshold,
        "offset": point.positive.offset,
        "positive_counts": tuple(point.positive.bucket_counts),
        "negative_offset": point.negative.offset,
        "negative_counts": tuple(point.negative.bucket_counts),
    }


def _points_of_metric(
    resource: dict[str, Any], resource_schema_url: str, scope: InstrumentationScope, schema_url: str, metric: Metric
) -> Iterator[Point]:
    kind: Kind | None = metric.WhichOneof("data")
    if kind is None:
        return
    data: Any = getattr(metric, kind)
    for point in data.data_points:
        yield Point(
            resource=resource,
            resource_schema_url=resource_schema_url,
            scope_name=scope.name,
            scope_version=scope.version,
            scope_schema_url=schema_url,
            scope_attributes=_attributes(scope.attributes),
            name=metric.name,
            unit=metric.unit,
            description=metric.description,
            kind=kind,
            temporality=_temporality(data),
            monotonic=data.is_monotonic if kind == "sum" else None,
            attributes=_attributes(point.attributes),
            start_unix_ns=point.start_time_unix_nano,
            time_unix_ns=point.time_unix_nano,
            flags=point.flags,
            **_numbers_of(kind, point),
        )


def points_of(message: ExportMetricsServiceRequest) -> list[Point]:
    """All data points of a metrics message, in its order."""
    return [
        point
        for resource_metrics in message.resource_metrics
        for resource in [_attributes(resource_metrics.resource.attributes)]
        for scope_metrics in resource_metrics.scope_metrics
        for metric in scope_metrics.metrics
        for point in _points_of_metric(
            resource, resource_metrics.schema_url, scope_metrics.scope, scope_metrics.schema_url, metric
        )
    ]


def spans_of(message: ExportTraceServiceRequest) -> list[SpanRecord]:
    """All spans of a trace message, in its order."""
    return [
        SpanRecord(
            resource=resource,
            scope_name=scope_spans.scope.name,
            scope_version=scope_spans.scope.version,
            scope_schema_url=scope_spans.schema_url,
            name=span.name,
            kind=_SPAN_KINDS[span.kind] if span.kind < len(_SPAN_KINDS) else str(span.kind),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_span_id=span.parent_span_id.hex(),
            start_unix_ns=span.start_time_unix_nano,
            end_unix_ns=span.end_time_unix_nano,
            attributes=_attributes(span.attributes),
            status=(
                _SPAN_STATUSES[span.status.code] if span.status.code < len(_SPAN_STATUSES) else str(span.status.code)
            ),
            status_message=span.status.message,
        )
        for resource_spans in message.resource_spans
        for resource in [_attributes(resource_spans.resource.attributes)]
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
    ]


# ------------------------------------------------------------------------------------------------------ the bodies


class _Refusal(Exception):
    """A body that is not taken, with the answer for it."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(answer.message)
        self.answer = answer


def _undecodable(message: str) -> _Refusal:
    return _Refusal(_Answer("undecodable", grpc.StatusCode.INVALID_ARGUMENT, 400, message=message))


def _unsupported(message: str) -> _Refusal:
    return _Refusal(_Answer("unsupported", grpc.StatusCode.UNIMPLEMENTED, 415, message=message))


def _too_large(limit: int) -> _Refusal:
    message = f"request larger than {limit} bytes"
    return _Refusal(_Answer("too_large", grpc.StatusCode.RESOURCE_EXHAUSTED, 413, message=message))


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its encoding ("identity", "gzip" or "deflate", which is zlib's format), at most `limit` bytes.

    Raises _Refusal: too large, not in that format, cut short, or an unknown encoding.
    """
    if encoding == "identity":
        data = body
    elif encoding in ("gzip", "deflate"):
        decompressor = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
        try:
            data = decompressor.decompress(body, limit + 1)
        except zlib.error as error:
            raise _undecodable(f"body is not {encoding}: {error}") from error
        if len(data) <= limit and (not decompressor.eof or decompressor.unused_data):
            raise _undecodable(f"{encoding} body is cut short or has something after its end")
    else:
        raise _unsupported(f"encoding {encoding!r} is not taken, only gzip, deflate and identity")
    if len(data) > limit:
        raise _too_large(limit)
    return data


def _grpc_encoding(body: bytes) -> str:
    """The compression of a gRPC message, by its first bytes.

    No message of the two types taken here begins like gzip (0x1f) or zlib (0x78): their one field is number 1 and its
    tag is 0x0a.
    """
    if body[:2] == b"\x1f\x8b":
        return "gzip"
    return "deflate" if body[:1] == b"\x78" else "identity"


def _new_message(signal: Signal) -> Message:
    return ExportMetricsServiceRequest() if signal == "metrics" else ExportTraceServiceRequest()


def _success_body(signal: Signal, answer: _Answer) -> bytes:
    partial = answer.name == "partial_success"
    if signal == "metrics":
        metrics = ExportMetricsServiceResponse()
        if partial:
            metrics.partial_success.rejected_data_points = answer.rejected
            metrics.partial_success.error_message = answer.message
        body: bytes = metrics.SerializeToString()
        return body
    traces = ExportTraceServiceResponse()
    if partial:
        traces.partial_success.rejected_spans = answer.rejected
        traces.partial_success.error_message = answer.message
    body = traces.SerializeToString()
    return body


def _retry_info(seconds: float) -> RetryInfo:
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(round(seconds * 1e9))
    return info


def _status(answer: _Answer) -> Status:
    """The google.rpc.Status of a refusal: HTTP's body, and gRPC's details."""
    status = Status(code=cast(int, answer.grpc_code.value[0]), message=_text(answer))
    if answer.retry_after_s is not None:
        status.details.add().Pack(_retry_info(answer.retry_after_s))
    return status


def _text(answer: _Answer) -> str:
    return answer.message or f"refused on demand: {answer.name}"


def _joined(pairs: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in pairs:
        text = value.hex() if isinstance(value, bytes) else value
        key = name.lower()
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


# ------------------------------------------------------------------------------------------------------ the servers


class _HttpServer(ThreadingHTTPServer):
    """The HTTP side of one `Receiver.start`, with connections that `stop` can end."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, receiver: Receiver, port: int, tls: ssl.SSLContext | None) -> None:
        self.receiver = receiver
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__((_LOOPBACK, port), _HttpHandler)
        if tls is not None:
            # The handshake is left to the first read, in the connection's own thread.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_HTTP_POLL_S,), name="otlp-http-receiver", daemon=True
        )
        self._thread.start()

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's full name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = _LOOPBACK, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            with self._changed:
                self._connections.discard(request)
                self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A broken connection or handshake is the client's matter, and no reason to write to standard error.
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        _logger.log(level, "HTTP connection from %s ended: %r", client_address, error, exc_info=level > logging.DEBUG)

    def stop(self) -> None:
        """End the listener and all connections; waits for their threads up to _STOP_TIMEOUT_S."""
        self.stopping.set()
        self.shutdown()
        self._thread.join(_STOP_TIMEOUT_S)
        self.server_close()
        with self._changed:
            for connection in self._connections:
                try:
                    # Not SSLSocket.shutdown, which takes the TLS state from under the thread that reads.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    pass
            self._changed.wait_for(lambda: not self._connections, _STOP_TIMEOUT_S)


class _HttpHandler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    server_version = "otlp-receiver"
    sys_version = ""
    timeout = 60
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug("HTTP %s " + format, self.client_address, *args)

    def do_GET(self) -> None:
        self._reply(405, b"only POST is taken\n", "text/plain", Allow="POST")

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        signal = _HTTP_PATHS.get(self.path)
        if signal is None:
            self._reply(404, b"only /v1/metrics and /v1/traces are here\n", "text/plain")
            return
        headers = _joined(self.headers.items())
        encoding = headers.get("content-encoding", "identity").strip().lower()
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        answer = self.server.receiver._take(signal, "http/protobuf", headers, body, encoding, content_type)
        if answer.wait_s and self.server.stopping.wait(answer.wait_s):
            self.close_connection = True
            return
        extra: dict[str, str] = {}
        if answer.retry_after_s is not None:
            extra["Retry-After"] = f"{answer.retry_after_s:.9g}"
        reply = _success_body(signal, answer) if answer.accepts else _status(answer).SerializeToString()
        self._reply(answer.http_status, reply, "application/x-protobuf", **extra)

    def _body(self) -> bytes | None:
        """The body as sent; None when the request was answered here because its length is not known or absurd."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self.close_connection = True
            self._reply(411, b"a Content-Length is needed\n", "text/plain", Connection="close")
            return None
        if int(length) > self.server.receiver._max_wire_bytes:
            self.close_connection = True
            self._reply(413, b"request too large\n", "text/plain", Connection="close")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _reply(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _GrpcServer:
    """The gRPC side of one `Receiver.start`.

    Its handlers take the messages as bytes, still compressed, so that this module sees the encoding and the size, and
    answers INVALID_ARGUMENT (the generated code would answer INTERNAL) to what is no message.
    """

    def __init__(self, receiver: Receiver, port: int, credentials: grpc.ServerCredentials | None) -> None:
        self._receiver = receiver
        self._executor = ThreadPoolExecutor(_GRPC_WORKERS, "otlp-grpc-receiver")
        self._server = grpc.server(
            self._executor,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.per_message_decompression", 0),
                ("grpc.max_receive_message_length", receiver._max_wire_bytes),
            ],
        )
        services = (
            ("metrics", metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"].full_name),
            ("traces", trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"].full_name),
        )
        self._server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(
                    name, {"Export": grpc.unary_unary_rpc_method_handler(self._handler(cast(Signal, signal)))}
                )
                for signal, name in services
            )
        )
        address = f"{_LOOPBACK}:{port}"
        try:
            if credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, credentials)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise
        self._server.start()

    def _handler(self, signal: Signal) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def export(body: bytes, context: grpc.ServicerContext) -> bytes:
            encoding = _grpc_encoding(body)
            headers = _joined(context.invocation_metadata()) | {"grpc-encoding": encoding}
            answer = self._receiver._take(signal, "grpc", headers, body, encoding, "application/x-protobuf")
            if answer.wait_s:
                gone = threading.Event()
                if not context.add_callback(gone.set) or gone.wait(answer.wait_s):
                    return b""  # the client has given up, or the server stops: nobody reads this
            if answer.accepts:
                return _success_body(signal, answer)
            trailers: list[tuple[str, bytes]] = [("grpc-status-details-bin", _status(answer).SerializeToString())]
            if answer.retry_after_s is not None:
                # The Python exporter looks for this trailer and not into grpc-status-details-bin.
                trailers.append(("google.rpc.retryinfo-bin", _retry_info(answer.retry_after_s).SerializeToString()))
            context.set_trailing_metadata(tuple(trailers))
            context.abort(answer.grpc_code, _text(answer))
            raise AssertionError("abort raises")

        return export

    def stop(self) -> threading.Event:
        """Close the port and cancel the calls that do not end soon; the event is set when that is done."""
        # Without a grace period the connections end with an error, which gRPC's C core reports on standard error.
        done: threading.Event = self._server.stop(_GRPC_GRACE_S)
        self._executor.shutdown(wait=False)
        return done


# ----------------------------------------------------------------------------------------------------- the receiver


@dataclass
class _Rule:
    fault: Fault
    remaining: int | None


class Receiver:
    """An OTLP receiver on 127.0.0.1; see the module's text. All methods may be called from any thread."""

    def __init__(
        self,
        *,
        tls: ServerTls | None = None,
        on_request: Callable[[Request], None] | None = None,
        max_request_bytes: int = 4 << 20,
        grpc_port: int = 0,
        http_port: int = 0,
    ) -> None:
        """Nothing is opened before `start` (or `with`).

        on_request: called in the connection's thread for every request, after it is kept and before it is answered;
        what it raises is logged. max_request_bytes: largest body taken, after decompression. Ports: 0 for free ones.
        """
        self._tls = tls
        self._on_request = on_request
        self._max_request_bytes = max_request_bytes
        self._max_wire_bytes = max(_MAX_WIRE_BYTES, max_request_bytes)
        self._wanted_ports = (grpc_port, http_port)
        self._reserved: tuple[socket.socket, socket.socket] | None = None
        self._lifecycle = threading.RLock()
        self._grpc: _GrpcServer | None = None
        self._http: _HttpServer | None = None
        # Guards all below; notified at every request kept.
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._rules: dict[Signal, _Rule] = {}

    # -- coming and going

    def __enter__(self) -> Receiver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Open both ports: at the first call free or given ones, after `stop` the same ones again.

        TLS files are read anew. Raises RuntimeError when already started, OSError when a port or file cannot be had.
        """
        with self._lifecycle:
            if self._http is not None:
                raise RuntimeError("the receiver is already started")
            first = self._reserved is None
            try:
                if self._reserved is None:
                    self._reserved = _reserve(self._wanted_ports)
                context = None if self._tls is None else _http_tls(self._tls)
                credentials = None if self._tls is None else _grpc_tls(self._tls)
                grpc_port, http_port = self._ports()
                self._grpc = _start_grpc(self, grpc_port, credentials)
                self._http = _HttpServer(self, http_port, context)
            except BaseException:
                if first:
                    self.close()
                else:
                    self.stop()
                raise

    def stop(self) -> None:
        """Close both ports and all connections, within a second; nothing when not started.

        New connections are refused from then on, and no other process gets the ports before `close`. What was
        received stays, and so do the faults told.
        """
        with self._lifecycle:
            grpc_server, self._grpc = self._grpc, None
            http_server, self._http = self._http, None
            done = None if grpc_server is None else grpc_server.stop()
            if http_server is not None:
                http_server.stop()
            if done is not None:
                done.wait(_STOP_TIMEOUT_S)

    def restart(self) -> None:
        """`stop` and `start` on the same ports."""
        with self._lifecycle:
            self.stop()
            self.start()

    def close(self) -> None:
        """`stop`, and give the ports back. A later `start` takes other ones."""
        with self._lifecycle:
            self.stop()
            reserved, self._reserved = self._reserved, None
            for reservation in reserved or ():
                reservation.close()

    def _ports(self) -> tuple[int, int]:
        reserved = self._reserved
        if reserved is None:
            raise RuntimeError("the receiver has no ports: it was never started, or is closed")
        return reserved[0].getsockname()[1], reserved[1].getsockname()[1]

    @property
    def _scheme(self) -> str:
        return "http" if self._tls is None else "https"

    @property
    def grpc_endpoint(self) -> str:
        """The URL of the gRPC side, also while stopped. RuntimeError before the first `start` and after `close`."""
        return f"{self._scheme}://{_LOOPBACK}:{self._ports()[0]}"

    @property
    def http_endpoint(self) -> str:
        """The URL of the HTTP side without a path. RuntimeError as for `grpc_endpoint`."""
        return f"{self._scheme}://{_LOOPBACK}:{self._ports()[1]}"

    # -- what was received

    @property
    def requests(self) -> list[Request]:
        """All requests so far, accepted and refused, in the order in which they were received; a copy."""
        with self._changed:
            return list(self._requests)

    def clear(self) -> None:
        """Forget all requests."""
        with self._changed:
            self._requests.clear()

    def all_points(self) -> list[Point]:
        """The data points of accepted requests, in order."""
        return [
            point
            for request in self.requests
            if request.accepted and isinstance(request.message, ExportMetricsServiceRequest)
            for point in _without_last(points_of(request.message), request.rejected)
        ]

    def points(self, metric_name: str) -> list[Point]:
        """The data points of one metric in accepted requests, in order."""
        return [point for point in self.all_points() if point.name == metric_name]

    def spans(self) -> list[SpanRecord]:
        """The spans of accepted requests, in order."""
        return [
            span
            for request in self.requests
            if request.accepted and isinstance(request.message, ExportTraceServiceRequest)
            for span in _without_last(spans_of(request.message), request.rejected)
        ]

    def wait_for(self, predicate: Callable[[Receiver], bool], timeout_s: float) -> None:
        """Return as soon as predicate(self) is true; it is asked at once and after every request kept.

        Raises TimeoutError, with a summary of what was received, when it is not true after `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout_s):
                raise TimeoutError(f"not true after {timeout_s:g} s; received: {self._summary()}")

    def _summary(self) -> str:
        requests = self.requests
        if not requests:
            return "no request"
        kinds = Counter(f"{request.signal} {request.protocol} {request.answer}" for request in requests)
        names = Counter(point.name for point in self.all_points())
        spans = Counter(span.name for span in self.spans())
        parts = ["requests: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())]
        if names:
            parts.append("points: " + ", ".join(f"{name} ({count})" for name, count in sorted(names.items())))
        if spans:
            parts.append("spans: " + ", ".join(f"{name} ({count})" for name, count in sorted(spans.items())))
        return "; ".join(parts)

    # -- faults

    def answer_with(self, fault: Fault | None, *, signal: Signal | None = None, count: int | None = None) -> None:
        """Answer the next requests with a fault; None ends an earlier one.

        signal: which requests, both kinds by default (then they share `count`). count: for how many requests; without
        end by default. A call replaces what was told before for the same signals. Undecodable, too large and
        unsupported requests are refused as such and do not count.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        rule = None if fault is None else _Rule(fault, count)
        with self._changed:
            for each in _SIGNALS if signal is None else (signal,):
                if rule is None:
                    self._rules.pop(each, None)
                else:
                    self._rules[each] = rule

    def _next_answer(self, signal: Signal) -> _Answer:
        """The answer to a good request, with `_changed` held."""
        rule = self._rules.get(signal)
        if rule is None:
            return _OK
        if rule.remaining is not None:
            rule.remaining -= 1
            if rule.remaining == 0:
                self._rules = {each: other for each, other in self._rules.items() if other is not rule}
        return _plan(rule.fault)

    def _take(
        self, signal: Signal, protocol: Protocol, headers: dict[str, str], body: bytes, encoding: str, content_type: str
    ) -> _Answer:
        """Decode a request, keep it, and say how to answer it."""
        received_unix_ns = time.time_ns()
        message = _new_message(signal)
        size = len(body)
        refusal: _Answer | None = None
        try:
            if content_type != "application/x-protobuf":
                raise _unsupported(f"content type {content_type!r} is not taken, only application/x-protobuf")
            data = _decompressed(body, encoding, self._max_request_bytes)
            size = len(data)
            try:
                message.ParseFromString(data)
            except DecodeError as error:
                message = _new_message(signal)
                raise _undecodable(f"body is no {message.DESCRIPTOR.name}: {error}") from error
        except _Refusal as error:
            refusal = error.answer
        with self._changed:
            answer = self._next_answer(signal) if refusal is None else refusal
            request = Request(
                signal=signal,
                protocol=protocol,
                headers=MappingProxyType(headers),
                received_unix_ns=received_unix_ns,
                bytes=size,
                wire_bytes=len(body),
                message=message,
                answer=answer.name,
                rejected=answer.rejected,
            )
            self._requests.append(request)
            self._changed.notify_all()
        if self._on_request is not None:
            try:
                self._on_request(request)
            except Exception:
                _logger.exception("on_request failed")
        return answer


def _without_last(items: list[Any], count: int) -> list[Any]:
    return items[: max(len(items) - count, 0)]


def _reserve(ports: tuple[int, int]) -> tuple[socket.socket, socket.socket]:
    """Two loopback sockets, bound and never listening.

    They hold the ports while the servers are away: others cannot be given them, connections to them are refused, and a
    server that sets SO_REUSEADDR, as both here do, can still bind and listen.
    """
    sockets: list[socket.socket] = []
    try:
        for port in ports:
            reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sockets.append(reservation)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind((_LOOPBACK, port))
    except BaseException:
        for reservation in sockets:
            reservation.close()
        raise
    return sockets[0], sockets[1]


def _start_grpc(receiver: Receiver, port: int, credentials: grpc.ServerCredentials | None) -> _GrpcServer:
    """A gRPC server on the port; tries again while the listener of a server just stopped is still being closed."""
    deadline = time.monotonic() + 1.0
    while True:
        try:
            return _GrpcServer(receiver, port, credentials)
        except RuntimeError as error:
            if time.monotonic() >= deadline:
                raise OSError(f"cannot listen on {_LOOPBACK}:{port}") from error
            time.sleep(0.01)


def _http_tls(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _grpc_tls(tls: ServerTls) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=None if tls.client_ca is None else tls.client_ca.read_bytes(),
        require_client_auth=tls.client_ca is not None,
    )
