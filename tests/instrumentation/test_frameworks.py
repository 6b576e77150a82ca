"""What the README's table of frameworks says: where a wait is a child, and where it is a root."""

from __future__ import annotations

import pathlib
import socket

import pytest
import requests

from backends.servers import free_port
from instrumentation.programs import HERE, Application, Gunicorn, environment
from otel_tcppktlat.demo.receiver import Receiver, SpanRecord
from telemetry.told import eventually

LATE_NS = 15_000_000


def late(receiver: Receiver) -> list[SpanRecord]:
    """Waits that the application forced."""
    spans = [span for span in receiver.spans() if span.name == "tcp receive"]
    return [span for span in spans if span.end_unix_ns - span.start_unix_ns >= LATE_NS]


def ask(port: int, path: str) -> str:
    answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=30)
    assert answer.ok, answer.text
    return answer.headers["trace-id"]


def by_id(receiver: Receiver) -> dict[str, SpanRecord]:
    return {span.span_id: span for span in receiver.spans()}


@pytest.fixture
def uvicorn(serving: pathlib.Path, receiver: Receiver, services: dict[str, str], tmp_path: pathlib.Path) -> object:
    port = free_port()
    command = ["uvicorn", "--port", str(port), "--app-dir", str(HERE / "applications"), "asynchronous:app"]
    variables = environment(serving, receiver.http_endpoint, OTEL_PYTHON_TCPPKTLAT_THRESHOLD="10", **services)
    with Application(tmp_path, command, variables) as application:
        application.wait_for("Uvicorn running")
        eventually(lambda: ask(port, "/") and receiver.points("tcppktlat.receive_queue.duration"))
        yield port


def test_what_an_event_loop_reads_is_a_root(uvicorn: int, receiver: Receiver) -> None:
    """Although a span was current in the task that waited for it: the loop reads, for whomever."""
    trace_id = ask(uvicorn, "/late")
    eventually(lambda: late(receiver), what="nothing was late")
    assert [span.parent_span_id for span in late(receiver)] == [""] * len(late(receiver))
    eventually(lambda: [span for span in receiver.spans() if span.trace_id == trace_id and span.name == "read"])


def test_what_a_thread_of_its_pool_reads_is_a_child(uvicorn: int, receiver: Receiver) -> None:
    trace_id = ask(uvicorn, "/thread")

    def parents() -> list[str]:
        spans = by_id(receiver)
        mine = [span for span in late(receiver) if span.trace_id == trace_id]
        return [spans[span.parent_span_id].name for span in mine if span.parent_span_id in spans]

    eventually(lambda: "GET" in parents(), what="no child of the query's")


def test_what_greenlets_read_is_a_root(
    serving: pathlib.Path, receiver: Receiver, services: dict[str, str], tmp_path: pathlib.Path
) -> None:
    variables = environment(
        serving,
        receiver.http_endpoint,
        OTEL_PYTHON_TCPPKTLAT_THRESHOLD="10",
        OTEL_PYTHON_AUTO_INSTRUMENTATION_EXPERIMENTAL_GEVENT_PATCH="patch_all",
        **services,
    )
    with Gunicorn(tmp_path, "late:app", "gevent", variables) as gunicorn:
        gunicorn.wait_until_ready()
        gunicorn.wait_until_measured(receiver)
        with socket.create_connection(("127.0.0.1", gunicorn.port)) as sock:
            sock.sendall(b"GET /hog HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while sock.recv(65536):
                pass
        eventually(lambda: late(receiver), what="nothing was late")
        assert [span.parent_span_id for span in late(receiver)] == [""] * len(late(receiver))
