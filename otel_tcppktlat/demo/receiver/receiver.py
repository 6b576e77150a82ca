"""Class Receiver: starts and stops both servers, keeps what they take, and tells them how to answer."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from .bodies import RawRequest, decode
from .faults import OK, Answer, Fault, plan
from .grpc_server import GrpcServer, start_grpc_server
from .http_server import HttpServer
from .ports import LOOPBACK, reserve
from .records import Point, Request, Signal, SpanRecord
from .tls import ServerTls, grpc_credentials, http_context
from .views import points_of, spans_of

_logger = logging.getLogger(__name__)

_SIGNALS: tuple[Signal, ...] = ("metrics", "traces")
# Bodies up to this size are read whole, so that a request above `max_request_bytes` is answered (and kept) by this
# package and not cut off by a library.
_MAX_WIRE_BYTES = 64 << 20
_STOP_TIMEOUT_S = 0.8


@dataclass
class _Rule:
    fault: Fault
    remaining: int | None


class Receiver:
    """An OTLP receiver on 127.0.0.1; see the package's text. All methods may be called from any thread."""

    def __init__(
        self,
        *,
        tls: ServerTls | None = None,
        on_request: Callable[[Request], None] | None = None,
        max_request_bytes: int = 4 << 20,
        grpc_port: int = 0,
        http_port: int = 0,
    ) -> None:
        """Nothing is opened before `start` (or `with`).

        on_request: called in the connection's thread for every request, after it is kept and before it is answered;
        what it raises is logged. max_request_bytes: largest body taken, after decompression. Ports: 0 for free ones.
        """
        self._tls = tls
        self._on_request = on_request
        self._max_request_bytes = max_request_bytes
        self._max_wire_bytes = max(_MAX_WIRE_BYTES, max_request_bytes)
        self._wanted_ports = (grpc_port, http_port)
        self._reserved: tuple[socket.socket, socket.socket] | None = None
        self._lifecycle = threading.RLock()
        self._grpc: GrpcServer | None = None
        self._http: HttpServer | None = None
        # Guards all below; notified at every request kept.
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._rules: dict[Signal, _Rule] = {}

    # -- coming and going

    def __enter__(self) -> Receiver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Open both ports: at the first call free or given ones, after `stop` the same ones again.

        TLS files are read anew. Raises RuntimeError when already started, OSError when a port or file cannot be had.
        """
        with self._lifecycle:
            if self._http is not None:
                raise RuntimeError("the receiver is already started")
            first = self._reserved is None
            try:
                if self._reserved is None:
                    self._reserved = reserve(self._wanted_ports)
                context = None if self._tls is None else http_context(self._tls)
                credentials = None if self._tls is None else grpc_credentials(self._tls)
                grpc_port, http_port = self._ports()
                self._grpc = start_grpc_server(self._take, self._max_wire_bytes, grpc_port, credentials)
                self._http = HttpServer(self._take, self._max_wire_bytes, http_port, context)
            except BaseException:
                if first:
                    self.close()
                else:
                    self.stop()
                raise

    def stop(self) -> None:
        """Close both ports and all connections, within a second; nothing when not started.

        New connections are refused from then on, and no other process gets the ports before `close`. What was
        received stays, and so do the faults told.
        """
        with self._lifecycle:
            grpc_server, self._grpc = self._grpc, None
            http_server, self._http = self._http, None
            done = None if grpc_server is None else grpc_server.stop()
            if http_server is not None:
                http_server.stop(_STOP_TIMEOUT_S)
            if done is not None:
                done.wait(_STOP_TIMEOUT_S)

    def restart(self) -> None:
        """`stop` and `start` on the same ports."""
        with self._lifecycle:
            self.stop()
            self.start()

    def close(self) -> None:
        """`stop`, and give the ports back. A later `start` takes other ones."""
        with self._lifecycle:
            self.stop()
            reserved, self._reserved = self._reserved, None
            for reservation in reserved or ():
                reservation.close()

    def _ports(self) -> tuple[int, int]:
        reserved = self._reserved
        if reserved is None:
            raise RuntimeError("the receiver has no ports: it was never started, or is closed")
        return reserved[0].getsockname()[1], reserved[1].getsockname()[1]

    @property
    def _scheme(self) -> str:
        return "http" if self._tls is None else "https"

    @property
    def grpc_endpoint(self) -> str:
        """The URL of the gRPC side, also while stopped. RuntimeError before the first `start` and after `close`."""
        return f"{self._scheme}://{LOOPBACK}:{self._ports()[0]}"

    @property
    def http_endpoint(self) -> str:
        """The URL of the HTTP side without a path. RuntimeError as for `grpc_endpoint`."""
        return f"{self._scheme}://{LOOPBACK}:{self._ports()[1]}"

    # -- what was received

    @property
    def requests(self) -> list[Request]:
        """All requests so far, accepted and refused, in the order in which they were received; a copy."""
        with self._changed:
            return list(self._requests)

    def clear(self) -> None:
        """Forget all requests."""
        with self._changed:
            self._requests.clear()

    def all_points(self) -> list[Point]:
        """The data points of accepted requests, in order."""
        return [
            point
            for request in self.requests
            if request.accepted and isinstance(request.message, ExportMetricsServiceRequest)
            for point in _without_last(points_of(request.message), request.rejected)
        ]

    def points(self, metric_name: str) -> list[Point]:
        """The data points of one metric in accepted requests, in order."""
        return [point for point in self.all_points() if point.name == metric_name]

    def spans(self) -> list[SpanRecord]:
        """The spans of accepted requests, in order."""
        return [
            span
            for request in self.requests
            if request.accepted and isinstance(request.message, ExportTraceServiceRequest)
            for span in _without_last(spans_of(request.message), request.rejected)
        ]

    def wait_for(self, predicate: Callable[[Receiver], bool], timeout_s: float) -> None:
        """Return as soon as predicate(self) is true; it is asked at once and after every request kept.

        Raises TimeoutError, with a summary of what was received, when it is not true after `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: predicate(self), timeout_s):
                raise TimeoutError(f"not true after {timeout_s:g} s; received: {self._summary()}")

    def _summary(self) -> str:
        requests = self.requests
        if not requests:
            return "no request"
        kinds = Counter(f"{request.signal} {request.protocol} {request.answer}" for request in requests)
        names = Counter(point.name for point in self.all_points())
        spans = Counter(span.name for span in self.spans())
        parts = ["requests: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())]
        if names:
            parts.append("points: " + ", ".join(f"{name} ({count})" for name, count in sorted(names.items())))
        if spans:
            parts.append("spans: " + ", ".join(f"{name} ({count})" for name, count in sorted(spans.items())))
        return "; ".join(parts)

    # -- faults

    def answer_with(self, fault: Fault | None, *, signal: Signal | None = None, count: int | None = None) -> None:
        """Answer the next requests with a fault; None ends an earlier one.

        signal: which requests, both kinds by default (then they share `count`). count: for how many requests; without
        end by default. A call replaces what was told before for the same signals. Undecodable, too large and
        unsupported requests are refused as such and do not count.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        rule = None if fault is None else _Rule(fault, count)
        with self._changed:
            for each in _SIGNALS if signal is None else (signal,):
                if rule is None:
                    self._rules.pop(each, None)
                else:
                    self._rules[each] = rule

    def _next_answer(self, signal: Signal) -> Answer:
        """The answer to a good request, with `_changed` held."""
        rule = self._rules.get(signal)
        if rule is None:
            return OK
        if rule.remaining is not None:
            rule.remaining -= 1
            if rule.remaining == 0:
                self._rules = {each: other for each, other in self._rules.items() if other is not rule}
        return plan(rule.fault)

    def _take(self, raw: RawRequest) -> Answer:
        """Decode a request, keep it, and say how to answer it."""
        received_unix_ns = time.time_ns()
        decoded = decode(raw, self._max_request_bytes)
        with self._changed:
            answer = self._next_answer(raw.signal) if decoded.refusal is None else decoded.refusal
            request = Request(
                signal=raw.signal,
                protocol=raw.protocol,
                headers=MappingProxyType(raw.headers),
                received_unix_ns=received_unix_ns,
                bytes=decoded.size,
                wire_bytes=len(raw.body),
                message=decoded.message,
                answer=answer.name,
                rejected=answer.rejected,
            )
            self._requests.append(request)
            self._changed.notify_all()
        if self._on_request is not None:
            try:
                self._on_request(request)
            except Exception:
                _logger.exception("on_request failed")
        return answer


def _without_last(items: list[Any], count: int) -> list[Any]:
    return items[: max(len(items) - count, 0)]
