"""The SDK's providers around the collector, from start to the last flush."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
    OTEL_EXPERIMENTAL_RESOURCE_DETECTORS,
)
from opentelemetry.sdk.metrics import Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import (
    HOST_ID,
    HOST_NAME,
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from .. import __version__
from ..probe.layout import Event
from ..probe.probe import Probe
from ..series import SeriesTotals
from ..settings import EXEMPLAR_FILTER, Settings, export_interval_s
from .collector import SCHEMA_URL, SCOPE, SELF_SCOPE, Collector, Temporality
from .exporters import make_watch, metric_exporter_maker, span_exporter_maker
from .injection import InjectingExporter, NoExporter
from .sending import Sender
from .spans import Handover, SpanBudget

DEFAULT_SERVICE_NAME = "otel-tcppktlat"
_INSTANCE_NAMESPACE = uuid.UUID("4d63009a-8d0f-11ee-aad7-4c796ed8e320")  # the conventions' own, for inherent ids
_DEFAULT_DETECTORS = "host,os,otel"  # the last one wins: OTEL_RESOURCE_ATTRIBUTES
_DEFAULT_QUEUE, _DEFAULT_BATCH = 2048, 512  # OTEL_BSP_MAX_QUEUE_SIZE's and OTEL_BSP_MAX_EXPORT_BATCH_SIZE's default
_DEFAULT_DELAY_MS = 5000  # OTEL_BSP_SCHEDULE_DELAY's
_LAST_ANSWERS_S = 2.0  # of the time to shut down, left for a new connection where no answer has come until then
_LAST_SPANS_S = 1.0  # of the time to shut down, left for spans whatever becomes of the metrics


def make_resource() -> Resource:
    """Who is measuring: service.name unless the user says otherwise, the host, and the SDK's detectors."""
    os.environ.setdefault(OTEL_EXPERIMENTAL_RESOURCE_DETECTORS, _DEFAULT_DETECTORS)
    resource = Resource.create()
    named = str(resource.attributes.get(SERVICE_NAME, ""))
    if not named or named.startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: DEFAULT_SERVICE_NAME}))
    if SERVICE_INSTANCE_ID not in OTELResourceDetector().detect().attributes:
        resource = resource.merge(Resource({SERVICE_INSTANCE_ID: _stable_instance_id(resource)}))
    return resource


def _stable_instance_id(resource: Resource) -> str:
    """The same after a restart, so that back ends see a counter reset and not new series, as the SDK's random id makes.

    Source: service.instance.id in OpenTelemetry's semantic conventions. Host id and name, as either may be a clone's.
    """
    names = resource.attributes.get(HOST_ID, ""), resource.attributes.get(HOST_NAME) or socket.gethostname()
    host = "/".join(str(name) for name in names)
    return str(uuid.uuid5(_INSTANCE_NAMESPACE, host))


def _span_queue_sizes(rate: float, interval_s: float) -> tuple[int, int]:
    """(queue, batch) of the span processor. Room for two intervals' budgets, unless the user has sized it himself."""
    batch = os.environ.get(OTEL_BSP_MAX_EXPORT_BATCH_SIZE)
    queue = int(
        os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE) or max(_DEFAULT_QUEUE, int(2 * rate * interval_s), int(batch or 0))
    )
    return queue, int(batch or min(_DEFAULT_BATCH, queue))


class Pipeline:
    """Exporters made, then providers running, then shut down; each step once."""

    def __init__(self, settings: Settings) -> None:
        """Makes the exporters: whatever they read from files is read now. Raises SettingsError."""
        self._settings = settings
        self._interval_s = export_interval_s()
        make_metrics: Callable[[], MetricExporter] = metric_exporter_maker() or NoExporter
        self._metrics = Sender(make_metrics, make_watch("metrics"), MetricExportResult.SUCCESS)
        make_spans = span_exporter_maker()
        self._traces = Sender(make_spans, make_watch("traces"), SpanExportResult.SUCCESS) if make_spans else None
        self._queue_size, self._batch_size = _span_queue_sizes(settings.span_rate, self._interval_s)
        self._resource = make_resource()

    def start(self, probe: Probe) -> None:
        """Starts exporting what the probe measures."""
        self._probe = probe
        pause_s = float(os.environ.get(OTEL_BSP_SCHEDULE_DELAY) or _DEFAULT_DELAY_MS) / 1e3
        self._handover = handover = Handover(self._traces, pause_s) if self._traces else None
        self._tracer_provider: TracerProvider | None = None
        tracer = None
        if handover:
            self._tracer_provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
            self._tracer_provider.add_span_processor(
                BatchSpanProcessor(handover, max_queue_size=self._queue_size, max_export_batch_size=self._batch_size)
            )
            tracer = self._tracer_provider.get_tracer(SCOPE, __version__, schema_url=SCHEMA_URL)
        settings = self._settings
        self.spans = SpanBudget(tracer, handover, settings.span_rate, self._queue_size, self._interval_s)
        preferred = self._metrics.exporter._preferred_temporality or {}
        cumulative = AggregationTemporality.CUMULATIVE
        self.collector = Collector(
            probe,
            settings.buckets,
            SeriesTotals(settings.attributes, len(settings.buckets.bounds_ns) + 1, settings.series_limit),
            self.spans,
            Temporality(preferred.get(Histogram, cumulative), preferred.get(ObservableCounter, cumulative)),
            reader_filtered=settings.pid is not None or settings.tid is not None,
            exemplar_filter=os.environ.get(EXEMPLAR_FILTER, "").strip().lower() or None,
        )
        self._injecting = InjectingExporter(self._metrics, self.collector)
        reader = PeriodicExportingMetricReader(self._injecting, export_interval_millis=self._interval_s * 1e3)
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

    def after_rows(self) -> None:
        """Has the kernel withhold rows that the budget has no room for any more."""
        side = self._probe.side
        self._probe.want_rows(side, self.spans.rows_from_ns(side))

    def shutdown(self, timeout_s: float) -> None:
        """Collects and exports a last time, spans too, and returns after `timeout_s` at the latest."""
        deadline_s = time.monotonic() + timeout_s
        senders = [sender for sender in (self._metrics, self._traces) if sender]
        for sender in senders:
            sender.watch.ending()
            sender.ending()
        self._injecting.ending()
        if self._handover:
            self._handover.ending()
        spans_made, metrics_done = threading.Event(), threading.Event()
        self.collector.on_collected(spans_made.set)

        def flush_metrics() -> None:
            self._meter_provider.shutdown(timeout_s * 1e3)
            metrics_done.set()
            spans_made.set()

        def flush_spans(provider: TracerProvider) -> None:
            # The last collection makes the last spans. Until then each one's are flushed: metrics may hang.
            while not metrics_done.is_set() and (left_s := deadline_s - _LAST_SPANS_S - time.monotonic()) > 0:
                if spans_made.wait(left_s):
                    spans_made.clear()
                    provider.force_flush()
            self.spans.close()
            provider.shutdown()

        def let_go() -> None:
            time.sleep(max(0.0, deadline_s - _LAST_ANSWERS_S - time.monotonic()))
            for sender in senders:
                sender.let_go()

        threading.Thread(target=let_go, daemon=True).start()
        threads = [threading.Thread(target=flush_metrics, daemon=True)]
        if self._tracer_provider:
            threads.append(threading.Thread(target=flush_spans, args=(self._tracer_provider,), daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        for sender in senders:
            sender.watch.conclude()
