"""Do the programs load on this kernel, and count right? Prints one line per flavour; exit status 0 if so.

    tests/support/run_on_kernel.py 5.10 -- /usr/bin/python3 tests/kernel/on_kernel.py raw
    tests/support/run_on_kernel.py 7.x -- /usr/bin/python3 tests/kernel/on_kernel.py typed raw

Standard library only: it runs under the distribution's Python, over the loopback interface.
"""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import sys
import time

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

from otel_tcppktlat import privileges  # noqa: E402
from otel_tcppktlat.probe.probe import Probe, ProbeOptions  # noqa: E402
from support.kernels import flavours  # noqa: E402

PORT = 47718
BOUNDS_NS = tuple(digit * 10**power for power in range(3, 10) for digit in (1, 2, 5)) + (10**10,)


def data_segments(sock: socket.socket) -> int:
    """What TCP itself counts."""
    segments: int = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232), 152)[0]
    return segments


def connected() -> tuple[socket.socket, socket.socket]:
    """A client and what accept() returned for it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        client = socket.create_connection(("127.0.0.1", PORT))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, listener.accept()[0]


def send(client: socket.socket, server: socket.socket, count: int) -> None:
    """Sends so many segments, each of which has arrived before the next goes."""
    for _ in range(count):
        before = data_segments(server)
        client.sendall(bytes(10))
        while data_segments(server) == before:
            time.sleep(0.0001)


def check_unprivileged(probe: Probe) -> None:
    """A child without privilege reads all that the agent reads; only before 5.19 it keeps a capability, CAP_BPF."""
    child = os.fork()
    if not child:
        status = 1
        try:
            kept = privileges.drop(privileges.account("nobody"))
            probe.harvest()
            probe.statistics()
            lines = pathlib.Path("/proc/thread-self/status").read_text().splitlines()
            effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
            old = tuple(map(int, os.uname().release.split(".")[:2])) < (5, 19)
            assert os.getuid() == 65534 and kept == old
            assert effective == (1 << privileges.CAP_BPF if old else 0), hex(effective)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def check(flavour: str) -> None:
    """Loads the programs and sends some segments."""
    probe = Probe(ProbeOptions(BOUNDS_NS, flavour=flavour, lport=PORT, rows=True), rows.append)
    loaded = probe.open()
    began = time.monotonic_ns()
    client, server = connected()
    for _ in range(5):  # a healthy reader
        send(client, server, 1)
        time.sleep(0.01)
        assert len(server.recv(100)) == 10
    send(client, server, 300)  # a stalled one
    assert server.recv(25, socket.MSG_PEEK) and len(server.recv(25)) == 25
    assert probe.books()["observed"] == 7, probe.books()
    while len(server.recv(1000, socket.MSG_PEEK)) > 100:
        server.recv(100)
    harvest = probe.harvest()
    observed = probe.books()["observed"]
    assert sum(sum(delta.counts) for delta in harvest.deltas) == observed
    (delta,) = harvest.deltas
    assert (
        delta.series and delta.series.identity.executable == os.path.basename(os.path.realpath(sys.executable)).encode()
    )
    assert 5 * 10_000_000 <= delta.sum_ns <= observed * (time.monotonic_ns() - began)
    grown = {bucket for bucket, count in enumerate(delta.counts) if count}
    assert {event.bucket for _, event in harvest.exemplars} == grown
    segments = data_segments(server)
    server.close()
    client.close()
    while not probe.books()["sockets_closed"]:
        time.sleep(0.001)
    books = {name: count for name, count in probe.books().items() if count}
    assert books.pop("sockets_opened") == books.pop("sockets_closed") == 1
    assert books == {"received": segments, "observed": observed, "unread": segments - observed}, (segments, books)
    assert sum(row.segments for row in rows) == observed
    assert all(fewer == 0 for _, _, fewer in probe.statistics().values())
    seconds = " ".join(f"{name} {time_s:.1f}" for name, time_s in loaded.seconds.items())
    print(f"{os.uname().release} {loaded.flavour}: {segments} segments ({seconds} s)", flush=True)
    rows.clear()
    check_unprivileged(probe)
    probe.close()


rows: list = []  # type: ignore[type-arg]

if __name__ == "__main__":
    for name in sys.argv[1:] or flavours():
        check(name)
