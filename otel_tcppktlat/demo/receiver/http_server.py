"""The HTTP/protobuf side: requests from connections to the receiver, its answers back, faults included."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .bodies import RawRequest, Take, joined, status_of, success_body
from .ports import LOOPBACK
from .records import Signal

_logger = logging.getLogger(__name__)

_HTTP_PATHS: Mapping[str, Signal] = {"/v1/metrics": "metrics", "/v1/traces": "traces"}
_HTTP_POLL_S = 0.05


class HttpServer(ThreadingHTTPServer):
    """The HTTP side of one `Receiver.start`, with connections that `stop` can end."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, take: Take, max_wire_bytes: int, port: int, tls: ssl.SSLContext | None) -> None:
        self.take = take
        self.max_wire_bytes = max_wire_bytes
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        super().__init__((LOOPBACK, port), _HttpHandler)
        if tls is not None:
            # The handshake is left to the first read, in the connection's own thread.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_HTTP_POLL_S,), name="otlp-http-receiver", daemon=True
        )
        self._thread.start()

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's full name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = LOOPBACK, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        try:
            super().shutdown_request(request)
        finally:
            with self._changed:
                self._connections.discard(request)
                self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A broken connection or handshake is the client's matter, and no reason to write to standard error.
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        _logger.log(level, "HTTP connection from %s ended: %r", client_address, error, exc_info=level > logging.DEBUG)

    def stop(self, timeout_s: float) -> None:
        """End the listener and all connections; waits for their threads up to `timeout_s`."""
        self.stopping.set()
        self.shutdown()
        self._thread.join(timeout_s)
        self.server_close()
        with self._changed:
            for connection in self._connections:
                try:
                    # Not SSLSocket.shutdown, which takes the TLS state from under the thread that reads.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
                except OSError:
                    pass
            self._changed.wait_for(lambda: not self._connections, timeout_s)


class _HttpHandler(BaseHTTPRequestHandler):
    server: HttpServer
    protocol_version = "HTTP/1.1"
    server_version = "otlp-receiver"
    sys_version = ""
    timeout = 60
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug("HTTP %s " + format, self.client_address, *args)

    def do_GET(self) -> None:
        self._reply(405, b"only POST is taken\n", "text/plain", Allow="POST")

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        signal = _HTTP_PATHS.get(self.path)
        if signal is None:
            self._reply(404, b"only /v1/metrics and /v1/traces are here\n", "text/plain")
            return
        headers = joined(self.headers.items())
        encoding = headers.get("content-encoding", "identity").strip().lower()
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        answer = self.server.take(RawRequest(signal, "http/protobuf", headers, body, encoding, content_type))
        if answer.wait_s and self.server.stopping.wait(answer.wait_s):
            self.close_connection = True
            return
        extra: dict[str, str] = {}
        if answer.retry_after_s is not None:
            extra["Retry-After"] = f"{answer.retry_after_s:.9g}"
        reply = success_body(signal, answer) if answer.accepts else status_of(answer).SerializeToString()
        self._reply(answer.http_status, reply, "application/x-protobuf", **extra)

    def _body(self) -> bytes | None:
        """The body as sent; None when the request was answered here because its length is not known or absurd."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self.close_connection = True
            self._reply(411, b"a Content-Length is needed\n", "text/plain", Connection="close")
            return None
        if int(length) > self.server.max_wire_bytes:
            self.close_connection = True
            self._reply(413, b"request too large\n", "text/plain", Connection="close")
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _reply(self, status: int, body: bytes, content_type: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
