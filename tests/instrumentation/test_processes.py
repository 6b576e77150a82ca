"""Workers, children and programs that are executed: each has its own books, and they are right."""

from __future__ import annotations

import contextlib
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from instrumentation.programs import Gunicorn, Script, by_instance, environment
from otel_tcppktlat.demo.receiver import Receiver
from telemetry.told import eventually


@contextlib.contextmanager
def asking(port: int, path: str) -> Iterator[None]:
    """Sends a request; at the end, waits until it is answered."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: plain\r\nConnection: close\r\n\r\n".encode())
        yield
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        assert answer.endswith(b"ok\n"), answer


@pytest.mark.parametrize("instrumented", ["once before the fork", "by each worker"])
@pytest.mark.parametrize("worker", ["sync", "gthread"])
def test_every_worker_counts_what_it_read(
    serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path, worker: str, instrumented: str
) -> None:
    """Each request is one segment. One worker is held by a request, so that the other one has to take the rest."""
    once, held = instrumented == "once before the fork", tmp_path / "held"
    one_for_each = {} if once else {"ONE_FOR_EACH": "yes"}
    variables = environment(serving, receiver.http_endpoint, HELD=str(held), **one_for_each)
    options = ("--threads", "2", "--worker-connections", "1") if worker == "gthread" else ()
    with Gunicorn(tmp_path, "plain:app", worker, variables, *options, workers=2, instrument=once) as gunicorn:
        gunicorn.wait_until_ready()
        with asking(gunicorn.port, "/held"):
            for _ in range(20):
                with asking(gunicorn.port, "/"):
                    pass
            held.touch()
        assert gunicorn.stop() == 0, gunicorn.said
        eventually(lambda: by_instance(receiver, gunicorn.port).total() >= 21)
        assert sorted(by_instance(receiver, gunicorn.port).values()) == [1, 20]


def run(folder: pathlib.Path, receiver: Receiver, socket_path: Any, *steps: str, **more: str) -> tuple[str, int]:
    """Runs the script to its end; returns what it said, and its port."""
    with Script(folder, environment(socket_path, receiver.http_endpoint, **more), steps) as script:
        assert script.process.wait(60) == 0, script.said
        return script.said, script.port


def test_a_script_that_is_over_soon(serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """All that it read since it began, and the span of its last moment."""
    said, port = run(tmp_path, receiver, serving, *["read:0"] * 5, "served", "span:0.01")
    assert [*by_instance(receiver, port).values()] == [6]
    trace_id, span_id = said.split()[1], said.split()[3]
    late = [span for span in receiver.spans() if span.name == "tcp receive"]
    assert [(span.trace_id, span.parent_span_id) for span in late if span.trace_id == trace_id] == [(trace_id, span_id)]


def test_a_child_that_is_forked(serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """Parent and child, each its own; the child's span has the child's process id."""
    said, port = run(tmp_path, receiver, serving, "read:0", "read:0", "fork:0.02", "fork:0.02", "read:0", SERVED="yes")
    assert sorted(by_instance(receiver, port).values()) == [1, 1, 3]
    traces = [line.split()[1] for line in said.splitlines() if line.startswith("trace")]
    spans = [span for span in receiver.spans() if span.trace_id in traces]
    late = [span for span in spans if span.name == "tcp receive"]
    assert sorted(span.trace_id for span in late) == sorted(traces)
    assert len({span.attributes["process.pid"] for span in late}) == 2


def test_a_program_that_is_executed(serving: pathlib.Path, receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """The same process id, and nothing of before."""
    steps = ("read:0", "read:0", "flush", "exec", "read:0", "served", "span:0.02", "read:0")
    said, port = run(tmp_path, receiver, serving, *steps)
    assert sorted(by_instance(receiver, port).values()) == [2, 3]
    late = [span for span in receiver.spans() if span.trace_id == said.split()[1] and span.name == "tcp receive"]
    assert [span.parent_span_id for span in late] == [said.split()[3]]


def test_a_broker_that_never_answers_keeps_nobody(receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """The program is over while the broker still holds its connection, and its own telemetry has gone."""
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        said, _ = run(tmp_path, receiver, path, "span:0.01")
        held, _ = listener.accept()
        held.close()
    assert "Traceback" not in said
    assert [span.name for span in receiver.spans()] == ["work"]
