"""An agent that comes, goes and comes back; none at all; and one of the application's own."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence

import pytest

from instrumentation.programs import Script, by_instance, environment
from otel_tcppktlat.demo.receiver import Receiver, SpanRecord
from otel_tcppktlat.instrumentation.own_agent import OwnAgent
from support.agent import Agent
from telemetry.told import DURATION, eventually

WITHOUT_PRIVILEGE = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
MARK = "receive-queue waits are not measured"


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="tcppktlat-") as name:
        yield pathlib.Path(name)


def start(
    folder: pathlib.Path,
    receiver: Receiver,
    path: object,
    steps: Sequence[str],
    prefix: Sequence[str] = (),
    **more: str,
) -> Script:
    return Script(folder, environment(path, receiver.http_endpoint, **more), steps, prefix)


def agent(folder: pathlib.Path, path: pathlib.Path) -> Agent:
    return Agent(folder, ["-v", "--serve", str(path)])


def traces(script: Script) -> list[str]:
    """Of its spans, in their order."""
    return [line.split()[1] for line in script.said.splitlines() if line.startswith("trace")]


def receives(receiver: Receiver, script: Script) -> list[SpanRecord]:
    """Those in the script's own traces: on a busy machine whatever reads may be late."""
    return [span for span in receiver.spans() if span.name == "tcp receive" and span.trace_id in traces(script)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_comes_late_goes_and_comes_back(folder: pathlib.Path, receiver: Receiver, number: int) -> None:
    """The application reads on meanwhile; what was counted stays counted, and a new agent's counts are added."""
    path = folder / "agent.sock"
    steps = ["span:0.01", "wait"] + ["read:0"] * 5 + ["span:0.02", "flush", "wait"] + ["span:0.01", "wait"]
    steps += ["read:0"] * 3 + ["span:0.02"]
    with start(folder, receiver, path, steps) as script:
        script.wait_for("waits")
        assert receives(receiver, script) == []
        with agent(folder, path) as first:
            first.wait_for_stderr("otel-tcppktlat: attached")
            script.wait_for_connection(first)
            script.go_on()
            script.wait_until_said("waits", 2)
            eventually(lambda: len(receives(receiver, script)) == 1)
            eventually(lambda: by_instance(receiver, script.port).total() == 6)
            first.stop(number)
        script.go_on()  # a span that nobody measures
        script.wait_until_said("waits", 3)
        with agent(folder, path) as second:
            second.wait_for_stderr("otel-tcppktlat: attached")
            script.wait_for_connection(second)
            script.go_on()
            assert script.process.wait(60) == 0, script.said
            assert by_instance(receiver, script.port).total() == 6 + 4
            assert len(receives(receiver, script)) == 2
        assert [span.trace_id for span in receives(receiver, script)] == traces(script)[1::2]
        assert script.said.count(MARK) == 1 and "Traceback" not in script.said


def test_with_neither_it_says_one_line(receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """And does all that it does otherwise, its children as well."""
    path = tmp_path / "agent.sock"
    steps = ("span:0.01", "fork:0.01", "fork:0.01", "span:0.01")
    with start(tmp_path, receiver, path, steps, WITHOUT_PRIVILEGE, OTEL_PYTHON_TCPPKTLAT_LOAD="true") as script:
        assert script.process.wait(60) == 0
        (line,) = [line for line in script.said.splitlines() if not line.startswith("trace") and line != "done"]
    assert MARK in line and f"otel-tcppktlat --serve {path}" in line and "OTEL_PYTHON_TCPPKTLAT_SOCKET" in line
    assert receiver.points(DURATION) == []
    assert [span.name for span in receiver.spans()] == ["work"] * 4


def test_an_agent_that_refuses_says_why(folder: pathlib.Path, receiver: Receiver) -> None:
    """In the application's log: here, one that is no agent."""
    path = folder / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def refuse() -> None:
            sock, _ = listener.accept()
            sock.sendall(b'{"error": "not today"}\n')
            sock.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        with start(folder, receiver, path, ["span:0.01", "wait"]) as script:
            script.wait_for("not today")
            thread.join()


def own_agents() -> set[int]:
    """Agents that an application started, and that have given up their privilege."""
    found = set()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            ours = b"--serve-application" in (folder / "cmdline").read_bytes().split(b"\0")
            if ours and "Uid:\t65534" in (folder / "status").read_text():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_letting_go_twice_closes_nothing_else() -> None:
    """Descriptors' numbers are given away again at once."""
    own = OwnAgent()
    own.end()
    others = os.pipe(), os.pipe()
    own.end()
    for ends in others:
        os.write(ends[1], b"x")
        assert os.read(ends[0], 1) == b"x"
        for fd in ends:
            os.close(fd)


def test_who_may_load_loads_for_itself(receiver: Receiver, tmp_path: pathlib.Path) -> None:
    """In a process that is not its child, and that is gone soon after the last that it served."""
    before = own_agents()
    steps = ("served", "span:0.01", "fork:0.02", "fork:0.02", "read:0", "flush", "wait")
    variables = {"OTEL_PYTHON_TCPPKTLAT_LOAD": "true", "SERVED": "yes"}
    with start(tmp_path, receiver, tmp_path / "none.sock", steps, **variables) as script:
        script.wait_for("waits")
        (own,) = own_agents() - before
        assert f"PPid:\t{script.process.pid}\n" not in pathlib.Path(f"/proc/{own}/status").read_text()
        eventually(lambda: len(receives(receiver, script)) == 3)
        assert sorted(span.trace_id for span in receives(receiver, script)) == sorted(traces(script))
        eventually(lambda: by_instance(receiver, script.port).total() == 4)
        script.process.kill()
        script.process.wait()
    eventually(lambda: not own_agents() - before, what="an agent is left")
    assert MARK not in script.said and "Traceback" not in script.said
