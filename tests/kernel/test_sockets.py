"""Lives of sockets: before the agent, half-closed, disconnected, destroyed, and those that cannot be followed."""

from __future__ import annotations

import os
import socket
import struct
import time

import pytest

from kernel.traced import (
    PORT,
    Load,
    Traced,
    accept,
    disconnect,
    eventually,
    large_pipe,
    queued,
    read_all,
    splice,
)
from support.tun import LOCAL_IPV4, PEER_IPV4, Conversation, TunPeer


def test_a_socket_older_than_the_agent(load: Load, peer: TunPeer) -> None:
    conversation = accept(peer)
    conversation.send(10)
    assert read_all(conversation.socket) == 10
    conversation.send(1000)
    conversation.send(50, at=1110)  # behind a gap
    with load.once() as traced:
        conversation.send(100)
        assert conversation.socket.recv(400) and traced.books == {"received": 1, "undescribed_bytes": 400}
        assert read_all(conversation.socket) == 750
        assert traced.books == {"received": 1, "observed": 1, "undescribed_bytes": 1050}
        assert traced.waits().count == 1


def test_a_socket_older_than_the_agent_that_gets_nothing_more(load: Load, peer: TunPeer) -> None:
    """What its first read takes, nobody knows; the rest is counted."""
    conversation = accept(peer)
    conversation.send(300)
    assert conversation.socket.recv(100)
    with load.once() as traced:
        assert conversation.socket.recv(50)
        assert read_all(conversation.socket) == 150 + 0
        assert traced.books == {"undescribed_bytes": 150}


@pytest.mark.parametrize("before", [0, 10])
def test_half_closed(traced: Traced, peer: TunPeer, before: int) -> None:
    """Data for a socket that has said FIN does not pass tcp_probe."""
    conversation = accept(peer)
    if before:
        conversation.send(before)
        assert read_all(conversation.socket) == before
    conversation.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: conversation.got_fin, "a FIN")
    for _ in range(3):
        conversation.send(500)
    conversation.fin()
    assert read_all(conversation.socket) == 1500
    expected = {"received": 1, "observed": 1} if before else {}
    assert traced.books == {**expected, "undescribed_bytes": 1500}


@pytest.mark.parametrize("with_data", [True, False])
def test_a_fin_is_not_a_byte(traced: Traced, peer: TunPeer, with_data: bool) -> None:
    conversation = accept(peer)
    for _ in range(3):
        conversation.send(100)
    conversation.send(100, flags="FPA") if with_data else conversation.fin()
    with large_pipe() as pipe:
        assert splice(conversation.socket, pipe) == 300 + 100 * with_data
    assert traced.books == {"received": 3 + with_data, "observed": 3 + with_data}


def close(conversation: Conversation) -> None:
    conversation.socket.close()


def abort(conversation: Conversation) -> None:
    conversation.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conversation.socket.close()


def reset_by_the_peer(conversation: Conversation) -> None:
    conversation.rst()
    conversation.socket.close()


@pytest.mark.parametrize("end", [close, abort, reset_by_the_peer])
@pytest.mark.parametrize("count", [2, 12, 300])
def test_destroyed_with_data_unread(traced: Traced, peer: TunPeer, count: int, end: object) -> None:
    conversation = accept(peer)
    for _ in range(count):
        conversation.send(20)
    assert conversation.socket.recv(30)
    for index in range(5):
        conversation.send(20, at=20 * count + 100 + 50 * index)
    assert queued(traced.books) == count + 4
    assert callable(end)
    end(conversation)
    eventually(lambda: traced.life.get("sockets_closed") == 1, "a destroyed socket")
    assert traced.books == {"received": count + 5, "observed": 1, "unread": count + 4}
    assert traced.life == {"sockets_opened": 1, "sockets_closed": 1}


def test_destroyed_after_a_drop(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer, rcvbuf=8192)
    conversation.send(100)
    conversation.send(100, at=conversation.window + 1000)
    conversation.socket.close()
    eventually(lambda: traced.life.get("sockets_closed") == 1, "a destroyed socket")
    assert traced.books == {"received": 2, "dropped": 1, "unread": 1}


def test_destroyed_after_a_drop_in_sequence(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    conversation.send(100)
    conversation.send(100, chksum=1)
    conversation.socket.close()
    eventually(lambda: traced.life.get("sockets_closed") == 1, "a destroyed socket")
    assert traced.books == {"received": 2, "dropped": 1, "unread": 1}


def connect(peer: TunPeer, sock: socket.socket, isn: int) -> Conversation:
    conversation = peer._converse("ipv4", isn, 1 << 20, 1460, False)
    conversation.socket = sock
    sock.connect((PEER_IPV4, conversation.peer_port))
    conversation._wait(lambda: conversation._acked == 0, "the handshake", 5)
    return conversation


@pytest.mark.parametrize("behind", [0, 3])
@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("isn", [5000, 2_000_000_000, 4_000_000_000])
def test_disconnected_and_connected_anew(
    traced: Traced, peer: TunPeer, isn: int, half_closed: bool, behind: int
) -> None:
    with peer.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        sock.bind((LOCAL_IPV4, PORT))
        first = connect(peer, sock, 1_000_000)
        for _ in range(20):
            first.send(100)
        for index in range(behind):
            first.send(10, at=3000 + 20 * index)
        assert sock.recv(500)
        disconnect(sock)
        second = connect(peer, sock, isn)
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
            eventually(lambda: second.got_fin, "a FIN")
        for _ in range(12):
            second.send(10)
        assert read_all(sock) == 120
        then = {"received": 20 + behind, "observed": 5, "unread": 15 + behind}
        if half_closed:
            assert traced.books == {**then, "undescribed_bytes": 120}
        else:
            assert traced.books == {**then, "received": 32 + behind, "observed": 17}


def test_many_connections(traced: Traced, peer: TunPeer) -> None:
    for _ in range(30):
        conversation = accept(peer)
        conversation.send(10)
        conversation.send(10)
        assert conversation.socket.recv(10)
        conversation.rst()
        conversation.socket.close()
    eventually(lambda: traced.life.get("sockets_closed") == 30, "destroyed sockets")
    assert traced.books == {"received": 60, "observed": 30, "unread": 30}
    assert traced.life == {"sockets_opened": 30, "sockets_closed": 30}


def test_a_socket_whose_slot_is_taken(load: Load, peer: TunPeer) -> None:
    """The typed flavour goes on in the socket's own storage, where all works as ever; the raw one has no place left."""
    slots = 1 if load.flavour == "typed" else 2  # of one slot, 7.x follows the raw flavour's programs for too long
    traced = load(max_sockets=slots)
    others, second = [accept(peer) for _ in range(slots)], accept(peer)
    for other in others:
        other.send(10)
    for _ in range(100):
        second.send(10)
    second.send(50, at=1100)  # behind a gap
    second.send(100)
    second.send(10, at=0)
    assert len(second.socket.recv(15)) == 15 and read_all(second.socket) == 1135
    opened, beside = slots, {"untracked_socket": 103}
    if load.flavour == "typed":
        opened, beside = slots + 1, {"observed": 102, "duplicate": 1}
    assert traced.books == {"received": 103 + slots, **beside} and traced.life == {"sockets_opened": opened}
    for other in others:
        assert read_all(other.socket) == 10
        other.socket.close()
        other.rst()
    second.socket.close()
    second.rst()
    eventually(lambda: traced.life.get("sockets_closed") == opened, "destroyed sockets")
    fresh = accept(peer)
    fresh.send(10)
    assert read_all(fresh.socket) == 10
    assert traced.books["observed"] == beside.get("observed", 0) + slots + 1


def test_more_sockets_than_the_array_holds(load: Load, peer: TunPeer) -> None:
    """The raw flavour's array is all it has: what that cannot hold is counted, and a place that becomes free, used."""
    traced = load(max_sockets=4)
    conversations = [accept(peer) for _ in range(12)]
    for conversation in conversations:
        conversation.send(10)
        assert read_all(conversation.socket) == 10
    books = traced.books
    assert books["received"] == 12 == books["observed"] + books.get("untracked_socket", 0)
    followed = 12 if load.flavour == "typed" else traced.life["sockets_opened"]
    assert books["observed"] == followed and 1 <= followed <= (12 if load.flavour == "typed" else 4)
    for conversation in conversations:
        conversation.socket.close()
        conversation.rst()
    eventually(lambda: traced.life["sockets_closed"] == followed, "destroyed sockets")
    fresh = accept(peer)
    fresh.send(10)
    assert read_all(fresh.socket) == 10
    assert traced.books["observed"] == followed + 1


@pytest.mark.skipif(not os.path.exists("/proc/sys/net/mptcp"), reason="this kernel has no MPTCP")
def test_mptcp_subflows_are_counted_as_untracked(traced: Traced, peer: TunPeer) -> None:
    ipproto_mptcp = 262
    kinds = (socket.AF_INET, socket.SOCK_STREAM, ipproto_mptcp)
    with peer.inside(lambda: socket.socket(*kinds)) as listener, peer.inside(lambda: socket.socket(*kinds)) as client:
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        client.connect(("127.0.0.1", PORT))
        server, _ = listener.accept()
        with server:
            for _ in range(5):
                client.sendall(bytes(100))
                assert server.recv(100, socket.MSG_WAITALL) == bytes(100)
    eventually(lambda: traced.books.get("received", 0) >= 5, "segments")
    books = traced.books
    assert books == {"received": books["received"], "untracked_mptcp": books["received"]}


def test_a_pipe_end_to_end(traced: Traced, peer: TunPeer) -> None:
    """Loopback: the kernel on both sides, real segments, real readers; TCP's own count is the truth."""
    with peer.inside(lambda: socket.socket()) as listener, peer.inside(lambda: socket.socket()) as client:
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        client.connect(("127.0.0.1", PORT))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, _ = listener.accept()
        with server:
            child = os.fork()
            if not child:
                for index in range(2000):
                    client.sendall(bytes(1 + index % 1000))
                    if index % 500 == 0:
                        time.sleep(0.01)
                os._exit(0)
            total = sum(1 + index % 1000 for index in range(2000))
            while total:
                total -= len(server.recv(min(total, 3000)))
            os.waitpid(child, 0)
            info = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            (segments,) = struct.unpack_from("=I", info, 152)
            books = traced.books
            assert books["received"] == books["observed"] + books.get("duplicate", 0)
            assert queued(books) == 0 and books["observed"] <= segments and "undescribed_bytes" not in books
