"""The largest requests that the agent's data can become, by its own encoders; ids and numbers as random as they are."""

from __future__ import annotations

import random
import socket

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import AggregationTemporality, Metric, MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_tcppktlat.buckets import Buckets
from otel_tcppktlat.events import exemplar_attributes, span_attributes
from otel_tcppktlat.probe.layout import Event, Identity, ProcessKey, SeriesKey
from otel_tcppktlat.probe.probe import Series
from otel_tcppktlat.series import ATTRIBUTES, AttributeSet, Totals
from otel_tcppktlat.telemetry.points import Acknowledged, histogram_data, histogram_point
from otel_tcppktlat.telemetry.spans import SPAN_NAME

_random = random.Random(1)
_AT_UNIX_NS, _INTERVAL_NS = 1_800_000_000 * 10**9, 60 * 10**9
_RESOURCE = Resource({"service.name": "otel-tcppktlat", "service.instance.id": "1" * 36, "host.name": "h" * 64})


def _name(length: int) -> bytes:
    return bytes(_random.choices(b"abcdefghijklmnopqrstuvwxyz-0123456789", k=length))


def _event() -> Event:
    event = Event(tgid=_random.randrange(10**6, 1 << 22), tid=_random.randrange(10**6, 1 << 22), comm=_name(15))
    event.family, event.local_port, event.remote_port = socket.AF_INET6, 65535, _random.randrange(1 << 15, 1 << 16)
    event.local_address[:], event.remote_address[:] = _random.randbytes(16), _random.randbytes(16)
    event.segments, event.bytes = _random.randrange(1 << 31), _random.randrange(1 << 31)
    return event


def _attributes() -> AttributeSet:
    key = SeriesKey(process=ProcessKey(1, _random.randrange(1 << 22), 0), port=65535, family=socket.AF_INET6)
    key.address[:] = _random.randbytes(16)
    series = Series(key, Identity(1, _name(15), _name(63)))
    return tuple((name, value(series)) for name, value in ATTRIBUTES.items())


def metrics(points: int, buckets: Buckets) -> bytes:
    """A request with so many points of the histogram, each with every attribute, and an exemplar in every bucket."""

    def exemplar(metric_attributes: AttributeSet) -> Exemplar:
        at_unix_ns = _AT_UNIX_NS + _random.randrange(_INTERVAL_NS)
        attributes = exemplar_attributes(_event(), metric_attributes)
        return Exemplar(attributes, _random.random(), at_unix_ns, _random.getrandbits(64), _random.getrandbits(128))

    many = range(len(buckets.bounds_ns) + 1)
    none, made = Acknowledged((0,) * len(many), 0, _AT_UNIX_NS), []
    for _ in range(points):
        total = Totals([_random.randrange(1 << 32) for _ in many], _random.getrandbits(60))
        attributes = _attributes()
        # Those of the default set: the others would be left out of the exemplars.
        exemplars = [exemplar(attributes[:4]) for _ in many]
        made.append(histogram_point(buckets, attributes, total, none, _AT_UNIX_NS + _INTERVAL_NS, exemplars))
    data = histogram_data(made, AggregationTemporality.DELTA)
    metric = Metric("tcppktlat.receive_queue.duration", "a description", "s", data)
    scope = ScopeMetrics(InstrumentationScope("otel_tcppktlat"), [metric], "")
    encoded: bytes = encode_metrics(MetricsData([ResourceMetrics(_RESOURCE, [scope], "")])).SerializeToString()
    return encoded


def spans(number: int) -> bytes:
    """A request with so many spans, which have every attribute."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=_RESOURCE, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("otel_tcppktlat")
    for _ in range(number):
        tracer.start_span(SPAN_NAME, attributes=span_attributes(_event(), _attributes())).end()
    encoded: bytes = encode_spans(kept.get_finished_spans()).SerializeToString()
    return encoded
