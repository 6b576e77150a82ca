"""The hand-made TCP peer of support.tun against this machine's kernel."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from support.tun import (
    PEER_IPV4,
    Conversation,
    Family,
    TunPeer,
    _flag_bits,
    expected,
    tcp_info_bytes_received,
    tcp_info_data_segs_in,
)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun"), reason="needs root and /dev/net/tun"
)
FAMILIES: list[Family] = ["ipv4", "ipv6", "mapped"]


@pytest.fixture
def peer() -> Iterator[TunPeer]:
    with TunPeer() as it:
        yield it


def receive(sock: socket.socket, length: int) -> bytes:
    """Reads exactly `length` bytes that must be there already, then nothing."""
    sock.setblocking(False)
    data = b""
    while len(data) < length:
        data += sock.recv(length - len(data))
    with pytest.raises(BlockingIOError):
        sock.recv(1)
    return data


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("role", ["accept", "connect"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_order(peer: TunPeer, family: Family, role: str, timestamps: bool) -> None:
    conversation: Conversation = getattr(peer, role)(family, timestamps=timestamps)
    assert conversation.timestamps == timestamps
    assert (conversation.last_ack, conversation.next_offset) == (0, 0) and conversation.window > 10_000
    address = conversation.socket.getpeername()
    assert address[0] == {"ipv4": PEER_IPV4, "ipv6": "fd77::2", "mapped": f"::ffff:{PEER_IPV4}"}[family]
    assert address[1] == conversation.peer_port and conversation.socket.getsockname()[1] == conversation.local_port
    for count, length in enumerate((1, 1000, 1460, 777), 1):
        conversation.send(length)
        assert tcp_info_data_segs_in(conversation.socket) == count  # at once: write() is synchronous
    assert tcp_info_bytes_received(conversation.socket) == 3238
    conversation.wait_acked(3238)
    assert receive(conversation.socket, 3238) == expected(0, 3238)


@pytest.mark.parametrize("isn", [0, 0xFFFFFFFF, 0xFFFFFFFF - 150, 0x7FFFFFFF - 150])
def test_gap_then_fill(peer: TunPeer, isn: int) -> None:
    conversation = peer.accept(isn=isn)
    conversation.send(100, at=100)
    conversation.send(100, at=300)
    assert (conversation.next_offset, conversation.last_ack) == (0, 0)
    receive(conversation.socket, 0)
    conversation.send(100)
    assert (conversation.next_offset, conversation.last_ack) == (100, 200)  # filling a gap is acknowledged at once
    conversation.send(100, at=200)
    assert (conversation.next_offset, conversation.last_ack) == (100, 400)
    assert receive(conversation.socket, 400) == expected(0, 400)


def test_duplicate_and_overlap(peer: TunPeer) -> None:
    conversation = peer.accept()
    conversation.send(200)
    conversation.send(200, at=0)
    assert tcp_info_data_segs_in(conversation.socket) == 2 and tcp_info_bytes_received(conversation.socket) == 200
    assert conversation.last_ack == 200  # a duplicate is acknowledged at once
    conversation.send(200, at=100)
    assert conversation.next_offset == 300
    conversation.send(b"x" * 350, at=0)  # the kernel keeps what it has
    assert conversation.next_offset == 350
    conversation.wait_acked(350)
    assert receive(conversation.socket, 350) == expected(0, 300) + b"x" * 50
    assert tcp_info_data_segs_in(conversation.socket) == 4


def test_wrap_around(peer: TunPeer) -> None:
    conversation = peer.accept(isn=0xFFFFFFFF - 1000)
    conversation.send_many([300] * 10)
    conversation.wait_acked(3000)
    conversation.send(b"tail")
    conversation.wait_acked(3004)
    assert receive(conversation.socket, 3004) == expected(0, 3000) + b"tail"


def test_beyond_window(peer: TunPeer) -> None:
    conversation = peer.accept(rcvbuf=8192)
    window = conversation.window
    assert 0 < window <= 16384
    conversation.send(100, at=window + 1)
    assert tcp_info_data_segs_in(conversation.socket) == 1 and conversation.last_ack == 0
    conversation.send(100)
    conversation.wait_acked(100)
    conversation.send_many([100] * (window // 100), at=100)
    receive(conversation.socket, tcp_info_bytes_received(conversation.socket))
    with pytest.raises(TimeoutError, match="waiting for an ACK of 1000000"):
        conversation.wait_acked(1_000_000, timeout_s=0.05)


def test_fin_and_data_of_the_socket(peer: TunPeer) -> None:
    conversation = peer.connect()
    sent = os.urandom(300_000)
    conversation.socket.sendall(sent)
    deadline = time.monotonic() + 5
    while len(conversation.received) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert conversation.received == sent
    conversation.send(10)
    conversation.fin()
    conversation.wait_acked(11)
    assert conversation.socket.recv(100) == expected(0, 10) and conversation.socket.recv(1) == b""
    conversation.socket.close()
    assert conversation.got_fin and not conversation.reset


def test_fin_before_the_data(peer: TunPeer) -> None:
    conversation = peer.accept()
    conversation.fin(at=10)
    assert conversation.last_ack == 0
    conversation.send(10)
    assert conversation.last_ack == 11
    assert conversation.socket.recv(100) == expected(0, 10) and conversation.socket.recv(1) == b""


@pytest.mark.parametrize("length", [0, 1, 500])
def test_rst(peer: TunPeer, length: int) -> None:
    conversation = peer.accept()
    conversation.send(length)
    conversation.rst()
    assert conversation.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 104


def test_reset_by_the_kernel(peer: TunPeer) -> None:
    conversation = peer.accept()
    conversation.send(10)
    conversation.socket.close()  # with unread data
    assert conversation.reset
    with pytest.raises(ConnectionResetError):
        conversation.wait_acked(20)


def test_fields(peer: TunPeer) -> None:
    conversation = peer.accept()
    conversation.send(10, chksum=1)
    assert tcp_info_data_segs_in(conversation.socket) == 0
    conversation.send(10, at=0, seq=conversation.isn + 1, options=[("NOP", None)] * 4)
    assert receive(conversation.socket, 10) == expected(0, 10)
    with pytest.raises(ValueError):
        conversation.send(65_536)


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_packets_equal_scapys(
    peer: TunPeer, family: Family, timestamps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = peer.accept(family, isn=0xFFFF0000, timestamps=timestamps)
    monkeypatch.setattr(time, "monotonic", lambda: 123456.789)
    for offset, length in itertools.product((0, 1, 65535, 10**10), (0, 1, 2, 1459, 1460, 65000)):
        for flags in ("A", "PA", "FPA", "FRPAUEC"):
            payload, bits = expected(offset, length), _flag_bits(flags)
            assert conversation._patch(offset, bits, payload) == conversation._build(offset, bits, payload, {})


def test_backlog_of_a_reader_in_another_thread(peer: TunPeer) -> None:
    conversation = peer.accept()
    data = bytearray()

    def read() -> None:
        while block := conversation.socket.recv(1 << 20):
            data.extend(block)

    reader = threading.Thread(target=read)
    reader.start()
    for count in range(1, 5001):
        conversation.send_many([100], within_window=True)  # the reader may be slow
        if count % 100 == 0:
            conversation.settle()
            assert tcp_info_data_segs_in(conversation.socket) == count
            assert tcp_info_bytes_received(conversation.socket) == 100 * count
    conversation.fin()
    reader.join(5)
    assert data == expected(0, 500_000)


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_100k_segments(peer: TunPeer, family: Family) -> None:
    conversation = peer.accept(family, isn=0xFFFFFFFF - 1_000_000)
    total = 0

    def read() -> None:
        nonlocal total
        while block := conversation.socket.recv(1 << 18):
            assert block == expected(total, len(block))
            total += len(block)

    reader = threading.Thread(target=read)
    reader.start()
    began = time.monotonic()
    conversation.send_many([100] * 100_000, within_window=True)
    duration = time.monotonic() - began
    conversation.wait_acked(10_000_000)
    assert tcp_info_data_segs_in(conversation.socket) == 100_000
    conversation.fin()
    reader.join(5)
    assert total == 10_000_000
    print(f"100,000 segments: {duration:.2f} s")
    assert duration < 100  # 2 s, but 40 s on emulated processors


def test_send_many_with_offsets(peer: TunPeer) -> None:
    conversation = peer.accept()
    conversation.send_many([100] * 50, at=range(4900, -100, -100))
    assert conversation.last_ack == 5000
    assert receive(conversation.socket, 5000) == expected(0, 5000)
    with pytest.raises(ValueError):
        conversation.send_many([1, 2], at=[0])
    with pytest.raises(TimeoutError):
        conversation.send_many([10_000_000], within_window=True, timeout_s=0.05)


def test_nothing_remains() -> None:
    before = os.listdir("/proc/self/fd"), os.readlink("/proc/thread-self/ns/net"), threading.active_count()
    sockets = []
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), TunPeer() as peer, TunPeer() as other:
            assert peer.inside(lambda: os.readlink("/proc/thread-self/ns/net")) != before[1]
            sockets += [peer.accept("ipv6").socket, other.connect().socket]
            peer.accept().socket.close()
            _ = 1 / 0
    assert (os.listdir("/proc/self/fd"), os.readlink("/proc/thread-self/ns/net"), threading.active_count()) == before
    assert all(sock.fileno() == -1 for sock in sockets)


def test_a_blocked_reader_is_ended() -> None:
    with TunPeer() as peer:
        sock = peer.accept().socket

        def read() -> None:
            with contextlib.suppress(ConnectionResetError):
                sock.recv(1)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        time.sleep(0.05)
    reader.join(5)
    assert not reader.is_alive()


def test_sysctl_and_two_on_one_port(peer: TunPeer) -> None:
    with open("/proc/sys/net/ipv4/tcp_rmem") as file:
        before = file.read()
    peer.sysctl("net.ipv4.tcp_rmem", "4096 16384 16384")
    first = peer.accept(local_port=8080)
    second = peer.accept(local_port=8080)
    assert first.local_port == second.local_port == 8080 and first.window <= 16384
    assert peer.conversations == (first, second)
    with open("/proc/sys/net/ipv4/tcp_rmem") as file:
        assert file.read() == before


def test_import_is_quiet() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; import support.tun"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
