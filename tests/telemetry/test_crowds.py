"""A fork bomb of sockets: more than the maps hold. What is lost is counted by reason; all is well when they close."""

from __future__ import annotations

import contextlib
import pathlib
import resource
import subprocess
import sys
from collections.abc import Iterator

from otel_tcppktlat.probe.layout import FIRST_SERIES
from otel_tcppktlat.probe.probe import CHUNKS
from support.tun import TunPeer
from telemetry import told
from telemetry.told import SETTLED, Scene

SOCKETS = 16384  # that the raw flavour tracks
SERIES = 2048 - FIRST_SERIES  # that the kernel's map holds
CONNECTIONS, ADDRESSES = 17_000, 2_300
INLINE = 8  # entries that sit with the socket
STALLED, SEGMENTS = CHUNKS + 200, INLINE + 2  # each takes one chunk of the pool
MERGED, TRACKED, IN_USE = "tcppktlat.segments.merged", "tcppktlat.sockets.tracked", "tcppktlat.series.in_use"
OVERFLOW = frozenset({("otel.metric.overflow", True)})
# One process of the bomb, which holds both ends: its standard input says what it does. It ends without a TIME_WAIT.
CROWD = """
import resource, socket, struct, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
server, pairs = socket.socket(fileno=int(sys.argv[1])), []
port = server.getsockname()[1]
def send(client, count):
    for _ in range(count):
        client.send(b"x")
for command, first, number in map(str.split, sys.stdin):
    for one in range(int(first), int(first) + int(number)):
        if command == "open":
            where = one % int(sys.argv[2])
            client = socket.create_connection((f"127.1.{where // 250}.{where % 250 + 1}", port))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            pairs.append((client, server.accept()[0]))
            send(client, 1)
            pairs[-1][1].recv(1)
        elif command == "stall":
            send(pairs[one][0], int(sys.argv[3]))
        else:
            pairs[one][1].recv(1000)
    print(command, flush=True)
"""


class Crowd:
    """One such process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, command: str, first: int, number: int) -> None:
        """Has `number` connections from the `first` on opened, each for one segment; stalled; or read."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{command} {first} {number}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == f"{command}\n"


@contextlib.contextmanager
def crowd(scene: Scene) -> Iterator[Crowd]:
    """It closes its connections at the end, as it ends."""
    fd = scene.listener.fileno()
    command = [sys.executable, "-c", CROWD, str(fd), str(ADDRESSES), str(SEGMENTS)]
    with subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Crowd(process)


def gauge(scene: Scene, metric: str) -> int:
    """What it says last."""
    return int(scene.receiver.points(metric)[-1].value or 0)


def untracked(scene: Scene, reason: str) -> int:
    """Segments."""
    return told.number(scene.receiver, SETTLED, tcppktlat_outcome="untracked", tcppktlat_reason=reason)


def test_more_sockets_series_and_segments_than_fit(tmp_path: pathlib.Path) -> None:
    arguments = ["--flavour", "raw", "--attributes", "server.address", "--series-limit", str(SERIES + 1)]
    variables = {
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "OTEL_TRACES_EXPORTER": "none",
    }
    share = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 64) // 2
    shares = [min(share, CONNECTIONS - done) for done in range(0, CONNECTIONS, share)]
    assert shares[0] > ADDRESSES  # of these alone the map is full
    with (
        told.scene(tmp_path, *arguments, environment=variables, host="0.0.0.0") as scene,
        TunPeer() as peer,
        contextlib.ExitStack() as stack,
    ):
        conversation = peer.accept(local_port=scene.listener.port)
        conversation.send(10)
        assert conversation.socket.recv(10)
        crowds = [stack.enter_context(crowd(scene)) for _ in shares]
        for one, number in zip(crowds, shares, strict=True):
            one.do("open", 0, number)
        scene.settle()
        books = told.check_balance(scene.receiver)
        assert books["received"] == CONNECTIONS + 1 and not books["queued"]
        assert books["untracked"] == untracked(scene, "sockets_full") >= CONNECTIONS + 1 - SOCKETS
        assert gauge(scene, TRACKED) == books["observed"] > SOCKETS * 0.8
        assert gauge(scene, IN_USE) == SERIES
        counts = {key: one.count for key, one in told.waits_by_attributes(scene.receiver).items()}
        assert len(counts) == SERIES + 1 and counts[OVERFLOW] >= books["observed"] - shares[0]

        crowds[0].do("stall", 0, STALLED)
        for index in range(3):
            conversation.send(10, at=100 + 20 * index)  # behind a gap: each takes an entry of the pool
        scene.settle()
        assert told.check_balance(scene.receiver)["queued"] >= STALLED * SEGMENTS
        crowds[0].do("read", 0, STALLED)
        scene.settle()
        books = told.check_balance(scene.receiver)
        assert told.number(scene.receiver, MERGED) == (STALLED - CHUNKS) * (SEGMENTS - INLINE)
        assert untracked(scene, "no_room") == 2 and books["queued"] == 1  # the third may still be dropped
        assert books["received"] == CONNECTIONS + 1 + STALLED * SEGMENTS + 3

        conversation.rst()
        conversation.socket.close()
        stack.close()
        scene.receiver.wait_for(lambda _: gauge(scene, TRACKED) == gauge(scene, IN_USE) - 1 == 0, 60)
        before = told.waits_by_attributes(scene.receiver)
        lost = {reason: untracked(scene, reason) for reason in ("sockets_full", "no_room")}
        with crowd(scene) as fresh:
            fresh.do("open", ADDRESSES - 1, 1)  # an address that had no room before
            fresh.do("stall", 0, 1)
            fresh.do("read", 0, 1)
            scene.settle()
        then = told.check_balance(scene.receiver)
        assert then["observed"] == books["observed"] + 1 + SEGMENTS
        assert {reason: untracked(scene, reason) for reason in lost} == lost
        assert told.number(scene.receiver, MERGED) == (STALLED - CHUNKS) * (SEGMENTS - INLINE)
        after = told.waits_by_attributes(scene.receiver)
        assert after[OVERFLOW].count == before[OVERFLOW].count
        (new,) = after.keys() - before.keys()
        assert after[new].count == 1 + SEGMENTS
