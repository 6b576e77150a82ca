"""Cumulative totals as OpenTelemetry data points, and what the exporter has acknowledged of them.

Delta points are the difference to the last acknowledged total, so that a failed export is made good by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Histogram,
    HistogramDataPoint,
    NumberDataPoint,
)
from opentelemetry.sdk.metrics.export import Buckets as ExponentialCounts
from opentelemetry.util.types import Attributes

from ..buckets import FIRST_EXPONENT, SCALE, Buckets
from ..series import AttributeSet, Totals

Point = HistogramDataPoint | ExponentialHistogramDataPoint
DELTA, CUMULATIVE = AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE


@dataclass(frozen=True)
class Acknowledged:
    """The totals that a receiver has, and when they were taken."""

    counts: Sequence[int]
    sum_ns: int
    unix_ns: int


def histogram_point(
    buckets: Buckets,
    attributes: AttributeSet,
    total: Totals,
    since: Acknowledged,
    unix_ns: int,
    exemplars: Sequence[Exemplar],
) -> Point:
    """The growth since `since` as a point; min and max are left out, as the kernel keeps none."""
    counts = [now - then for now, then in zip(total.counts, since.counts, strict=True)]
    common: dict[str, Any] = {
        "attributes": dict(attributes),
        "start_time_unix_nano": since.unix_ns,
        "time_unix_nano": unix_ns,
        "count": sum(counts),
        "sum": (total.sum_ns - since.sum_ns) / 1e9,
        "min": None,
        "max": None,
        "exemplars": list(exemplars),
    }
    if buckets.bounds_s is not None:
        return HistogramDataPoint(bucket_counts=counts, explicit_bounds=list(buckets.bounds_s), **common)
    used = [index for index, count in enumerate(counts) if count]
    first, last = (used[0], used[-1]) if used else (0, -1)
    return ExponentialHistogramDataPoint(
        scale=SCALE,
        zero_count=0,
        # Bucket b of the kernel ends at exponent FIRST_EXPONENT + b, which is OpenTelemetry's index of it plus one.
        positive=ExponentialCounts(offset=FIRST_EXPONENT - 1 + first, bucket_counts=counts[first : last + 1]),
        negative=ExponentialCounts(offset=0, bucket_counts=[]),
        flags=0,
        **common,
    )


def most_encoded_bytes(point: Point) -> int:
    """An upper bound of what the point takes in an OTLP request, in bytes."""
    if isinstance(point, HistogramDataPoint):
        buckets = len(point.bucket_counts)
    else:
        buckets = len(point.positive.bucket_counts)
    return (
        128  # counts, times, and the tags and lengths of messages
        + 16 * buckets  # a count and a bound, or a count as a varint
        + _most_attribute_bytes(point.attributes)
        + sum(64 + _most_attribute_bytes(exemplar.filtered_attributes) for exemplar in point.exemplars)
    )


def _most_attribute_bytes(attributes: Attributes) -> int:
    """For each attribute tags and lengths, or a number; characters take 4 bytes at most."""
    return 32 * len(attributes or ()) + 4 * len(repr(attributes))


def histogram_data(points: Sequence[Point], temporality: AggregationTemporality) -> Histogram | ExponentialHistogram:
    """Points of one kind, at least one, as a metric's data."""
    explicit = [point for point in points if isinstance(point, HistogramDataPoint)]
    if explicit:
        return Histogram(explicit, temporality)
    return ExponentialHistogram(
        [point for point in points if isinstance(point, ExponentialHistogramDataPoint)], temporality
    )


def number_point(attributes: AttributeSet, value: float, since_unix_ns: int, unix_ns: int) -> NumberDataPoint:
    """A number as a point."""
    return NumberDataPoint(dict(attributes), since_unix_ns, unix_ns, value)
