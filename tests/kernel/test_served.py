"""Processes that hear of their own pickups: they alone, from their threshold on, until they end or exec."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from kernel.traced import MS, PORT, Child, Load, Traced, eventually, options, waits
from otel_tcppktlat.probe.layout import Event
from otel_tcppktlat.probe.probe import Harvest, Probe
from support.kernels import flavours
from telemetry.told import Listener, deliver, queued_for

CLONE_NEWPID = 0x20000000
_libc = ctypes.CDLL(None, use_errno=True)


class Serving(Traced):
    """A probe that serves; `served` has the events since begin()."""

    def __init__(self, flavour: str, **changes: object) -> None:
        self.rows: list[Event] = []
        self.served: list[Event] = []
        self.harvests: list[Harvest] = []
        self.options = options(flavour, **{"rows": False, "exemplars": False, "serve": 4, **changes})
        self.probe = Probe(self.options, self.rows.append, self.served.append, self.harvests.append)
        self.loaded = self.probe.open()
        self.begin()

    def waited(self) -> list[tuple[int, int]]:
        """(tgid, whole ms) of what the served heard; forgets it."""
        self.probe.poll()
        heard = [(event.tgid, event.wait_ns // MS) for event in self.served]
        self.served.clear()
        return heard


@pytest.fixture(scope="module", params=flavours())
def loaded(request: pytest.FixtureRequest) -> Iterator[Serving]:
    serving = Serving(request.param)
    yield serving
    serving.probe.close()


@pytest.fixture
def serving(loaded: Serving) -> Iterator[Serving]:
    loaded.begin()
    loaded.served.clear()
    yield loaded
    loaded.probe.stop_serving(os.getpid())


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(port=PORT) as it:
        yield it


def test_only_who_asked_and_from_the_threshold_on(serving: Serving, listener: Listener) -> None:
    """On a socket that was read before, too, and not after it has stopped."""
    me, (sender, reader) = os.getpid(), listener.connect()
    deliver(sender, reader, 0.02)
    assert serving.waited() == []
    serving.probe.serve(me, 20 * MS)
    deliver(sender, reader, 0)
    deliver(sender, reader, 0.03)
    ((tgid, waited_ms),) = serving.waited()
    assert tgid == me and waited_ms >= 30
    serving.probe.stop_serving(me)
    deliver(sender, reader, 0.03)
    assert serving.waited() == []
    assert serving.books == {"received": 4, "observed": 4} and serving.rows == []


def test_what_an_event_says(serving: Serving, listener: Listener) -> None:
    sender, reader = listener.connect()
    serving.probe.serve(os.getpid(), MS)
    heard_from: list[int] = []

    def read() -> None:
        heard_from.append(threading.get_native_id())
        deliver(sender, reader, 0.01, length=7)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    serving.probe.poll()
    (event,) = serving.served
    assert [event.tid] == [event.own_tid] == heard_from
    assert (event.segments, event.bytes, event.local_port) == (1, 7, PORT)
    assert event.remote_port == sender.getsockname()[1]


def test_another_process_is_not_heard_of(serving: Serving, listener: Listener) -> None:
    sender, reader = listener.connect()
    serving.probe.serve(os.getpid(), MS)
    deliver(sender, reader, 0.01)  # the socket's reader is this process, then the child, then this one again
    child = Child(lambda: deliver(sender, reader, 0.01))
    child.run()
    deliver(sender, reader, 0.01)
    child.end()
    assert [tgid for tgid, _ in serving.waited()] == [os.getpid()] * 2
    assert serving.books == {"received": 3, "observed": 3}


def test_a_forked_child_asks_for_itself(serving: Serving, listener: Listener) -> None:
    sender, reader = listener.connect()
    child = Child(lambda: deliver(sender, reader, 0.01))
    serving.probe.serve(child.pid, MS)
    child.run()
    assert [tgid for tgid, _ in serving.waited()] == [child.pid]
    child.end()
    eventually(lambda: not os.path.exists(f"/proc/{child.pid}"), "the child to be gone")
    assert serving.probe.served() == {}


def test_after_an_exec_it_is_served_no_more(serving: Serving, listener: Listener) -> None:
    sender, reader = listener.connect()
    os.set_inheritable(reader.fileno(), True)
    script = f"""
import os, socket, sys, time
reader = socket.socket(fileno={reader.fileno()})
while reader.recv(100, socket.MSG_PEEK) and sys.stdin.readline():
    os.write(1, b"%d" % len(reader.recv(100)))
"""
    go, done = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(go[0], 0)
        os.dup2(done[1], 1)
        os.read(0, 1)
        os.execv(sys.executable, [sys.executable, "-c", script])
    serving.probe.serve(pid, 0)
    os.write(go[1], b"x")
    sender.sendall(b"x" * 10)
    os.write(go[1], b"\n")
    assert os.read(done[0], 10) == b"10"
    assert serving.waited() == [] and serving.probe.served() == {}
    sender.close()
    os.waitpid(pid, 0)
    for fd in (*go, *done):
        os.close(fd)


def test_the_thread_by_its_own_name_in_a_pid_namespace(serving: Serving, listener: Listener) -> None:
    """What gettid() says there; tid and tgid stay the host's."""
    sender, reader = listener.connect()
    go, told = os.pipe(), os.pipe()
    outer = os.fork()
    if not outer:
        inner = os.fork() if not _libc.unshare(CLONE_NEWPID) else -1  # its number as the host has it
        if inner:
            os.write(told[1], f"{inner}\n".encode())
            os.waitpid(inner, 0)
        elif os.read(go[0], 1):
            deliver(sender, reader, 0.01)
            os.write(told[1], f"{threading.get_native_id()}\n".encode())
        os._exit(0)
    by_the_host = int(os.read(told[0], 20))
    serving.probe.serve(by_the_host, MS)
    os.write(go[1], b"x")
    os.waitpid(outer, 0)
    by_itself = int(os.read(told[0], 20))
    serving.probe.poll()
    (event,) = serving.served
    assert (event.tgid, event.tid, event.own_tid) == (by_the_host, by_the_host, by_itself)
    assert by_itself != by_the_host
    for fd in (*go, *told):
        os.close(fd)


def test_no_more_than_there_is_room_for(serving: Serving) -> None:
    for number in range(4):
        serving.probe.serve(4_000_000 + number, 0)
    with pytest.raises(OSError) as caught:
        serving.probe.serve(4_000_004, 0)
    assert caught.value.errno == errno.E2BIG
    for number in range(4):
        serving.probe.stop_serving(4_000_000 + number)
    assert serving.probe.served() == {}


def test_too_many_pickups_are_counted_and_not_told(load: Load, listener: Listener) -> None:
    """Three in a second, of all processes together."""
    serving = Serving(load.flavour, serve_all=3)
    try:
        sender, reader = listener.connect()
        child = Child(lambda: deliver(sender, reader, 0))
        serving.probe.serve(os.getpid(), 0)
        serving.probe.serve(child.pid, 0)
        began_s = time.monotonic()
        for _ in range(2):
            deliver(sender, reader)
        child.run()
        child.run()
        told, untold = serving.waited(), serving.probe.served()
        within_s = time.monotonic() - began_s
        assert len(told) + sum(untold.values()) == 4
        assert within_s >= 1 or [tgid for tgid, _ in told] == [os.getpid()] * 2 + [child.pid]
        time.sleep(1)
        deliver(sender, reader)
        assert [tgid for tgid, _ in serving.waited()] == [os.getpid()]
        child.end()
    finally:
        serving.probe.close()


def test_so_many_on_average_and_the_slowest_of_a_flood(serving: Serving, listener: Listener) -> None:
    """One every four seconds, of which two are saved up in ten, and a third begun; then what is twice as slow."""
    sender, reader = listener.connect()
    serving.probe.serve(os.getpid(), MS, 4000 * MS)
    began_s = time.monotonic()
    for _ in range(8):
        deliver(sender, reader, 0.01)
    slowest_ms, doubled = 0, 0
    heard = serving.waited()
    for _, waited_ms in heard:
        doubled += slowest_ms and waited_ms >= 2 * slowest_ms - 1
        slowest_ms = max(slowest_ms, waited_ms)
    within_s = time.monotonic() - began_s
    assert within_s >= 1 or 3 <= len(heard) <= 3 + doubled
    assert len(heard) + serving.probe.served()[os.getpid()] == 8
    untold_before = serving.probe.served()[os.getpid()]
    deliver(sender, reader, 2.5 * slowest_ms / 1000)
    ((_, waited_ms),) = serving.waited()
    assert waited_ms >= 2 * slowest_ms and serving.probe.served()[os.getpid()] == untold_before


def test_rows_and_served_pickups_at_once(load: Load, listener: Listener) -> None:
    """Each hears what it asked for, and one event may be for both."""
    serving = Serving(load.flavour, rows=True, min_us=1_000_000, exemplars=True)
    try:
        sender, reader = listener.connect()
        serving.probe.serve(os.getpid(), 100 * MS)
        for wait_s in (0, 0.15, 1.05):
            deliver(sender, reader, wait_s)
        waited = [ms for _, ms in serving.waited()]
        assert len(waited) == 2 and waited[0] >= 150 and waited[1] >= 1050
        (row,) = serving.rows
        assert row.wait_ns // MS == waited[1]
        serving.probe.serve(os.getpid(), 60_000 * MS)
        deliver(sender, reader, 1.05)
        assert serving.waited() == [] and len(serving.rows) == 2
    finally:
        serving.probe.close()


def test_only_what_the_served_read_is_observed(load: Load, listener: Listener) -> None:
    serving = Serving(load.flavour, only_served=True)
    try:
        sender, reader = listener.connect()
        deliver(sender, reader, 0)
        serving.probe.serve(os.getpid(), 1000 * MS)
        deliver(sender, reader, 0)
        serving.probe.stop_serving(os.getpid())
        deliver(sender, reader, 0)
        assert serving.books == {"received": 3, "observed": 1, "filtered": 2}
        assert waits(serving.harvest().deltas).count == 1
        assert serving.harvests
    finally:
        serving.probe.close()


def test_a_pickup_of_many_segments(serving: Serving, listener: Listener) -> None:
    """The way of long queues: one event, with the longest wait."""
    sender, reader = listener.connect()
    serving.probe.serve(os.getpid(), 5 * MS)
    for count in range(1, 31):
        sender.sendall(b"x" * 10)
        queued_for(reader, 10 * count)
    time.sleep(0.01)
    assert len(reader.recv(300)) == 300
    serving.probe.poll()
    assert sum(event.segments for event in serving.served) == serving.books["observed"] == 30
    assert all(event.wait_ns >= 10 * MS for event in serving.served)
