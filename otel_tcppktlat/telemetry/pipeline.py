"""The SDK's providers around the collector, from start to the last flush."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE, OTEL_EXPERIMENTAL_RESOURCE_DETECTORS
from opentelemetry.sdk.metrics import Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from .. import __version__
from ..probe.layout import Event
from ..probe.probe import Probe
from ..series import SeriesTotals
from ..settings import Settings, SettingsError, export_interval_s
from .collector import SCHEMA_URL, SCOPE, Collector, Temporality
from .exporters import make_metric_exporter, make_span_exporter
from .injection import InjectingExporter, NoExporter
from .spans import Handover, SpanBudget

SELF_SCOPE = f"{SCOPE}.self"  # an SDK's meter must not share the injected metrics' scope: the encoder would drop one
DEFAULT_SERVICE_NAME = "otel-tcppktlat"
_DEFAULT_DETECTORS = "otel,host,os"
_DEFAULT_QUEUE = 2048  # OTEL_BSP_MAX_QUEUE_SIZE's default


def make_resource() -> Resource:
    """Who is measuring: service.name unless the user says otherwise, the host, and the SDK's detectors."""
    os.environ.setdefault(OTEL_EXPERIMENTAL_RESOURCE_DETECTORS, _DEFAULT_DETECTORS)
    resource = Resource.create()
    named = str(resource.attributes.get(SERVICE_NAME, ""))
    if not named or named.startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: DEFAULT_SERVICE_NAME}))
    return resource


def _span_queue_size(rate: float, interval_s: float) -> int:
    """Room for two intervals' budgets, unless the user has sized the queue himself."""
    text = os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE, "").strip()
    if not text:
        return max(_DEFAULT_QUEUE, int(2 * rate * interval_s))
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{OTEL_BSP_MAX_QUEUE_SIZE}={text} is not a whole number") from None


class Pipeline:
    """Exporters made, then providers running, then shut down; each step once."""

    def __init__(self, settings: Settings) -> None:
        """Makes the exporters: whatever they read from files is read now. Raises SettingsError."""
        self._settings = settings
        self._interval_s = export_interval_s()
        self._metric_exporter: MetricExporter = make_metric_exporter() or NoExporter()
        self._span_exporter: SpanExporter | None = make_span_exporter()
        self._queue_size = _span_queue_size(settings.span_rate, self._interval_s)
        self._resource = make_resource()

    def start(self, probe: Probe) -> None:
        """Starts exporting what the probe measures."""
        handover = Handover(self._span_exporter) if self._span_exporter else None
        self._tracer_provider: TracerProvider | None = None
        tracer = None
        if handover:
            self._tracer_provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
            self._tracer_provider.add_span_processor(BatchSpanProcessor(handover, max_queue_size=self._queue_size))
            tracer = self._tracer_provider.get_tracer(SCOPE, __version__, schema_url=SCHEMA_URL)
        settings = self._settings
        self.spans = SpanBudget(tracer, handover, settings.span_rate, self._queue_size, self._interval_s)
        preferred = self._metric_exporter._preferred_temporality or {}
        cumulative = AggregationTemporality.CUMULATIVE
        self.collector = Collector(
            probe,
            settings.buckets,
            SeriesTotals(settings.attributes, len(settings.buckets.bounds_ns) + 1, settings.series_limit),
            self.spans,
            Temporality(preferred.get(Histogram, cumulative), preferred.get(ObservableCounter, cumulative)),
            reader_filtered=settings.pid is not None or settings.tid is not None,
        )
        reader = PeriodicExportingMetricReader(
            InjectingExporter(self._metric_exporter, self.collector.collect),
            export_interval_millis=self._interval_s * 1e3,
        )
        self._meter_provider = MeterProvider([reader], resource=self._resource, shutdown_on_exit=False)
        self._observe_itself(probe)

    def _observe_itself(self, probe: Probe) -> None:
        """Self-telemetry; with none at all, the SDK would never call the exporter."""
        meter = self._meter_provider.get_meter(SELF_SCOPE, __version__, schema_url=SCHEMA_URL)

        def series(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(probe.series_in_use())

        def sockets(_options: CallbackOptions) -> Iterable[Observation]:
            books = probe.books()
            yield Observation(books["sockets_opened"] - books["sockets_closed"])

        def duration(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(self.collector.last_duration_s)

        meter.create_observable_gauge("tcppktlat.series.in_use", [series], "{series}", "Series that the kernel holds.")
        meter.create_observable_gauge(
            "tcppktlat.sockets.tracked", [sockets], "{socket}", "Sockets with a queue of entries."
        )
        meter.create_observable_gauge(
            "tcppktlat.collect.duration", [duration], "s", "Time that the last collection took."
        )

    def on_row(self, event: Event) -> None:
        """A pickup that waited MIN_US or longer: a span, if the budget has one for it."""
        self.spans.offer_row(event)

    def shutdown(self, timeout_s: float) -> None:
        """Collects and exports a last time, spans too, and returns after `timeout_s` at the latest."""
        deadline_s = time.monotonic() + timeout_s
        collected = threading.Event()
        self.collector.on_collected(collected.set)

        def flush_spans() -> None:
            collected.wait(timeout_s / 2)  # the last collection makes the last spans
            if self._tracer_provider:
                self._tracer_provider.shutdown()

        threads = [
            threading.Thread(target=self._meter_provider.shutdown, args=(timeout_s * 1e3,), daemon=True),
            threading.Thread(target=flush_spans, daemon=True),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
