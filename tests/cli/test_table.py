"""The table: tcppktlat's columns, options and filters."""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cli.printed import HEADER, WIDE_HEADER, Printed, environment
from otel_tcppktlat.demo.receiver import Receiver
from telemetry import told
from telemetry.told import Listener, deliver

PR_SET_NAME = 15
_libc = ctypes.CDLL(None)


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener("::", dual_stack=True) as it:
        yield it


@pytest.fixture(scope="module")
def plain(listener: Listener) -> Iterator[Printed]:
    """Without options, but for the port of these tests."""
    with Printed("-l", str(listener.port)) as it:
        it.wait_for_lines(1)
        yield it
        assert it.stop() == (0, "")


def comm() -> str:
    return pathlib.Path("/proc/self/comm").read_text().rstrip("\n")


@pytest.mark.parametrize(("to", "address"), [("127.0.0.1", "127.0.0.1"), ("127.4.5.6", "127.4.5.6"), ("::1", "::1")])
def test_a_row(plain: Printed, listener: Listener, to: str, address: str) -> None:
    """One a pickup, IPv4 and IPv6, and IPv4 where it came to an IPv6 socket; flushed to a pipe within a second."""
    before = len(plain.lines)
    sender, reader = listener.connect(to)
    deliver(sender, reader, 0.12)
    read_s = time.monotonic()
    plain.wait_for_lines(before + 1)
    row = plain.rows[-1]
    assert plain.lines[0] == HEADER
    assert (row.pid, row.comm, row.tid, row.time) == (os.getpid(), comm(), None, None)
    assert row.local == (address, listener.port)
    peer = sender.getsockname()
    assert row.remote == (peer[0], peer[1])
    assert 120 <= row.ms < 60_000
    assert plain.times_s[-1] - read_s < 1.0 + 2.0  # a second, and a noisy machine


def test_columns(plain: Printed, listener: Listener) -> None:
    before = len(plain.lines)
    sender, reader = listener.connect("127.0.0.1")
    deliver(sender, reader)
    plain.wait_for_lines(before + 1)
    row = plain.rows[-1]
    assert plain.lines[-1] == (
        f"{row.pid:<7} {comm():<16} {'127.0.0.1':<15} {listener.port:<5} "
        f"{'127.0.0.1':<15} {row.remote[1]:<5} {row.ms:.2f}"
    )


def test_a_pickup_of_several_segments_is_a_row_with_the_longest_wait(plain: Printed, listener: Listener) -> None:
    before = len(plain.lines)
    sender, reader = listener.connect("127.0.0.1")
    for count in range(1, 4):
        sender.sendall(b"x" * 10)
        told.queued_for(reader, 10 * count)
        time.sleep(0.05)
    assert len(reader.recv(15)) == 15  # the first, and half of the second
    assert len(reader.recv(100)) == 15
    plain.wait_for_lines(before + 2)
    time.sleep(0.3)
    rows = plain.rows[before - 1 :]
    assert len(rows) == 2
    assert rows[0].ms >= 150 and 100 <= rows[1].ms <= rows[0].ms


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"\x1b[2Jboo\r\n", r"\x1b[2Jboo\r\n"),
        (b"\xff\xfe broken", r"\xff\xfe broken"),
        ("h\u00e9 \u202egnp".encode(), "h\u00e9 \\u202egnp"),
        (b"a  b", "a  b"),
    ],
    ids=["escape", "broken UTF-8", "right to left", "blanks"],
)
def test_names_that_a_process_chose(plain: Printed, listener: Listener, name: bytes, shown: str) -> None:
    """Nothing moves the terminal's cursor or breaks a line."""
    before = len(plain.lines)
    sender, reader = listener.connect("127.0.0.1")

    def read() -> None:
        _libc.prctl(PR_SET_NAME, name, 0, 0, 0)
        deliver(sender, reader)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    plain.wait_for_lines(before + 1)
    assert plain.rows[-1].comm == shown


def test_wide_with_time_and_minimum(listener: Listener) -> None:
    """-T, -w and MIN_US; -v writes on stderr only."""
    with Printed("-T", "-w", "-v", "-l", str(listener.port), "50000") as printed:
        printed.wait_for_lines(1)
        sender, reader = listener.connect("127.0.0.1")
        for wait_s in (0.0, 0.06, 0.0, 0.06):
            before = time.strftime("%H:%M:%S")
            deliver(sender, reader, wait_s)
            after = time.strftime("%H:%M:%S")
        status, stderr = printed.stop()
        assert status == 0
        assert printed.lines[0] == WIDE_HEADER
        slow = printed.rows
        assert 2 <= len(slow) <= 4 and all(row.ms >= 50 for row in slow)
        row = slow[-1]
        assert row.tid == threading.get_native_id()
        assert row.time is not None and before <= row.time <= after or before > after  # midnight
        assert printed.lines[-1] == (
            f"{row.time} {row.pid:<7} {row.tid:<7} {comm():<16} {'127.0.0.1':<26} {listener.port:<5} "
            f"{'127.0.0.1':<26} {row.remote[1]:<5} {row.ms:.2f}"
        )
        assert "flavour" in stderr and "attached" in stderr
        assert all(line.startswith("otel-tcppktlat: ") for line in stderr.splitlines())


def test_filters(listener: Listener) -> None:
    """A thread, the local and the remote port, by their long forms."""
    client = socket.socket()
    client.bind(("127.0.0.1", 0))
    port = client.getsockname()[1]
    arguments = (
        "--tid",
        str(threading.get_native_id()),
        "--lport",
        str(listener.port),
        f"--rport={port}",
        "--timestamp",
    )
    with Printed(*arguments, "--wide", "--verbose") as printed:
        printed.wait_for_lines(1)
        client.connect(("127.0.0.1", listener.port))
        server = listener.accept()
        deliver(client, server)
        thread = threading.Thread(target=deliver, args=(client, server))
        thread.start()
        thread.join()
        deliver(*listener.connect("127.0.0.1"))
        deliver(client, server)
        assert printed.stop()[0] == 0
        assert [(row.tid, row.remote) for row in printed.rows] == [(threading.get_native_id(), ("127.0.0.1", port))] * 2
    client.close()


def test_a_process(listener: Listener) -> None:
    """--pid: what others read has no row."""
    read = "import socket,sys;s=socket.socket(fileno=int(sys.argv[1]));sys.stdin.readline();print(s.recv(9))"
    sender, reader = listener.connect("127.0.0.1")
    fd = reader.fileno()
    with subprocess.Popen(
        [sys.executable, "-I", "-c", read, str(fd)], pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        with Printed("--pid", str(child.pid), "-l", str(listener.port)) as printed:
            printed.wait_for_lines(1)
            deliver(sender, reader)
            sender.sendall(b"x")
            assert child.stdin is not None
            child.communicate(b"\n")
            assert printed.stop() == (0, "")
            assert [row.pid for row in printed.rows] == [child.pid]


def test_a_terminal(listener: Listener) -> None:
    """Rows at once; Ctrl-C ends it."""
    with Printed("-l", str(listener.port), terminal=True) as printed:
        printed.wait_for_lines(1)
        sender, reader = listener.connect("127.0.0.1")
        for count in range(3):
            deliver(sender, reader, 0.4)
            printed.wait_for_lines(2 + count, 5)
        assert printed.stop(signal.SIGINT) == (0, "")
        assert printed.lines[0] == HEADER and len(printed.rows) == 3


def test_a_reader_that_has_seen_enough(listener: Listener) -> None:
    """`| head -1`: the agent ends at once, quietly."""
    with subprocess.Popen(
        [sys.executable, "-m", "otel_tcppktlat", "-l", str(listener.port)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline().decode() == HEADER + "\n"
        agent.stdout.close()
        assert agent.wait(10) == 0
        assert agent.stderr is not None and agent.stderr.read() == b""


def test_a_reader_that_reads_nothing(listener: Listener, tmp_path: pathlib.Path) -> None:
    """The export goes on beside a full pipe, and the end comes in time."""
    with Receiver() as receiver:
        variables = {"OTEL_METRIC_EXPORT_INTERVAL": "300"}
        arguments = ("--table", "--otlp", receiver.grpc_endpoint, "-l", str(listener.port), "-w")
        read_fd, write_fd = os.pipe()
        with subprocess.Popen(
            [sys.executable, "-m", "otel_tcppktlat", *arguments],
            env=environment(variables),
            stdout=write_fd,
            stderr=subprocess.PIPE,
        ) as agent:
            told.settle(receiver)
            sender, reader = listener.connect("127.0.0.1")
            for _ in range(2000):
                deliver(sender, reader)
            told.settle(receiver)
            assert told.check_balance(receiver)["observed"] == 2000
            began_s = time.monotonic()
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(30) == 0
            assert time.monotonic() - began_s < 6
        os.close(write_fd)
        os.close(read_fd)


def without(stream: int, *arguments: str) -> subprocess.Popen[str]:
    """An agent that was started with this stream closed."""
    return subprocess.Popen(
        ["sh", "-c", f'exec "$@" {stream}>&-', "sh", sys.executable, "-m", "otel_tcppktlat", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("stream", [0, 2])
def test_closed_streams(stream: int) -> None:
    """Nothing else gets their numbers."""
    with without(stream, "-l", "1") as agent:
        assert agent.stdout is not None and agent.stdout.readline() == HEADER + "\n"
        assert os.readlink(f"/proc/{agent.pid}/fd/{stream}") == os.devnull
        agent.send_signal(signal.SIGTERM)
        assert agent.communicate(timeout=30) == ("", "")
        assert agent.returncode == 0


def test_closed_output() -> None:
    """A table with nowhere to go is no use."""
    with without(1) as agent:
        line = "otel-tcppktlat: standard output is closed: there is nowhere to print the table\n"
        assert agent.communicate(timeout=30) == ("", line)
        assert agent.returncode == 1


def test_the_table_beside_the_export(listener: Listener) -> None:
    with Receiver() as receiver:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "300"}
        with Printed("--table", "-l", str(listener.port), "100000", variables=variables) as printed:
            told.settle(receiver)
            sender, reader = listener.connect("127.0.0.1")
            for wait_s in (0.0, 0.11, 0.0):
                deliver(sender, reader, wait_s)
            assert printed.stop() == (0, "")
        assert told.waits(receiver).count == 3
        (row,) = printed.rows
        slow = [span for span in receiver.spans() if told.length_ns(span) >= 100_000_000]
        assert [f"{told.length_ns(span) / 1e6:.2f}" for span in slow] == [f"{row.ms:.2f}"]


def test_export_prints_nothing() -> None:
    with Receiver() as receiver:
        with Printed("--otlp", receiver.grpc_endpoint, variables={"OTEL_METRIC_EXPORT_INTERVAL": "300"}) as printed:
            told.settle(receiver)
            assert printed.stop() == (0, "")
        assert printed.lines == []


def test_a_disabled_sdk_leaves_the_table(listener: Listener) -> None:
    with Receiver() as receiver:
        variables = {"OTEL_SDK_DISABLED": "TRUE", "OTEL_METRIC_EXPORT_INTERVAL": "x"}
        with Printed("--otlp", receiver.grpc_endpoint, "-l", str(listener.port), variables=variables) as printed:
            printed.wait_for_lines(1)
            deliver(*listener.connect("127.0.0.1"))
            printed.wait_for_lines(2)
            assert printed.stop() == (0, "")
        assert receiver.requests == []
