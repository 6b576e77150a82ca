"""Puts the kernel's metrics into the SDK's own export path.

The specification has no asynchronous histogram, and opentelemetry-python no MetricProducer
(open-telemetry/opentelemetry-python#4768). So this exporter stands under the SDK's PeriodicExportingMetricReader, adds
the kernel's metrics to what the SDK collected, and passes both on to the real one.
"""

from __future__ import annotations

import threading
from typing import Any

from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData, ResourceMetrics

from .collector import Collector
from .diagnosis import Ended
from .sending import Fate, Sender, fate


def _points(resource_metrics: ResourceMetrics) -> int:
    return sum(len(metric.data.data_points) for scope in resource_metrics.scope_metrics for metric in scope.metrics)


class InjectingExporter(MetricExporter):
    """Exports what the collector collects together with the SDK's metrics; the first batch goes with those."""

    def __init__(self, sender: Sender[MetricExporter], collector: Collector) -> None:
        inner = sender.exporter
        super().__init__(inner._preferred_temporality, inner._preferred_aggregation)
        self._sender, self._collector = sender, collector
        self._ending = threading.Event()

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Exports batch by batch and acknowledges those that a receiver has, or will never take."""
        ended = self._export(metrics_data, timeout_millis=timeout_millis, **kwargs)
        if ended:
            self._sender.watch.tell(ended)
        return MetricExportResult.SUCCESS if ended and ended.delivered else MetricExportResult.FAILURE

    def _export(self, metrics_data: MetricsData, **kwargs: Any) -> Ended | None:
        """Stops at the first batch that may still be delivered later; None if the receiver is to be left alone."""
        batches = self._collector.collect()
        if self._sender.hold_s() and not self._ending.is_set():
            return None
        own = metrics_data.resource_metrics[0]
        beside = list(own.scope_metrics)
        refusal, rejected, message = None, 0, ""
        while batch := next(batches, None):
            # In the SDK's ResourceMetrics, not beside it: the encoder lets equal resources overwrite each other.
            merged = ResourceMetrics(own.resource, [*beside, batch.scope_metrics], own.schema_url)
            ended = self._sender.send(MetricsData([merged]), **kwargs)
            what = fate(ended)
            if what in (Fate.FAILED, Fate.DENIED):
                return ended
            if what is Fate.TOO_LARGE and self._collector.shrink(batch):
                batches = self._collector.collect()  # all that is not acknowledged, in smaller requests
                continue
            if what is Fate.DELIVERED:
                rejected, message = rejected + ended.rejected, message or ended.message
                batch.acknowledge(ended.rejected, False)
            else:
                refusal = ended
                batch.acknowledge(_points(merged), True)
            beside = []
        return refusal or Ended(True, None, rejected, message)

    def ending(self) -> None:
        """The agent is about to end: a receiver that asked to be left alone is asked once more."""
        self._ending.set()

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Flushes the exporter."""
        return self._sender.exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Shuts the exporter down."""
        self._sender.shutdown(timeout_millis, **kwargs)


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
