"""Applications of three kinds, whose worker GET /on instruments, and GET /off puts back: the benchmark's.

They count their answers in a file, ANSWERED.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import flask
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

from otel_tcppktlat.instrumentation import TcpReceiveQueueInstrumentor

Application = Callable[..., Iterable[bytes]]

with open(os.environ["ANSWERED"], "r+b") as file:
    _answered = memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE)).cast("Q")


def switched(inner: Application) -> Application:
    """The same application, with the two more paths."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        _answered[0] += 1
        plugin = TcpReceiveQueueInstrumentor()
        if environ["PATH_INFO"] == "/on":
            plugin.instrument()
            while not plugin._service or not plugin._service._connection:
                time.sleep(0.01)
        elif environ["PATH_INFO"] == "/off":
            plugin.uninstrument()
        return inner({**environ, "PATH_INFO": "/"}, start_response)

    return app


def _hello(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "3")])
    return [b"ok\n"]


_flask = flask.Flask(__name__)


@_flask.get("/")
def _index() -> str:
    return "ok\n"


plain = switched(_hello)
traced = switched(OpenTelemetryMiddleware(_hello))
with_flask = switched(_flask)
