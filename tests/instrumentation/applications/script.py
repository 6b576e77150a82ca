"""A script that reads late, forks and executes itself, as its arguments say, one step after the other.

read:S   sends itself a segment, and reads it S seconds later
span:S   the same within a span
fork:S   a child does the same, waits until its telemetry has gone, and ends
wait     waits for a line on stdin, then says so
served   waits until an agent serves it; with SERVED set, each child does so first
flush    has its telemetry sent
exec     becomes the same script, with the arguments that follow
"""

from __future__ import annotations

import os
import socket
import sys
import time

from opentelemetry import metrics, trace

from otel_tcppktlat.instrumentation import TcpReceiveQueueInstrumentor


def connect() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", int(os.environ["PORT"]))) as listener:
        sender = socket.create_connection(listener.getsockname())
        return sender, listener.accept()[0]


def read(wait_s: float) -> None:
    sender, reader = PAIR
    sender.sendall(b"x" * 10)
    time.sleep(wait_s)
    assert len(reader.recv(10, socket.MSG_WAITALL)) == 10


def span(wait_s: float) -> None:
    with trace.get_tracer("script").start_as_current_span("work") as current:
        context = current.get_span_context()
        print(f"trace {context.trace_id:032x} span {context.span_id:016x}", flush=True)
        read(wait_s)


def flush() -> None:
    metrics.get_meter_provider().force_flush()  # type: ignore[attr-defined]
    trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]


def fork(wait_s: float) -> None:
    child = os.fork()
    if not child:
        if os.environ.get("SERVED"):
            served()
        span(wait_s)
        time.sleep(0.2)
        flush()
        os._exit(0)
    os.waitpid(child, 0)


def served() -> None:
    """Waits until the plugin has an agent."""
    while not (service := TcpReceiveQueueInstrumentor()._service) or not service._connection:
        time.sleep(0.005)


def wait() -> None:
    print("waits", flush=True)
    sys.stdin.readline()
    print("goes on", flush=True)


if __name__ == "__main__":
    PAIR = connect()
    for number, step in enumerate(sys.argv[1:], 2):
        if step == "exec":
            os.execv(sys.executable, [sys.executable, __file__, *sys.argv[number:]])
        name, _, seconds = step.partition(":")
        globals()[name](*([float(seconds)] if seconds else []))
    print("done", flush=True)
