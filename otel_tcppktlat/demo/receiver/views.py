"""Typed views of protobuf messages: the data points of a metrics message, the spans of a trace message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from opentelemetry.proto.metrics.v1.metrics_pb2 import Exemplar as ExemplarMessage

from .records import ExemplarRecord, Kind, Point, SpanRecord, Temporality

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
