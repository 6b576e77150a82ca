"""Processes that ask the broker: forked from the test, as any user, one step at a time."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from otel_tcppktlat.probe.layout import Event
from otel_tcppktlat.serving.area import Row
from otel_tcppktlat.serving.connection import Connection
from otel_tcppktlat.serving.protocol import REFRESH, greeting
from telemetry.told import Listener, deliver

MS = 1_000_000
_LENGTH = struct.Struct("<I")
_EXECUTABLE = os.path.basename(os.path.realpath(sys.executable)).encode()
_LATE_READER = """
import os, socket, sys, time
reader = socket.socket(fileno=int(sys.argv[1]))
for _ in range(2):
    reader.recv(100, socket.MSG_PEEK)
    time.sleep(0.02)
    os.write(int(sys.argv[2]), b"%d" % len(reader.recv(100)))
os.read(int(sys.argv[3]), 1)
"""


class Caller:
    """A forked process, as another user if so told; a context manager that ends it.

    It runs functions that it is told, which get this object: what they keep in `its` stays there for the next one. What
    they return comes back, and what they raise is raised here.
    """

    def __init__(self, address: object, uid: int = 0) -> None:
        self.address = str(address)
        self.its: dict[str, Any] = {}
        self._listener = Listener()
        self._pair = self._listener.connect()
        self._channel, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._channel.close()
                self._channel = theirs
                if uid:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                self._obey()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()

    def _obey(self) -> None:
        while (size := self._channel.recv(_LENGTH.size, socket.MSG_WAITALL)) and len(size) == _LENGTH.size:
            name, arguments = pickle.loads(self._channel.recv(_LENGTH.unpack(size)[0], socket.MSG_WAITALL))
            try:
                answer: tuple[bool, Any] = True, getattr(self, name)(*arguments)
            except Exception as error:
                answer = False, error
            text = pickle.dumps(answer)
            self._channel.sendall(_LENGTH.pack(len(text)) + text)
        os._exit(0)

    def tell(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Has the process run one of the methods below."""
        text = pickle.dumps((step.__name__, arguments))
        self._channel.sendall(_LENGTH.pack(len(text)) + text)
        size = self._channel.recv(_LENGTH.size, socket.MSG_WAITALL)
        assert size, "the caller has died"
        well, answer = pickle.loads(self._channel.recv(_LENGTH.unpack(size)[0], socket.MSG_WAITALL))
        if not well:
            raise answer
        return answer

    @property
    def port(self) -> int:
        """Where it reads."""
        return self._listener.port

    # What a process may be told. All of these run there.

    def connect(self, from_ns: int = MS, pause_ns: int = 0) -> None:
        self.its["connection"] = Connection(self.address, from_ns, pause_ns, 20)

    def read(self, *waits_s: float) -> None:
        """Reads one segment after each wait, on one connection."""
        sender, reader = self._pair
        for wait_s in waits_s:
            deliver(sender, reader, wait_s)

    def refresh(self) -> tuple[list[tuple[int, int, int]], int]:
        """Asks for its totals: (port, segments, sum in ns) of each series, and the untold."""
        connection = self.its["connection"]
        connection.ask_for_totals()
        while not connection.hear()[1]:
            pass
        return self.totals()

    def totals(self) -> tuple[list[tuple[int, int, int]], int]:
        """Those that are there."""
        rows, untold = self.its["connection"].area.totals()

        def told(row: Row) -> tuple[int, int, int]:
            assert row.series and row.series.key.process.tgid == os.getpid()
            assert row.series.identity.executable == _EXECUTABLE
            return int(row.series.key.port), sum(row.counts), row.sum_ns

        return [told(row) for row in rows], untold

    def late(self) -> list[tuple[int, int, int, int]]:
        """(tgid, own tid, local port, whole ms) of what it has heard; refresh() before brings all."""
        events: list[Event] = self.its["connection"].area.events()[0]
        return [(event.tgid, event.own_tid, event.local_port, event.wait_ns // MS) for event in events]

    def late_ns(self) -> list[int]:
        return [event.wait_ns for event in self.its["connection"].area.events()[0]]

    def all_late(self) -> tuple[int, int, int]:
        """How many late pickups it has heard of, how many had been written over before, and how many were too many."""
        events, lost = self.its["connection"].area.events()
        return len(events), lost, self.totals()[1]

    def hang_up(self) -> None:
        self.its["connection"].close()

    def hear_the_end(self) -> bool:
        """Waits until the broker hangs up."""
        try:
            while True:
                self.its["connection"].hear()
        except OSError:
            return True

    def keep(self) -> None:
        """The connection stays open, and is another one's place no more."""
        self.its["kept"] = self.its.pop("connection")

    def kept_is_hung_up(self) -> bool:
        self.its["connection"], latest = self.its["kept"], self.its["connection"]
        heard = self.hear_the_end()
        self.its["connection"] = latest
        return heard

    def greet(self, said: dict[str, Any]) -> dict[str, Any]:
        """Says this, and returns the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(self.address)
            sock.sendall(json.dumps(said).encode() + b"\n")
            data, fds, _, _ = socket.recv_fds(sock, 65536, 1)
            for fd in fds:
                os.close(fd)
            answer: dict[str, Any] = json.loads(data)
            return answer

    def greet_as_another_user(self, uid: int) -> dict[str, Any]:
        """Connects as one user, and is another one when it greets."""
        os.seteuid(uid)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.address)
        os.seteuid(0)
        sock.sendall(greeting(MS, 0))
        answer: dict[str, Any] = json.loads(sock.recv(4096))
        return answer

    def read_in_a_child(self) -> None:
        """A child has all that this process has, and reads late."""
        child = os.fork()
        if not child:
            self.read(0.02)
            os._exit(0)
        os.waitpid(child, 0)

    def execute(self) -> bytes:
        """This process becomes another program, which reads late; a child goes on here with a copy of all.

        The program is there as long as the child is.
        """
        sender, reader = self._pair
        done, held = os.pipe(), os.pipe()
        if os.fork():
            its = reader.fileno(), done[1], held[0]
            for fd in its:
                os.set_inheritable(fd, True)
            os.execv(sys.executable, [sys.executable, "-c", _LATE_READER, *map(str, its)])
        os.close(held[0])
        answers = []
        for _ in range(2):
            sender.sendall(b"x" * 10)
            answers.append(os.read(done[0], 10))
        return b" ".join(answers)

    def what_the_copy_sees(self) -> tuple[list[int], int]:
        """It asks, and hears the end; then segments of each series, and how many late pickups."""
        self.its["connection"].ask_for_totals()
        self.hear_the_end()
        area = self.its["connection"].area
        return [sum(row.counts) for row in area.totals()[0]], len(area.events()[0])

    def flood(self, count: int) -> None:
        """Connects so often, and says nothing."""
        self.its["flood"] = [socket.socket(socket.AF_UNIX) for _ in range(count)]
        for sock in self.its["flood"]:
            sock.connect(self.address)
            sock.settimeout(20)

    def until_hung_up(self) -> int:
        """Until the broker has lost its patience with all of them; returns how many it had refused at once."""
        refused = 0
        for sock in self.its.pop("flood"):
            while said := sock.recv(4096):
                refused += b"as many processes" in said
            sock.close()
        return refused

    def ask_without_listening(self) -> None:
        """For as long as the kernel takes questions."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.its["connection"]._sock.send(REFRESH * 4096, socket.MSG_DONTWAIT)

    def say(self, data: bytes) -> None:
        self.its["connection"]._sock.sendall(data)

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._channel.close()
        os.waitpid(self.pid, 0)
        self._listener.__exit__()
