"""A plain WSGI application. With ONE_FOR_EACH it is instrumented in code, by each worker for itself.

/held keeps its worker until the file that HELD names is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    while environ["PATH_INFO"] == "/held" and not os.path.exists(os.environ["HELD"]):
        time.sleep(0.01)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    return [b"ok\n"]


if "ONE_FOR_EACH" in os.environ:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    from otel_tcppktlat.instrumentation import TcpReceiveQueueInstrumentor

    TcpReceiveQueueInstrumentor().instrument(
        meter_provider=MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
    )
