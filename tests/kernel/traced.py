"""A running probe under test, and what it told since a moment that the test chose."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import pathlib
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from otel_tcppktlat.probe.layout import Event
from otel_tcppktlat.probe.probe import Delta, Harvest, Probe, ProbeOptions
from support.tun import Conversation, TunPeer

# The probes see this local port only: neither other traffic of the machine nor a second run gets into their books.
PORT = 20_000 + os.getpid() % 10_000
BOUNDS_NS = tuple(digit * 10**power for power in range(3, 10) for digit in (1, 2, 5)) + (10**10,)
MS, SECOND = 1_000_000, 1_000_000_000

OUTCOMES = (
    "observed", "own", "filtered", "duplicate", "dropped", "unread",
    "untracked_socket", "untracked_pool", "untracked_mptcp",
)  # fmt: skip
LIFE = ("sockets_opened", "sockets_closed", "processes_gone")


def options(flavour: str, **changes: Any) -> ProbeOptions:
    """What most tests run: one port, a row per pickup, and exemplars."""
    return replace(ProbeOptions(bounds_ns=BOUNDS_NS, flavour=flavour, lport=PORT, rows=True), **changes)


@dataclass(frozen=True)
class Waits:
    """What histograms say: observations, their sum, and how many in which bucket."""

    count: int
    sum_ns: int
    buckets: Counter[int]


def waits(deltas: list[Delta]) -> Waits:
    """The sum of these histograms."""
    buckets: Counter[int] = Counter()
    for delta in deltas:
        buckets.update({index: count for index, count in enumerate(delta.counts) if count})
    return Waits(sum(buckets.values()), sum(delta.sum_ns for delta in deltas), buckets)


def bucket_of(ns: int) -> int:
    """The bucket that a wait belongs to: how many upper bounds are below it."""
    return sum(bound < ns for bound in BOUNDS_NS)


def queued(books: dict[str, int]) -> int:
    """What the books say is still queued."""
    return books.get("received", 0) - sum(books.get(name, 0) for name in OUTCOMES)


class Traced:
    """A probe of these options; `books`, `life`, `rows` and `harvest` tell what came since `begin`."""

    def __init__(self, its_options: ProbeOptions) -> None:
        self.rows: list[Event] = []
        self.on_row: Callable[[], None] | None = None  # done with each row
        self.options = its_options
        self.probe = Probe(its_options, self._keep)
        self.loaded = self.probe.open()
        self.begin()

    def _keep(self, event: Event) -> None:
        self.rows.append(event)
        if self.on_row:
            self.on_row()

    def begin(self) -> None:
        """Forgets what was before."""
        self.probe.harvest()
        self.rows.clear()
        self._before = self.probe.books()

    def _differences(self) -> dict[str, int]:
        return {name: count - self._before[name] for name, count in self.probe.books().items()}

    @property
    def books(self) -> dict[str, int]:
        """What has changed in the books, without the lives of sockets and processes."""
        return {name: count for name, count in self._differences().items() if count and name not in LIFE}

    @property
    def life(self) -> dict[str, int]:
        """How many sockets and processes came and went."""
        return {name: count for name, count in self._differences().items() if count and name in LIFE}

    def harvest(self) -> Harvest:
        """Ends the interval."""
        return self.probe.harvest()

    def waits(self) -> Waits:
        """Ends the interval: its histograms, all series together."""
        return waits(self.harvest().deltas)

    def poll(self) -> list[Event]:
        """The rows so far."""
        self.probe.poll()
        return self.rows


class Load:
    """Loads each set of options once, for as long as one flavour is under test."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        self._stack = contextlib.ExitStack()
        self._cached = functools.cache(self._load)

    def _load(self, its_options: ProbeOptions) -> Traced:
        traced = Traced(its_options)
        self._stack.callback(traced.probe.close)
        assert traced.loaded.flavour == self.flavour
        return traced

    def __call__(self, **changes: Any) -> Traced:
        """The running probe with these options, begun anew."""
        traced = self._cached(options(self.flavour, **changes))
        traced.begin()
        return traced

    @contextlib.contextmanager
    def once(self, **changes: Any) -> Iterator[Traced]:
        """A probe of its own for one test."""
        traced = Traced(options(self.flavour, **changes))
        try:
            yield traced
        finally:
            traced.probe.close()

    def close(self) -> None:
        """Detaches all."""
        self._stack.close()


def accept(peer: TunPeer, family: Any = "ipv4", **arguments: Any) -> Conversation:
    """A connection to the port that the probes see."""
    return peer.accept(family, local_port=PORT, **arguments)


def read_all(sock: socket.socket, most: int = 1 << 20) -> int:
    """Reads what is there; returns how many bytes that was."""
    total = 0
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(most, socket.MSG_DONTWAIT):
            total += len(data)
    return total


class Child:
    """A forked process that runs a function each time it is told to, and tells when it has returned."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._go, self._done = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            os.close(self._go[1])
            try:
                while os.read(self._go[0], 1) == b"x":
                    function()
                    os.write(self._done[1], b"x")
                status = 0
            except BaseException as error:
                print(f"child: {error!r}", file=sys.stderr)
            finally:
                os._exit(status)
        os.close(self._done[1])
        os.close(self._go[0])

    def run(self) -> None:
        """Has the function run once."""
        os.write(self._go[1], b"x")
        eventually(lambda: readable(self._done[0]), "the child's function to return")
        assert os.read(self._done[0], 1) == b"x"

    def end(self) -> None:
        """Ends the process, which must have done well."""
        os.write(self._go[1], b"q")  # the end of file would not do: children made later hold this end, too
        os.close(self._go[1])
        _, status = os.waitpid(self.pid, 0)
        os.close(self._done[0])
        assert status == 0


def eventually(condition: Callable[[], object], what: str, timeout_s: float = 20) -> None:
    """Waits for what must come, however long it takes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def readable(fd: int) -> bool:
    """Would a read return at once?"""
    return bool(select.select([fd], [], [], 0)[0])


_libc = ctypes.CDLL(None, use_errno=True)
_libc.splice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
_libc.splice.restype = ctypes.c_ssize_t
_PIPE_MAX_SIZE = pathlib.Path("/proc/sys/fs/pipe-max-size")


@contextlib.contextmanager
def large_pipe() -> Iterator[tuple[int, int]]:
    """A pipe with 16,384 slots, which takes what a socket holds in one call."""
    f_setpipe_sz, size, before = 1031, 16384 * os.sysconf("SC_PAGE_SIZE"), _PIPE_MAX_SIZE.read_text()
    ends = os.pipe()
    try:
        _PIPE_MAX_SIZE.write_text(str(size))
        fcntl.fcntl(ends[1], f_setpipe_sz, size)
        yield ends
    finally:
        _PIPE_MAX_SIZE.write_text(before)
        for fd in ends:
            os.close(fd)


def splice(sock: socket.socket, pipe: tuple[int, int], most: int = 1 << 30) -> int:
    """Moves what the socket holds to the pipe in one tcp_read_sock(); returns how many bytes."""
    splice_f_nonblock, timeout_s = 2, sock.gettimeout()
    sock.setblocking(False)  # or there is another one, which finds nothing, but is a pickup
    moved: int = _libc.splice(sock.fileno(), None, pipe[1], None, most, splice_f_nonblock)
    sock.settimeout(timeout_s)
    if moved < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return moved


def disconnect(sock: socket.socket) -> None:
    """connect() to AF_UNSPEC: the connection is thrown away, the socket stays."""
    if _libc.connect(sock.fileno(), bytes(16), 16):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
