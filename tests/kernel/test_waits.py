"""How long each segment waited: against clocks read around it, against exemplars, and beside the real tcppktlat."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernel.traced import (
    BOUNDS_NS,
    MS,
    PORT,
    Load,
    Traced,
    accept,
    bucket_of,
    eventually,
    read_all,
    readable,
    waits,
)
from otel_tcppktlat.probe.probe import Harvest
from support.tun import TunPeer

TCPPKTLAT = Path(__file__).parents[1] / "support/tcppktlat"


def test_a_reader_that_sleeps(traced: Traced, peer: TunPeer) -> None:
    """Each wait lies between what the sleep forces and what the clocks around it allow; sum and buckets agree."""
    conversation = accept(peer)
    bounds = []
    for _ in range(10):
        sending = time.monotonic_ns()
        conversation.send(100)
        sent = time.monotonic_ns()
        time.sleep(0.05)
        reading = time.monotonic_ns()
        assert conversation.socket.recv(1000)
        bounds.append((reading - sent, time.monotonic_ns() - sending))
    rows = traced.poll()
    assert [row.segments for row in rows] == [1] * 10
    for row, (least, most) in zip(rows, bounds, strict=True):
        assert 50 * MS <= least <= row.wait_ns <= most
    found = traced.waits()
    assert found.sum_ns == sum(row.wait_ns for row in rows)
    assert sorted(found.buckets.elements()) == sorted(bucket_of(row.wait_ns) for row in rows)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_stall_while_a_packet_arrives_each_millisecond(traced: Traced, peer: TunPeer, one_by_one: bool) -> None:
    """Each segment has waited since its own arrival: 500 ms for the first, less and less for those behind it."""
    conversation = accept(peer)
    arrivals = []
    for _ in range(500):
        sending = time.monotonic_ns()
        conversation.send(10)
        arrivals.append((sending, time.monotonic_ns()))
        time.sleep(0.001)
    reading = time.monotonic_ns()
    assert read_all(conversation.socket, 10 if one_by_one else 1 << 20) == 5000
    read = time.monotonic_ns()
    bounds = [(reading - sent, read - sending) for sending, sent in arrivals]
    assert bounds[0][0] >= 500 * MS
    rows, found = traced.poll(), traced.waits()
    assert found.count == 500 and sum(least for least, _ in bounds) <= found.sum_ns <= sum(most for _, most in bounds)
    for index, bound in enumerate(BOUNDS_NS):
        longer = sum(count for bucket, count in found.buckets.items() if bucket > index)
        assert sum(least > bound for least, _ in bounds) <= longer <= sum(most > bound for _, most in bounds)
    if one_by_one:
        # What the reader lost between two reads, an earlier segment's wait lacks: so compare arrivals, not waits.
        arrived = [row.picked_ns - row.wait_ns for row in rows]
        assert len(rows) == 500 and all(later - earlier >= MS for earlier, later in zip(arrived, arrived[1:]))  # noqa: B905
        for at, (sending, sent) in zip(arrived, arrivals, strict=True):
            assert sending <= at <= sent


def test_a_gap_is_not_the_readers_fault(traced: Traced, peer: TunPeer) -> None:
    """What waited behind a gap could not be read: its wait begins when the gap closes."""
    conversation = accept(peer)
    for index in range(5):
        conversation.send(10, at=10 + 10 * index)
    time.sleep(0.1)
    closing = time.monotonic_ns()
    conversation.send(10, at=0)
    assert read_all(conversation.socket) == 60
    most = time.monotonic_ns() - closing
    found = traced.waits()
    assert found.count == 6 and found.sum_ns <= 6 * most


def test_only_long_waits_make_rows(load: Load, peer: TunPeer) -> None:
    """The limit is for rows; the histogram has every wait."""
    traced = load(min_us=30_000, exemplars=False)
    conversation = accept(peer)
    slow = 0
    for pause_s in (0, 0.04, 0, 0.04, 0):
        sending = time.monotonic_ns()
        conversation.send(10)
        time.sleep(pause_s)
        assert read_all(conversation.socket) == 10
        slow += pause_s > 0 or time.monotonic_ns() - sending >= 30 * MS
    rows = traced.poll()
    assert 2 <= len(rows) <= slow and all(row.wait_ns >= 30 * MS for row in rows)
    assert traced.waits().count == 5


def test_a_row_has_the_longest_wait_of_a_pickup(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    sending = time.monotonic_ns()
    for _ in range(4):
        conversation.send(10)
        time.sleep(0.01)
    assert len(conversation.socket.recv(1000)) == 40
    rows = traced.poll()
    assert sum(row.segments for row in rows) == 4 and sum(row.bytes for row in rows) == 40
    assert 40 * MS <= max(row.wait_ns for row in rows) <= time.monotonic_ns() - sending


class Harvester:
    """A thread that harvests without a pause."""

    def __init__(self, traced: Traced) -> None:
        self.harvests: list[Harvest] = []
        self._traced, self._over = traced, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            self.harvests.append(self._traced.harvest())

    def end(self) -> list[Harvest]:
        self._over.set()
        self._thread.join()
        self.harvests.append(self._traced.harvest())
        return self.harvests


def check(harvest: Harvest) -> int:
    """Counts, sums and exemplars of one interval agree; returns how many observations it has."""
    grown: set[tuple[bytes, int]] = set()
    for delta in harvest.deltas:
        assert delta.series is not None
        found = waits([delta])
        grown |= {(bytes(delta.series.key), bucket) for bucket in found.buckets}
        least = sum(count * (BOUNDS_NS[bucket - 1] if bucket else 0) for bucket, count in found.buckets.items())
        most = sum(count * BOUNDS_NS[bucket] for bucket, count in found.buckets.items())
        assert least <= found.sum_ns <= most
    exemplars: set[tuple[bytes, int]] = set()
    for series, event in harvest.exemplars:
        assert series is not None and event.bucket == bucket_of(event.wait_ns)
        assert harvest.began_ns <= event.picked_ns <= harvest.ended_ns
        exemplars.add((bytes(series.key), event.bucket))
    assert exemplars == grown
    return waits(harvest.deltas).count


def test_each_bucket_that_grew_has_an_exemplar(traced: Traced, peer: TunPeer) -> None:
    """Under continuous traffic, with one interval after the other: none is missing, none is in a wrong interval."""
    conversations = [accept(peer), accept(peer)]
    harvester, chance = Harvester(traced), random.Random(7)
    began_ns, segments = harvester.harvests[0].began_ns if harvester.harvests else 0, 0
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        conversation = chance.choice(conversations)
        count = chance.choice([1, 1, 1, 2, 20, 500])
        conversation.send_many([10] * count)
        time.sleep(chance.choice([0, 0, 0.001, 0.005]))
        assert read_all(conversation.socket) == 10 * count
        segments += count
    harvests = harvester.end()
    assert sum(check(harvest) for harvest in harvests) == segments
    assert traced.books == {"received": segments, "observed": segments}
    assert len(harvests) >= 10 and began_ns <= harvests[0].began_ns
    assert all(earlier.ended_ns == later.began_ns for earlier, later in zip(harvests, harvests[1:]))  # noqa: B905


def test_intervals_that_end_while_a_long_queue_is_drained(traced: Traced, peer: TunPeer) -> None:
    """A pickup of many programs belongs to one interval as a whole."""
    peer.sysctl("net.ipv4.tcp_rmem", "4096 500000000 500000000")
    conversation = accept(peer)
    harvester = Harvester(traced)
    for _ in range(20):
        conversation.send_many([1] * 4000)
        assert read_all(conversation.socket) == 4000
    assert sum(check(harvest) for harvest in harvester.end()) == 80_000


def test_events_that_the_ring_buffer_has_no_room_for_are_counted(traced: Traced, peer: TunPeer) -> None:
    """Nobody polls: one wakeup as it passes half, then losses; the books and the histogram are none the worse."""
    conversation = accept(peer)
    descriptor, sent = traced.probe.epoll_fd(), 0
    traced.poll()
    while not readable(descriptor):
        conversation.send(10)
        assert conversation.socket.recv(100)
        sent += 1
        assert sent < 20_000, "a wakeup"
    assert sent > 1000 and "events_lost" not in traced.books
    while traced.books.get("events_lost", 0) < 100:
        conversation.send(10)
        assert conversation.socket.recv(100)
        sent += 1
        assert sent < 40_000, "losses"
    books = traced.books
    assert books == {"received": sent, "observed": sent, "events_lost": books["events_lost"]}
    assert len(traced.poll()) + books["events_lost"] == sent
    assert traced.waits().count == sent
    conversation.send(10)
    assert conversation.socket.recv(100)
    assert len(traced.poll()) == sent - books["events_lost"] + 1


@pytest.fixture
def tcppktlat() -> Iterator[list[list[str]]]:
    """The rows of the real tcppktlat, as they come, split at blanks."""
    rows: list[list[str]] = []
    ours, theirs = pty.openpty()  # to a pipe it would write in blocks
    with subprocess.Popen([str(TCPPKTLAT), "-l", str(PORT)], stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)

        def read() -> None:
            text = b""
            with contextlib.suppress(OSError):  # EIO: it has ended
                while block := os.read(ours, 65536):
                    text += block
                    rows[:] = [line.decode().split() for line in text.splitlines(keepends=True) if line[-1:] == b"\n"]

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: rows, "its header")
        yield rows
        process.terminate()
        process.wait()
        reader.join()
        os.close(ours)


def test_beside_the_real_tcppktlat(traced: Traced, peer: TunPeer, tcppktlat: list[list[str]]) -> None:
    """One segment per read, 50 ms after it came: there it is right, too, and both tell the same pickups."""
    conversation = accept(peer)
    for _ in range(12):
        conversation.send(100)
        time.sleep(0.05)
        assert conversation.socket.recv(1000)
    rows = traced.poll()
    assert len(rows) == 12
    eventually(lambda: len(tcppktlat) > 12, "its rows")
    assert tcppktlat[0][:3] == ["PID", "TID", "COMM"] and len(tcppktlat) == 13
    for ours, theirs in zip(rows, tcppktlat[1:], strict=True):
        pid, tid, *comm, local, local_port, remote, remote_port, ms = theirs
        assert (int(pid), int(tid), " ".join(comm)) == (ours.tgid, ours.tid, ours.comm.decode())
        assert (local, int(local_port)) == ("10.77.0.1", ours.local_port)
        assert (remote, int(remote_port)) == ("10.77.0.2", ours.remote_port)
        assert abs(float(ms) * MS - ours.wait_ns) <= 20 * MS  # each reads the clock in its own program
