"""An application of the user's own, beside the agent: what its SDK sends to a Collector."""

from __future__ import annotations

from opentelemetry._logs import LogRecord
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

NAME, COUNTER, SPAN, LINE = "application", "requests", "handle", "a line of its log"


def send(address: str) -> None:
    """A counter, a span and a line of a log, over gRPC."""
    resource, endpoint = Resource({"service.name": NAME}), f"http://{address}"
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint), 3_600_000)
    meters = MeterProvider([reader], resource, shutdown_on_exit=False)
    meters.get_meter(NAME).create_counter(COUNTER).add(3)
    traces = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    traces.get_tracer(NAME).start_span(SPAN).end()
    logs = LoggerProvider(resource, shutdown_on_exit=False)
    logs.add_log_record_processor(SimpleLogRecordProcessor(OTLPLogExporter(endpoint=endpoint)))
    logs.get_logger(NAME).emit(LogRecord(body=LINE))
    for provider in (meters, traces, logs):
        provider.shutdown()
