"""Puts the kernel's metrics into the SDK's own export path.

The specification has no asynchronous histogram, and opentelemetry-python no MetricProducer
(open-telemetry/opentelemetry-python#4768). So this exporter stands under the SDK's PeriodicExportingMetricReader, adds
the kernel's metrics to what the SDK collected, and passes both on to the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData, ResourceMetrics

from .collector import Batch
from .diagnosis import Watch


class InjectingExporter(MetricExporter):
    """Exports what `collect` returns together with the SDK's metrics; the first batch goes with those."""

    def __init__(self, inner: MetricExporter, collect: Callable[[], Sequence[Batch]], watch: Watch) -> None:
        super().__init__(inner._preferred_temporality, inner._preferred_aggregation)
        self._inner, self._collect, self._watch = inner, collect, watch

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Exports batch by batch and acknowledges those that succeed; stops at the first that does not."""
        return self._watch.run(lambda: self._export(metrics_data, timeout_millis, **kwargs), MetricExportResult.SUCCESS)

    def _export(self, metrics_data: MetricsData, timeout_millis: float, **kwargs: Any) -> MetricExportResult:
        own = metrics_data.resource_metrics[0]
        for number, batch in enumerate(self._collect()):
            beside = [] if number else list(own.scope_metrics)
            # In the SDK's ResourceMetrics, not beside it: the encoder lets equal resources overwrite each other.
            merged = ResourceMetrics(own.resource, [*beside, batch.scope_metrics], own.schema_url)
            result = self._inner.export(MetricsData([merged]), timeout_millis=timeout_millis, **kwargs)
            if result is not MetricExportResult.SUCCESS:
                return result
            batch.acknowledge()
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Flushes the exporter."""
        return self._inner.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Shuts the exporter down."""
        self._inner.shutdown(timeout_millis, **kwargs)


class NoExporter(MetricExporter):
    """OTEL_METRICS_EXPORTER=none: spans still need the intervals that a reader makes."""

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Takes it and does nothing."""
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """There is nothing to flush."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """There is nothing to shut down."""
