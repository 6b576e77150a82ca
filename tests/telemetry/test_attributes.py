"""The user's choice of attributes: what they say, and how series merge, overflow and end."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from otel_tcppktlat.demo.receiver import points_of
from telemetry import told
from telemetry.told import DURATION, Scene, deliver

IN_USE = "tcppktlat.series.in_use"
ALL = (
    "process.executable.name,server.port,network.type,tcppktlat.role,process.pid,tcppktlat.process.comm,server.address"
)
PR_SET_NAME = 15
_READ = "import socket,sys;s=socket.socket(fileno=int(sys.argv[1]));[s.recv(1) for _ in range(int(sys.argv[2]))]"

_libc = ctypes.CDLL(None)


def executable() -> str:
    return os.path.basename(os.readlink("/proc/self/exe"))


def comm(pid: int) -> str:
    return pathlib.Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


def read_in_a_child(scene: Scene, count: int) -> int:
    """So many pickups in a process of its own, which then ends; returns its id."""
    sender, reader = scene.listener.connect()
    with subprocess.Popen(
        [sys.executable, "-I", "-c", _READ, str(reader.fileno()), str(count)], pass_fds=[reader.fileno()]
    ) as child:
        for _ in range(count):
            sender.sendall(b"x")
            told.eventually(lambda: unread(reader) == 0)
    return child.pid


def unread(sock: socket.socket) -> int:
    """Bytes that wait to be read."""
    try:
        return len(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """All attributes; one port, IPv4 and IPv6."""
    folder = tmp_path_factory.mktemp("agent")
    with told.scene(folder, "--attributes", ALL, "0", host="::", dual_stack=True) as it:
        yield it


@pytest.mark.parametrize(
    ("to", "address", "network"),
    [("::1", "::1", "ipv6"), ("127.0.0.1", "127.0.0.1", "ipv4"), ("127.1.2.3", "127.1.2.3", "ipv4")],
)
def test_all_of_a_server(everything: Scene, to: str, address: str, network: str) -> None:
    """What an IPv6 socket gets from IPv4 is IPv4."""
    deliver(*everything.listener.connect(to))
    everything.settle()
    expected = {
        "process.executable.name": executable(),
        "server.port": everything.listener.port,
        "network.type": network,
        "tcppktlat.role": "server",
        "process.pid": os.getpid(),
        "tcppktlat.process.comm": comm(os.getpid()),
        "server.address": address,
    }
    assert told.waits_by_attributes(everything.receiver)[frozenset(expected.items())].count == 1
    (span,) = (one for one in everything.receiver.spans() if one.attributes["server.address"] == address)
    assert expected.items() <= span.attributes.items()
    assert {span.attributes[f"network.{side}.address"] for side in ("local", "peer")} <= {address, "127.0.0.1"}


def test_names_that_a_process_chose(everything: Scene) -> None:
    """A comm of control characters and broken UTF-8 arrives as valid Unicode."""
    sender, reader = everything.listener.connect("::1")

    def read() -> None:
        _libc.prctl(PR_SET_NAME, b"\x1b[31m\n\xff\xc3\xa9\x80", 0, 0, 0)
        deliver(sender, reader)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    everything.settle()
    names = {span.attributes["thread.name"] for span in everything.receiver.spans()}
    assert "\x1b[31m\n\ufffdé\ufffd" in names


@pytest.fixture
def cgroup() -> Iterator[pathlib.Path]:
    """A control group whose name holds what such a name may: escape sequences and broken UTF-8, but no newline."""
    mounts = (line.split() for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())
    root = next(where for _, where, kind, *_ in mounts if kind == "cgroup2")
    path = os.fsencode(root) + b"/evil \x1b[2J\xff.slice"
    os.mkdir(path)
    yield pathlib.Path(os.fsdecode(path))
    told.eventually(lambda: not pathlib.Path(os.fsdecode(path), "cgroup.procs").read_text())
    os.rmdir(path)


@pytest.mark.parametrize(
    "name",
    [b"\x1b]0;owned\x07\r\n\xff\xfe", "n\u202eame".encode(), "\u00e9".encode() * 40, b"\xed\xa0\x80;`$(x)'\"\\"],
    ids=["escapes", "right to left", "cut in a character", "surrogate"],
)
def test_names_of_executables(everything: Scene, name: bytes, cgroup: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Whatever a file may be called: valid Unicode arrives, of the first 63 bytes, and of 15 in the comm."""
    program = os.path.join(os.fsencode(tmp_path), name)
    shutil.copy(b"/usr/bin/head", program)
    sender, reader = everything.listener.connect("::1")
    command = [
        b"sh",
        b"-c",
        os.fsencode(f"echo $$ > '{cgroup}/cgroup.procs' && exec \"$@\""),
        b"sh",
        program,
        b"-c",
        b"1",
    ]
    with subprocess.Popen(command, stdin=reader.fileno(), stdout=subprocess.PIPE) as child:
        reader.close()
        sender.sendall(b"x")
        assert child.communicate(timeout=60)[0] == b"x"
    everything.settle()
    found = [dict(key) for key in told.waits_by_attributes(everything.receiver)]
    (its,) = (one for one in found if one["process.pid"] == child.pid)
    assert its["process.executable.name"] == name[:63].decode(errors="replace")
    assert its["tcppktlat.process.comm"] == name[:15].decode(errors="replace")
    (span,) = (one for one in everything.receiver.spans() if one.attributes["process.pid"] == child.pid)
    assert span.attributes["thread.name"] == name[:15].decode(errors="replace")


def test_series_of_processes_that_are_gone(everything: Scene) -> None:
    """Their totals stay; the kernel forgets them within seconds."""
    everything.settle()
    before = int(everything.receiver.points(IN_USE)[-1].value or 0)
    pids = [read_in_a_child(everything, 3) for _ in range(3)]
    told.eventually(lambda: everything.receiver.points(IN_USE)[-1].value == before)
    everything.settle()
    counts = {dict(key)["process.pid"]: one.count for key, one in told.waits_by_attributes(everything.receiver).items()}
    assert [counts[pid] for pid in pids] == [3, 3, 3]
    told.check_balance(everything.receiver)


def test_one_series_for_all(tmp_path: pathlib.Path) -> None:
    """No attributes: readers, families and roles are one."""
    with told.scene(tmp_path, "--attributes", "", "0", host="::", dual_stack=True) as scene:
        for to in ("127.0.0.1", "::1"):
            deliver(*scene.listener.connect(to))
            read_in_a_child(scene, 2)
        scene.settle()
        ((key, one),) = told.waits_by_attributes(scene.receiver).items()
        assert (dict(key), one.count) == ({}, 6)
        pids = {exemplar.attributes["process.pid"] for _, exemplar in told.exemplars(scene.receiver)}
        assert os.getpid() in pids
        assert len(scene.receiver.spans()) == 6
        told.check_balance(scene.receiver)


def test_a_client(tmp_path: pathlib.Path) -> None:
    """Its series has the server's port and address."""
    arguments = ("--attributes", "server.port,tcppktlat.role,server.address")
    with told.scene(tmp_path, *arguments, side="-r", host="::", dual_stack=True) as scene:
        addresses = ("127.9.8.7", "::1")
        for to in addresses:
            client, server = scene.listener.connect(to)
            deliver(server, client)
        scene.settle()
        port = scene.listener.port
        assert {key: one.count for key, one in told.waits_by_attributes(scene.receiver).items()} == {
            frozenset({"server.port": port, "tcppktlat.role": "client", "server.address": to}.items()): 1
            for to in addresses
        }
        peers = {
            (span.attributes["network.peer.address"], span.attributes["network.peer.port"])
            for span in scene.receiver.spans()
        }
        assert peers == {(to, port) for to in addresses}


def test_overflow(tmp_path: pathlib.Path) -> None:
    """More addresses than the user's limit, and than the kernel's map holds: nothing is lost, requests stay small."""
    addresses, known = 2300, 2000
    with told.scene(tmp_path, "--attributes", "server.address", "--span-rate", "0", host="0.0.0.0") as scene:
        for number in range(addresses):
            sender, reader = scene.listener.connect(f"127.1.{number // 250}.{number % 250 + 1}")
            sender.sendall(b"x")
            assert reader.recv(1) == b"x"
            reader.close()
            sender.close()
        scene.settle()
        by_key = told.waits_by_attributes(scene.receiver)
        overflow = by_key.pop(frozenset({("otel.metric.overflow", True)}))
        assert len(by_key) == known
        assert {one.count for one in by_key.values()} == {1}
        assert overflow.count == addresses - known
        in_use = max(int(point.value or 0) for point in scene.receiver.points(IN_USE))
        assert known < in_use < addresses  # the kernel's own bound
        told.check_balance(scene.receiver)
        requests = [
            one.message for one in scene.receiver.requests if isinstance(one.message, ExportMetricsServiceRequest)
        ]
        assert {one.answer for one in scene.receiver.requests} == {"ok"}
        assert max(one.bytes for one in scene.receiver.requests) < 3 << 20
        sizes = [sum(point.name == DURATION for point in points_of(message)) for message in requests]
        assert max(sizes) <= 250 < max(sum(part) for part in zip(sizes, sizes[1:], sizes[2:], strict=False))
