"""Do the programs load on this kernel, and count right? May a plain user start the agent? Prints a line for each.

    tests/support/run_on_kernel.py 5.10 -- /usr/bin/python3 tests/kernel/on_kernel.py raw
    tests/support/run_on_kernel.py 7.x -- /usr/bin/python3 tests/kernel/on_kernel.py typed raw

Standard library only: it runs under the distribution's Python, over the loopback interface.
"""

from __future__ import annotations

import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import time

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[1:3])

from otel_tcppktlat import privileges  # noqa: E402
from otel_tcppktlat.probe.probe import Probe, ProbeOptions  # noqa: E402
from support.installed import install, open_folder  # noqa: E402
from support.kernels import flavours, kernel_version  # noqa: E402

PORT = 17718  # below those that connect() chooses
BOUNDS_NS = tuple(digit * 10**power for power in range(3, 10) for digit in (1, 2, 5)) + (10**10,)


def data_segments(sock: socket.socket) -> int:
    """What TCP itself counts."""
    segments: int = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232), 152)[0]
    return segments


def retransmitted(sender: socket.socket) -> int:
    """What the sender sent again: in a slow guest an acknowledgement may come too late for it (tcpi_total_retrans)."""
    info = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[100:104], sys.byteorder)


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
            probe.serve(1, 0)
            assert probe.served() == {1: 0}
            lines = pathlib.Path("/proc/thread-self/status").read_text().splitlines()
            effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
            old = kernel_version() < (5, 19)
            assert os.getuid() == 65534 and kept == old
            assert effective == (1 << privileges.CAP_BPF if old else 0), hex(effective)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def check(flavour: str) -> None:
    """Loads the programs and sends some segments."""
    options = ProbeOptions(BOUNDS_NS, flavour=flavour, lport=PORT, rows=True, serve=16)
    probe = Probe(options, rows.append, served.append)
    loaded = probe.open()
    began = time.monotonic_ns()
    client, server = connected()
    probe.serve(os.getpid(), 5_000_000)
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
    segments, again = data_segments(server), retransmitted(client)
    server.close()
    client.close()
    while not probe.books()["sockets_closed"]:
        time.sleep(0.001)
    books = {name: count for name, count in probe.books().items() if count}
    assert books.pop("sockets_opened") == books.pop("sockets_closed") == 1
    assert books.pop("duplicate", 0) == again  # nothing is lost on loopback
    unread = segments - again - observed
    assert books == {"received": segments, "observed": observed, "unread": unread}, (segments, books)
    assert sum(row.segments for row in rows) == observed
    late = [(row.picked_ns, row.segments) for row in rows if row.wait_ns >= 5_000_000]
    heard = [(event.picked_ns, event.segments) for event in served]
    assert late and heard == late, (heard, late, probe.served())
    assert {event.own_tid for event in served} == {os.getpid()}
    probe.stop_serving(os.getpid())
    assert all(fewer == 0 for _, _, fewer in probe.statistics().values())
    seconds = " ".join(f"{name} {time_s:.1f}" for name, time_s in loaded.seconds.items())
    print(f"{os.uname().release} {loaded.flavour}: {segments} segments ({seconds} s)", flush=True)
    rows.clear()
    served.clear()
    check_unprivileged(probe)
    probe.close()


LOCKED, UNLIMITED = (["prlimit", f"--memlock={limit}"] for limit in ("65536:65536", "unlimited"))
# Capabilities, the limit of locked memory, and whether that is enough. Before 5.11 maps count as locked memory.
GRANTS: dict[str, tuple[str, list[str], bool]] = {"CAP_BPF, CAP_PERFMON": ("bpf,+perfmon", LOCKED, True)}
if kernel_version() < (5, 11):
    GRANTS = {
        "CAP_BPF, CAP_PERFMON": ("bpf,+perfmon", LOCKED, False),
        "CAP_BPF, CAP_PERFMON, CAP_SYS_RESOURCE": ("bpf,+perfmon,+sys_resource", LOCKED, True),
        "CAP_BPF, CAP_PERFMON, no limit of locked memory": ("bpf,+perfmon", UNLIMITED, True),
    }


def check_plain_user(folder: pathlib.Path) -> None:
    """The agent as a user who is not root, with these capabilities alone: whether it starts, and what it keeps."""
    environment = install(folder)
    for name, (granted, limit, enough) in GRANTS.items():
        grant = [f"--{kind}=-all,+{granted}" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", *grant]
        command = [*limit, *user, sys.executable, "-m", "otel_tcppktlat", "-v", "-l", str(PORT)]
        with subprocess.Popen(
            command, env=environment, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as agent:
            assert agent.stderr
            said = []
            for line in agent.stderr:
                said.append(line)
                if line == "otel-tcppktlat: attached\n":
                    status = pathlib.Path(f"/proc/{agent.pid}/status").read_text()
                    kept = {int(one.split()[1], 16) for one in status.splitlines() if re.match("Cap(Prm|Eff)", one)}
                    assert kept == {1 << privileges.CAP_BPF if kernel_version() < (5, 19) else 0}, kept
                    agent.terminate()
        assert agent.returncode == (0 if enough else 1), said
        if not enough:
            assert "LimitMEMLOCK" in said[-1] and "CAP_SYS_RESOURCE" in said[-1], said
        print(f"{os.uname().release} user with {name}: {'starts' if enough else 'refused'}", flush=True)


rows: list = []  # type: ignore[type-arg]
served: list = []  # type: ignore[type-arg]

if __name__ == "__main__":
    for name in sys.argv[1:] or flavours():
        check(name)
    with open_folder() as folder:
        check_plain_user(folder)
