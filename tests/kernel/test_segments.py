"""What becomes of each segment: one observation for each that is read, and a reason for each other."""

from __future__ import annotations

import random
import socket
import time
from typing import Any

import pytest

from kernel.traced import Traced, accept, queued, read_all
from support.tun import Conversation, Family, TunPeer, expected, tcp_info_bytes_received, tcp_info_data_segs_in

FAMILIES: list[Family] = ["ipv4", "ipv6", "mapped"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_observation_for_each_segment(traced: Traced, peer: TunPeer, family: Family) -> None:
    conversation = accept(peer, family)
    for length in (1, 100, 1460, 60_000):
        conversation.send(length)
    assert traced.books == {"received": 4}
    assert read_all(conversation.socket) == 61_561
    assert traced.books == {"received": 4, "observed": 4}
    assert traced.waits().count == 4
    assert tcp_info_data_segs_in(conversation.socket) == 4


@pytest.mark.parametrize(("family", "shown", "local"), [
    ("ipv4", socket.AF_INET, bytes([10, 77, 0, 1])),
    ("ipv6", socket.AF_INET6, socket.inet_pton(socket.AF_INET6, "fd77::1")),
    ("mapped", socket.AF_INET, bytes([10, 77, 0, 1])),
])  # fmt: skip
def test_row_of_a_pickup(traced: Traced, peer: TunPeer, family: Family, shown: int, local: bytes) -> None:
    conversation = accept(peer, family)
    conversation.send(10)
    conversation.send(20)
    assert read_all(conversation.socket) == 30
    rows = traced.poll()
    assert sum(row.segments for row in rows) == 2 and sum(row.bytes for row in rows) == 30
    row = rows[0]
    assert (row.local_port, row.remote_port, row.family) == (conversation.local_port, conversation.peer_port, shown)
    length = len(local)
    remote = local[:-1] + b"\2"
    assert bytes(row.local_address)[:length] == local and not any(row.local_address[length:])
    assert bytes(row.remote_address)[:length] == remote and not any(row.remote_address[length:])
    (delta,) = traced.harvest().deltas
    assert delta.series is not None
    assert (delta.series.key.family, delta.series.key.port, delta.series.key.role) == (
        shown,
        conversation.local_port,
        0,
    )


@pytest.mark.parametrize("kind", ["accept", "connect"])
def test_role(traced: Traced, peer: TunPeer, kind: str, load: Any) -> None:
    clients = traced if kind == "accept" else load(lport=None, rport=40001)
    conversation = accept(peer) if kind == "accept" else peer.connect()
    assert conversation.peer_port == 40001
    conversation.send(10)
    assert read_all(conversation.socket) == 10
    (delta,) = clients.harvest().deltas
    assert delta.series is not None
    service = conversation.local_port if kind == "accept" else conversation.peer_port
    assert (delta.series.key.role, delta.series.key.port) == (int(kind == "connect"), service)


def test_partial_reads_complete_what_they_cover(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    for _ in range(3):
        conversation.send(100)
    observed = []
    for length in (99, 1, 50, 100, 49, 1):
        assert len(conversation.socket.recv(length)) == length
        observed.append(traced.books.get("observed", 0))
    assert observed == [0, 1, 1, 2, 2, 3]
    assert traced.books == {"received": 3, "observed": 3}


def test_a_peek_completes_nothing(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    for _ in range(12):  # more than sit with the socket
        conversation.send(10)
        for length in (5, 10, 1000):
            conversation.socket.recv(length, socket.MSG_PEEK)
    assert traced.books == {"received": 12}
    assert read_all(conversation.socket) == 120
    assert traced.books == {"received": 12, "observed": 12}


def fill(conversation: Conversation, lengths: list[int], order: list[int]) -> list[int]:
    """Sends segments of these lengths in this order; returns where each starts."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    conversation.send_many([lengths[index] for index in order], at=[starts[index] for index in order])
    return starts


def check_gap(traced: Traced, conversation: Conversation, lengths: list[int], order: list[int]) -> None:
    """Sends in this order, whose last segment makes everything readable; each is then one observation."""
    fill(conversation, lengths, order[:-1])
    count, length = len(lengths), sum(lengths)
    assert queued(traced.books) == count - 1
    closed_after = time.monotonic_ns()
    fill(conversation, lengths, order[-1:]) if order[-1] else conversation.send(lengths[0], at=0)
    assert tcp_info_data_segs_in(conversation.socket) == count
    time.sleep(0.02)
    began = time.monotonic_ns()
    assert conversation.socket.recv(length, socket.MSG_WAITALL) == expected(0, length)
    ended = time.monotonic_ns()
    assert traced.books == {"received": count, "observed": count}
    found = traced.waits()
    assert found.count == count
    if order[-1] == 0:  # nothing could be read before: all waited since then
        assert 20_000_000 * count <= found.sum_ns <= (ended - closed_after) * count
        assert began - closed_after >= 20_000_000


ALTERNATING = [10 + index % 2 for index in range(1500)]


@pytest.mark.parametrize("how", ["in order", "reverse", "from the middle", "random", "odd ones first"])
@pytest.mark.parametrize("lengths", [[100, 100], [7] * 1500, ALTERNATING], ids=["two", "equal", "alternating"])
def test_behind_a_gap(traced: Traced, peer: TunPeer, lengths: list[int], how: str) -> None:
    behind = list(range(1, len(lengths)))
    middle = len(behind) // 2
    order = {
        "in order": behind,
        "reverse": behind[::-1],
        "from the middle": behind[middle:] + behind[:middle],
        "random": random.Random(1).sample(behind, len(behind)),
        "odd ones first": behind[::2] + behind[1::2],
    }[how]
    check_gap(traced, accept(peer, rcvbuf=1 << 22), lengths, order + [0])


def test_several_gaps_closed_one_by_one(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    for start in (100, 300, 500):
        conversation.send(100, at=start)
    readable = []
    for start in (0, 200, 400):
        conversation.send(100, at=start)
        readable.append(read_all(conversation.socket))
    assert readable == [200, 200, 200]
    assert traced.books == {"received": 6, "observed": 6}


def test_gap_filled_from_its_far_end(traced: Traced, peer: TunPeer) -> None:
    check_gap(traced, accept(peer), [100] * 10, [9, 5, 8, 7, 6, 4, 3, 2, 1, 0])


def test_a_read_before_the_gap_closes(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    conversation.send(100)
    conversation.send(50, at=200)
    assert read_all(conversation.socket) == 100
    assert traced.books == {"received": 2, "observed": 1}
    conversation.send(100, at=100)
    assert conversation.socket.recv(120) == expected(100, 120)
    assert traced.books == {"received": 3, "observed": 2}
    assert read_all(conversation.socket) == 30
    assert traced.books == {"received": 3, "observed": 3}


def test_duplicates(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    conversation.send(100)
    conversation.send(100, at=0)  # unread yet
    conversation.send(40, at=30)
    assert read_all(conversation.socket) == 100
    conversation.send(100, at=0)  # read
    conversation.send(100, at=200)
    conversation.send(100, at=200)  # both behind a gap
    conversation.send(50, at=250)
    conversation.send(100, at=100)
    assert read_all(conversation.socket) == 200
    conversation.send(100, at=200)
    assert traced.books == {"received": 9, "observed": 3, "duplicate": 6}


def test_overlaps(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    conversation.send(100)
    conversation.send(100, at=50)  # half of it is new
    assert traced.books == {"received": 2}
    conversation.send(100, at=250)
    conversation.send(100, at=300)  # overlaps the one before
    conversation.send(50, at=200)
    conversation.send(60, at=145)  # closes the gap and overlaps on both sides
    assert read_all(conversation.socket) == 400
    assert traced.books == {"received": 6, "observed": 6}
    conversation.send(10, at=420)
    conversation.send(60, at=400)  # holds the one before
    assert read_all(conversation.socket) == 60
    assert traced.books == {"received": 8, "observed": 7, "duplicate": 1}


@pytest.mark.parametrize("isn", [0xFFFFFFFF - 500, 0x7FFFFFFF - 500, 0xFFFFFFFF, 0])
def test_sequence_numbers_wrap(traced: Traced, peer: TunPeer, isn: int) -> None:
    conversation = accept(peer, isn=isn)
    fill(conversation, [100] * 20, [0, 2, 1, 1, 6, 3, 5, 4, *range(7, 20)])
    assert conversation.socket.recv(150) == expected(0, 150)
    assert read_all(conversation.socket) == 1850
    assert traced.books == {"received": 21, "observed": 20, "duplicate": 1}


def test_dropped_beyond_the_window(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer, rcvbuf=8192)
    window = conversation.window
    for _ in range(5):  # several in a row
        conversation.send(100, at=window + 1000)
    conversation.send(10)
    assert traced.books == {"received": 6, "dropped": 5}
    assert read_all(conversation.socket) == 10
    assert traced.books == {"received": 6, "dropped": 5, "observed": 1}


def test_dropped_for_want_of_memory(traced: Traced, peer: TunPeer) -> None:
    """A small buffer full of tiny segments: the stack drops the next one, and takes it when it comes again.

    From Linux 6.18 on some kernels find the memory on a later try, though nothing was read: its own count decides.
    """
    conversation = accept(peer, rcvbuf=4096)
    sent = 0
    while tcp_info_bytes_received(conversation.socket) == sent:
        conversation.send(200)
        sent += 200
        assert sent < 1_000_000
    taken, dropped, duplicate = sent - 200, 1, 0
    for _ in range(6):
        conversation.send(200, at=sent - 200)
        now = tcp_info_bytes_received(conversation.socket)
        duplicate += taken == sent
        dropped += now == taken < sent
        taken = now
    unknown = int(taken < sent)  # the last one's fate shows at the next hook
    assert queued(traced.books) == taken // 200 + unknown
    assert traced.books["dropped"] == dropped - unknown
    assert read_all(conversation.socket) == taken
    conversation.send(200, at=sent - 200)
    duplicate += not unknown
    assert read_all(conversation.socket) == 200 * unknown
    expected_books = {"received": sent // 200 + 7, "dropped": dropped, "duplicate": duplicate, "observed": sent // 200}
    assert traced.books == {name: count for name, count in expected_books.items() if count}


def test_dropped_behind_a_gap(traced: Traced, peer: TunPeer) -> None:
    """What waits behind a gap is thrown away again when data in sequence needs the memory; it comes again."""
    conversation = accept(peer, rcvbuf=4096)
    before = traced.books
    assert before == {}
    length, count = 200, 0
    while tcp_info_data_segs_in(conversation.socket) < 60:
        conversation.send(length, at=200 + count * length)
        count += 1
    for at in range(0, 200, 50):
        conversation.send(50, at=at)
    read = read_all(conversation.socket)
    while read < (count + 1) * 200:
        conversation.send(length, at=read)
        got = read_all(conversation.socket)
        assert got
        read += got
    books = traced.books
    assert queued(books) == 0 and books["observed"] + books["dropped"] + books.get("duplicate", 0) == books["received"]
    assert books["observed"] >= 4 and "undescribed_bytes" not in books


@pytest.mark.parametrize("at", [100, 300])
def test_dropped_for_an_old_timestamp(traced: Traced, peer: TunPeer, at: int) -> None:
    """PAWS: the segment has an older timestamp than the last one in sequence; behind a gap, too."""
    conversation = accept(peer, timestamps=True)
    conversation.send(100)
    old = (int(time.monotonic() * 1000) - 100_000) & 0xFFFFFFFF
    for _ in range(3):
        conversation.send(100, at=at, options=[("NOP", None), ("NOP", None), ("Timestamp", (old, 0))])
    assert read_all(conversation.socket) == 100
    conversation.send(100, at=100)
    assert read_all(conversation.socket) == 100
    assert traced.books == {"received": 5, "observed": 2, "dropped": 3}


def test_dropped_for_its_checksum(traced: Traced, peer: TunPeer) -> None:
    """TCP finds it out after tcp_probe; the next segment is then behind a gap."""
    conversation = accept(peer)
    conversation.send(100, chksum=1)
    conversation.send(100, at=100)
    assert traced.books == {"received": 2, "dropped": 1}
    conversation.send(100, at=0)
    assert read_all(conversation.socket) == 200
    assert traced.books == {"received": 3, "dropped": 1, "observed": 2}


def test_bare_acks_and_fins_are_no_segments(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    conversation.ack()
    conversation.send(10, flags="FPA")
    assert read_all(conversation.socket) == 10
    assert traced.books == {"received": 1, "observed": 1}
    assert traced.poll()[0].bytes == 10
