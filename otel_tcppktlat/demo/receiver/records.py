"""What was received, as values: the requests, and the data points, exemplars and spans that they carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Signal = Literal["metrics", "traces"]
Protocol = Literal["grpc", "http/protobuf"]
Kind = Literal["sum", "gauge", "histogram", "exponential_histogram", "summary"]
Temporality = Literal["cumulative", "delta"]
Message = ExportMetricsServiceRequest | ExportTraceServiceRequest


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
