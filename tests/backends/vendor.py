"""A server that plays a vendor's OTLP intake: TLS, paths of its own, and it refuses what is not as it demands."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from otel_tcppktlat.demo.receiver import Point, ServerTls, SpanRecord, points_of
from otel_tcppktlat.demo.receiver.tls import http_context
from otel_tcppktlat.demo.receiver.views import spans_of


@dataclass(frozen=True)
class Demands:
    """What a vendor's documentation asks for: paths, headers, the temporality of all that only grows, and sizes.

    most_bytes: of a request with metrics, as sent. most_plain_bytes: of one with spans, once decompressed.
    """

    metrics_path: str
    traces_path: str
    headers: Mapping[str, str]
    temporality: str
    most_bytes: int = 1 << 62
    most_plain_bytes: int = 1 << 62


class Vendor:
    """The server, what it took and why it refused; a context manager."""

    def __init__(self, demands: Demands, tls: ServerTls) -> None:
        self.points: list[Point] = []
        self.spans: list[SpanRecord] = []
        self.refused: list[str] = []
        vendor = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, reason = vendor._judge(demands, self.path, self.headers, body)
                if reason:
                    vendor.refused.append(f"{status} {self.path}: {reason}")
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: `refused` says it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = http_context(tls).wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"

    def _judge(self, demands: Demands, path: str, headers: Any, body: bytes) -> tuple[int, str]:
        if path not in (demands.metrics_path, demands.traces_path):
            return 404, "no such path"
        for name, value in demands.headers.items():
            if headers.get(name) != value:
                return 401, f"{name} is {headers.get(name)!r}, not {value!r}"
        if headers.get("Content-Type") != "application/x-protobuf":
            return 415, f"content type {headers.get('Content-Type')}"
        message = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
        if path == demands.traces_path:
            self.spans += spans_of(ExportTraceServiceRequest.FromString(message))
            return 200, ""
        points = list(points_of(ExportMetricsServiceRequest.FromString(message)))
        growing = [one for one in points if one.monotonic or one.kind in ("histogram", "exponential_histogram")]
        wrong = {one.name for one in growing if one.temporality != demands.temporality}
        if wrong:
            return 400, f"{wrong} are not {demands.temporality}"
        self.points += points
        return 200, ""

    def __enter__(self) -> Vendor:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
