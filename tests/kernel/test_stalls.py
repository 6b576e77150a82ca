"""Readers that stall, then take much at once: exact as long as the pool lasts, and counted beyond."""

from __future__ import annotations

import time

import pytest

from kernel.traced import Load, Traced, accept, eventually, large_pipe, queued, read_all, splice
from support.tun import Conversation, TunPeer, tcp_info_bytes_received, tcp_info_data_segs_in

ALTERNATING = [1 + index % 2 for index in range(1500)]


def stalled(peer: TunPeer, lengths: list[int]) -> Conversation:
    """A connection with so many segments unread."""
    peer.sysctl("net.ipv4.tcp_rmem", "4096 500000000 500000000")
    conversation = accept(peer)
    conversation.send_many(lengths)
    assert tcp_info_bytes_received(conversation.socket) == sum(lengths)
    assert tcp_info_data_segs_in(conversation.socket) == len(lengths)
    return conversation


@pytest.mark.parametrize("in_one_call", [False, True])
@pytest.mark.parametrize("count", [9, 64, 5_000, 100_000])
def test_exact_however_many_wait(traced: Traced, peer: TunPeer, count: int, in_one_call: bool) -> None:
    conversation = stalled(peer, [1] * count)
    assert queued(traced.books) == count
    if in_one_call:
        with large_pipe() as pipe:
            assert splice(conversation.socket, pipe) == count
    else:
        assert read_all(conversation.socket, 4096) == count
    assert traced.books == {"received": count, "observed": count}
    assert traced.waits().count == count
    conversation.send(10)  # and goes on as before
    assert read_all(conversation.socket) == 10
    assert traced.books == {"received": count + 1, "observed": count + 1}


def test_exact_without_a_slot_of_its_own(load: Load, peer: TunPeer) -> None:
    """The typed flavour has the socket's state in its own storage then, the raw one perhaps in another slot."""
    traced = load(max_sockets=1 if load.flavour == "typed" else 2)
    accept(peer).send(1)
    count = 100_000
    conversation = stalled(peer, [1] * count)
    with large_pipe() as pipe:
        assert splice(conversation.socket, pipe) == count
    assert traced.books == {"received": count + 1, "observed": count}
    assert traced.waits().count == count


@pytest.mark.parametrize("peek", [False, True])
def test_parts_of_a_long_queue(traced: Traced, peer: TunPeer, peek: bool) -> None:
    lengths = [10] * 3000
    conversation = stalled(peer, lengths)
    read = 0
    for size in (5, 1, 4, 1, 700, 13, 9000, 3, 6_400, 6_401, 7_472):
        data = conversation.socket.recv(size)
        read += len(data)
        assert traced.books.get("observed", 0) == read // 10
    assert read == 30_000
    assert traced.books == {"received": 3000, "observed": 3000}


def test_written_while_it_is_drained(traced: Traced, peer: TunPeer) -> None:
    """The queue's head and tail move round many chunks; never empty, never back in the socket's own ring."""
    peer.sysctl("net.ipv4.tcp_rmem", "4096 500000000 500000000")
    conversation = accept(peer)
    conversation.send_many([3] * 200)
    for _ in range(40):
        conversation.send_many([3] * 100)
        assert conversation.socket.recv(300)
    books = traced.books
    assert books["received"] == 4200 and queued(books) == 200
    assert read_all(conversation.socket) == 600
    assert traced.books == {"received": 4200, "observed": 4200}


@pytest.mark.parametrize("in_one_call", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_long_gap_closes(traced: Traced, peer: TunPeer, reverse: bool, in_one_call: bool) -> None:
    """1,500 runs behind a gap become readable at once; the next hook is a reader that takes them all."""
    starts = [sum(ALTERNATING[:index]) for index in range(len(ALTERNATING))]
    order = range(1499, -1, -1) if reverse else [*range(1, 1500), 0]
    conversation = accept(peer, rcvbuf=1 << 22)
    conversation.send_many([ALTERNATING[index] for index in order], at=[starts[index] for index in order])
    assert queued(traced.books) == 1500
    if in_one_call:
        with large_pipe() as pipe:
            assert splice(conversation.socket, pipe) == 2250
    else:
        assert read_all(conversation.socket) == 2250
    assert traced.books == {"received": 1500, "observed": 1500}


@pytest.mark.parametrize("how", ["in order", "reverse", "middle out"])
def test_a_segment_after_a_long_gap_has_closed(traced: Traced, peer: TunPeer, how: str) -> None:
    """The next hook is the next arrival, and all that became readable goes before it."""
    starts = [sum(ALTERNATING[:index]) for index in range(len(ALTERNATING))]
    order = {
        "in order": list(range(1, 1500)),
        "reverse": list(range(1499, 0, -1)),
        "middle out": [750 + (-1) ** index * ((index + 1) // 2) for index in range(1499)],
    }[how]
    assert sorted(order) == list(range(1, 1500))
    conversation = accept(peer, rcvbuf=1 << 22)
    conversation.send_many([ALTERNATING[index] for index in order], at=[starts[index] for index in order])
    conversation.send(1, at=0)
    assert tcp_info_bytes_received(conversation.socket) == 2250
    conversation.send(5, at=2250)
    assert queued(traced.books) == 1501
    assert conversation.socket.recv(2250)
    assert traced.books == {"received": 1501, "observed": 1500}
    assert read_all(conversation.socket) == 5
    assert traced.books == {"received": 1501, "observed": 1501}


def test_more_runs_behind_a_gap_than_a_socket_may_hold(traced: Traced, peer: TunPeer) -> None:
    """What the books cannot describe they count: as untracked segments, and as bytes when they are read."""
    count = 5000
    lengths = [1 + index % 2 for index in range(count)]
    peer.sysctl("net.ipv4.tcp_rmem", "4096 500000000 500000000")
    conversation = accept(peer)
    conversation.send_many(lengths[1:], at=1)
    conversation.send(1, at=0)
    assert read_all(conversation.socket) == sum(lengths)
    books = traced.books
    assert books["received"] == count == books["observed"] + books["untracked_pool"]
    assert books["observed"] >= 1900 and queued(books) == 0
    undescribed = books["undescribed_bytes"]
    assert undescribed == sum(lengths[-books["untracked_pool"] :])


def test_holes_between_runs_are_counted(traced: Traced, load: Load, peer: TunPeer) -> None:
    """Behind a gap, too: what came before the agent is undescribed, what came after is observed."""
    conversation = accept(peer)
    conversation.send(100, at=100)
    conversation.send(100, at=300)
    with load.once() as late:
        conversation.send(70, at=230)
        conversation.send(30, at=400)
        conversation.send(30, at=200)
        conversation.send(100, at=0)
        assert read_all(conversation.socket) == 430
        assert late.books == {"received": 4, "observed": 4, "undescribed_bytes": 200}
    assert traced.books == {"received": 6, "observed": 6}


def test_beyond_the_pool(load: Load, peer: TunPeer) -> None:
    """Merged and counted, and still each is observed; then the pool is whole again."""
    traced = load(max_chunks=4)
    for _ in range(3):
        conversation = stalled(peer, [10] * 1000)
        books = traced.books
        assert queued(books) == 1000 and books["merged"] == 1000 - 8 - 4 * 64
        assert conversation.socket.recv(2000)
        assert traced.books["observed"] == 200
        conversation.send(10)
        assert read_all(conversation.socket) == 8010
        books = traced.books
        assert books["received"] == books["observed"] == 1001 and "undescribed_bytes" not in books
        assert traced.waits().count == 1001
        traced.begin()


def test_a_pool_that_others_have_emptied(load: Load, peer: TunPeer) -> None:
    """A socket that gets no chunk merges into its own few entries; gaps need a chunk each."""
    traced = load(max_chunks=4)
    greedy = stalled(peer, [10] * (8 + 4 * 64))
    traced.begin()
    conversation = accept(peer)
    conversation.send_many([10] * 30)
    assert traced.books == {"received": 30, "merged": 22}
    assert conversation.socket.recv(100)  # the ninth and tenth have merged with the eighth
    assert 7 <= traced.books["observed"] <= 10
    assert read_all(conversation.socket) == 200
    assert traced.books == {"received": 30, "merged": 22, "observed": 30}
    conversation.send(10, at=310)
    conversation.send(10, at=300)
    assert read_all(conversation.socket) == 20
    assert traced.books == {
        "received": 32, "merged": 22, "observed": 31, "untracked_pool": 1, "undescribed_bytes": 10,
    }  # fmt: skip
    traced.begin()
    assert read_all(greedy.socket) == 2640
    assert traced.books == {"observed": 264}
    traced.begin()
    conversation.send_many([10] * 30, at=320)
    assert read_all(conversation.socket) == 300
    assert traced.books == {"received": 30, "observed": 30}


def test_no_wait_is_made_up_where_nothing_is_described(load: Load, peer: TunPeer) -> None:
    """With an empty pool a segment merges into what nobody saw arrive: its wait is its own."""
    conversation = accept(peer)
    conversation.send(100)
    with load.once(max_chunks=1) as traced:
        greedy = stalled(peer, [10] * (8 + 64))
        traced.begin()
        began = time.monotonic_ns()
        conversation.send(7, at=107)
        conversation.send_many([10] * 20, at=[100] + [120 + 10 * index for index in range(19)])
        conversation.send_many([10] * 25, at=310)
        read_all(conversation.socket)
        ended = time.monotonic_ns()
        found = traced.waits()
        assert found.sum_ns <= found.count * (ended - began)
        assert greedy.socket.fileno() >= 0


def test_chunks_come_back(load: Load, peer: TunPeer) -> None:
    """Whatever a socket's end, its chunks return: the pool has room for one of these at a time."""
    traced = load(max_chunks=4)
    for index in range(12):
        conversation = accept(peer)
        if index % 3 == 0:
            conversation.send_many([10] * (8 + 4 * 64))
        elif index % 3 == 1:
            conversation.send_many([10 + at % 2 for at in range(4 * 64)], at=1000)
        else:
            conversation.send_many([10] * (8 + 2 * 64))
            conversation.send_many([10 + at % 2 for at in range(2 * 64)], at=5000)
        if index % 2:
            assert read_all(conversation.socket, 10) % 10 == 0
        conversation.socket.close()
        conversation.rst()
        closed = index + 1
        eventually(lambda closed=closed: traced.life.get("sockets_closed") == closed, "a destroyed socket")  # type: ignore[misc]
    books = traced.books
    assert queued(books) == 0 and not books.keys() & {"merged", "untracked_pool"}


def test_drops_behind_a_stall_take_no_memory(load: Load, peer: TunPeer) -> None:
    """A sender that keeps trying a full window: each try is dropped, and none of them stays in the pool."""
    traced = load(max_chunks=4)
    conversation = accept(peer, rcvbuf=1 << 16)
    conversation.send_many([10] * 150)
    for _ in range(500):
        conversation.send(100, at=1500, chksum=1)
    assert queued(traced.books) == 151
    conversation.send_many([10] * 100, at=1500)
    assert read_all(conversation.socket) == 2500
    assert traced.books == {"received": 750, "observed": 250, "dropped": 500}
