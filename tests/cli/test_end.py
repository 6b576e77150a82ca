"""SIGTERM, SIGINT, SIGHUP: all up to then is exported, and the end comes within seconds whatever the collector does."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from cli.printed import environment
from otel_tcppktlat.demo.receiver import Hang, Receiver, Unavailable
from support.agent import Agent, loader_of
from telemetry import told
from telemetry.told import Listener, deliver

MOST_S = 6.0  # 5 s, and a noisy machine


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """The agents inherit what is ignored, and whoever runs the tests may have SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def variables(grpc: str, http: str, metrics: str) -> dict[str, str]:
    """Metrics over one protocol and spans over the other."""
    traces = "http/protobuf" if metrics == "grpc" else "grpc"
    endpoints = {"grpc": grpc, "http/protobuf": http}
    paths = {"grpc": "", "http/protobuf": "/v1/"}
    return {
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": metrics,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": traces,
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": endpoints[metrics] + (paths[metrics] and paths[metrics] + "metrics"),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoints[traces] + (paths[traces] and paths[traces] + "traces"),
    }


@pytest.mark.parametrize(
    ("number", "metrics"),
    [
        (signal.SIGTERM, "grpc"),
        (signal.SIGTERM, "http/protobuf"),
        (signal.SIGINT, "grpc"),
        (signal.SIGHUP, "http/protobuf"),
    ],
)
def test_all_up_to_the_signal(number: int, metrics: str, tmp_path: pathlib.Path) -> None:
    """No interval has ended before: histogram, books and spans come with the last flush."""
    with Receiver() as receiver, Listener() as listener:
        environ = variables(receiver.grpc_endpoint, receiver.http_endpoint, metrics)
        environ |= {"OTEL_METRIC_EXPORT_INTERVAL": "60000", "OTEL_BSP_SCHEDULE_DELAY": "60000"}
        with Agent(tmp_path, ["-v", "-l", str(listener.port), "--span-rate", "100000", "0"], environ) as agent:
            agent.wait_for_stderr("attached")
            sender, reader = listener.connect()
            for _ in range(20):
                deliver(sender, reader)
            sender.sendall(b"x")
            told.queued_for(reader, 1)
            began_s = time.monotonic()
            assert agent.stop(number) == 0
            assert time.monotonic() - began_s < MOST_S
            assert {one.answer for one in receiver.requests} == {"ok"}
        assert told.check_balance(receiver) == {"received": 21, "observed": 20, "queued": 1}
        assert len(receiver.spans()) == 20
        assert {ids for _, one in told.exemplars(receiver) for ids in [(one.trace_id, one.span_id)]} <= set(
            told.spans_by_id(receiver)
        )


@pytest.mark.parametrize("metrics", ["grpc", "http/protobuf"])
def test_while_exports_hang(metrics: str, tmp_path: pathlib.Path) -> None:
    """A request of each signal gets no answer, as on a connection that a firewall forgot: all goes by new ones."""
    with Receiver() as receiver, Listener() as listener:
        environ = variables(receiver.grpc_endpoint, receiver.http_endpoint, metrics)
        environ |= {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta"}
        for signals in ("metrics", "traces"):
            receiver.answer_with(Hang(60), signal=signals, count=1)
        with Agent(tmp_path, ["-v", "-l", str(listener.port), "--span-rate", "100000", "0"], environ) as agent:
            agent.wait_for_stderr("attached")
            sender, reader = listener.connect()
            deliver(sender, reader)
            receiver.wait_for(lambda seen: len({one.signal for one in seen.requests}) == 2, 60)
            for _ in range(20):
                deliver(sender, reader)
            began_s = time.monotonic()
            assert agent.stop() == 0
            assert time.monotonic() - began_s < MOST_S
        assert told.check_balance(receiver) == {"received": 21, "observed": 21, "queued": 0}
        assert len(receiver.spans()) == len(told.spans_by_id(receiver)) == 21
        assert " delivered " not in agent.stderr


@dataclass
class _Ended:
    status: int
    seconds: float
    stderr: str


CASES = [
    f"{what} {metrics}"
    for what in ("hangs", "hung before", "refuses", "is away", "accepts nothing")
    for metrics in ("grpc", "http/protobuf")
]


def _end(folder: pathlib.Path, what: str, metrics: str) -> _Ended:
    with ExitStack() as stack:
        receiver, listener = stack.enter_context(Receiver()), stack.enter_context(Listener())
        grpc, http = receiver.grpc_endpoint, receiver.http_endpoint
        if what == "accepts nothing":
            deaf = stack.enter_context(socket.socket())
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            grpc = http = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        interval_ms = "300" if what == "hung before" else "60000"
        environ = {**variables(grpc, http, metrics), "OTEL_METRIC_EXPORT_INTERVAL": interval_ms}
        if what in ("hangs", "hung before"):
            receiver.answer_with(Hang(60))
        elif what == "refuses":
            receiver.answer_with(Unavailable())
        elif what == "is away":
            receiver.stop()
        agent = stack.enter_context(Agent(folder, ["-v", "-l", str(listener.port), "0"], environ))
        agent.wait_for_stderr("attached")
        deliver(*listener.connect())
        if what == "hung before":
            receiver.wait_for(lambda seen: len({one.signal for one in seen.requests}) == 2, 60)
        began_s = time.monotonic()
        status = agent.stop()
        return _Ended(status, time.monotonic() - began_s, agent.stderr)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, _Ended]]:
    """All cases, two at a time: mostly they wait."""
    found: dict[str, _Ended] = {}
    left = list(CASES)

    def work() -> None:
        while left:
            case = left.pop()
            found[case] = _end(tmp_path_factory.mktemp("agent"), *case.rsplit(" ", 1))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", CASES)
def test_a_collector_that_does_not_answer(ended: dict[str, _Ended], case: str) -> None:
    """Hangs, refuses, is away, or accepts no connection."""
    assert ended[case].status == 0
    assert ended[case].seconds < MOST_S
    assert "Traceback" not in ended[case].stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_while_the_programs_are_compiled(number: int, tmp_path: pathlib.Path) -> None:
    """Also when the signal goes to the whole group, as Ctrl-C does: it ends at once, and so does the compiler."""
    with subprocess.Popen(
        [sys.executable, "-m", "otel_tcppktlat", "--otlp", "http://127.0.0.1:9"],
        env=environment({"TMPDIR": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as agent:
        loader = loader_of(agent.pid)
        time.sleep(0.1)
        began_s = time.monotonic()
        os.killpg(agent.pid, number)
        assert agent.communicate(timeout=30) == (b"", b"")
        assert agent.returncode == 0
        assert time.monotonic() - began_s < MOST_S
        assert not pathlib.Path(f"/proc/{loader}").exists()
    assert list(tmp_path.iterdir()) == []
