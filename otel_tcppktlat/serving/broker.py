"""Answers processes that ask for their own measurements. One thread, the agent's, and nothing here ever blocks it.

Who asks is what the kernel says (SO_PEERCRED): a process cannot name another one. Its events and totals go to an area
of memory of its own, of which it gets a read-only descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import select
import selectors
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from ..buckets import Buckets
from ..probe.layout import Event, ProcessKey
from ..probe.probe import Harvest, Probe
from . import MOST_CLIENTS
from .area import AreaWriter
from .protocol import (
    LATE,
    MOST_GREETING_BYTES,
    REFRESH,
    ProtocolError,
    answer,
    read_greeting,
    refusal,
)
from .totals import ProcessTotals

MOST_OF_A_USER = 128
GREETING_S = 5.0
_ACCEPTED_AT_ONCE, _ACCEPT_PAUSE_S = 8, 0.02
_REFRESH_PAUSE_S, _REFRESH_SHARE = 0.1, 0.05  # between two harvests; and the most of a CPU that they may take
LEAST_FROM_NS, LEAST_PAUSE_NS = 100_000, 50_000_000  # a process's threshold is 0.1 ms, and it hears of 20 a second
_SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h, Linux 6.5

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Client:
    """A connection, from its greeting on with the process that it belongs to."""

    sock: socket.socket
    pid: int
    uid: int
    gid: int
    pidfd: int  # readable when the process has ended: its number may be another one's then
    deadline_s: float
    received: bytes = b""
    area: AreaWriter | None = None
    process: ProcessKey | None = None
    answered: bool = False
    waiting: bool = False  # for its totals
    late: bool = False  # has late pickups that it was not told of yet

    def said(self, data: bytes) -> bool:
        """Sends without waiting; whoever does not read is told no more. False if that is the end."""
        try:
            self.sock.send(data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


def _credentials(pid: int) -> tuple[set[int], set[int]] | None:
    """The uids and gids of a process, real, effective, saved and the file system's; None if they cannot be read."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = {name: values.split() for name, _, values in (line.partition(":") for line in lines)}
    return {*map(int, found["Uid"])}, {*map(int, found["Gid"])}


def _pidfd(sock: socket.socket, pid: int) -> int:
    """The process of the other end. Before Linux 6.5 whoever has its number now, a moment later."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Broker:
    """Serves on a listening socket; the agent waits for `fileno` and `timeout_s`, and calls `turn`."""

    def __init__(self, listener: socket.socket, buckets: Buckets) -> None:
        self._listener, self._buckets, self._name = listener, buckets, uuid.uuid4().hex
        listener.setblocking(False)
        self._selector = selectors.EpollSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._clients: set[_Client] = set()
        self._served: dict[int, _Client] = {}  # by process id
        self._totals = ProcessTotals()
        self._lock = threading.Lock()  # events and harvests come from whichever thread polls the probe
        self._listening_again_s: float | None = None
        self._refreshed_s, self._pause_s = 0.0, _REFRESH_PAUSE_S

    def start(self, probe: Probe, harvest: Callable[[], object]) -> None:
        """Begins to answer. `harvest` ends the probe's interval on behalf of all who read it."""
        self._probe, self._harvest = probe, harvest

    def on_served(self, event: Event) -> None:
        """Takes an event of a process that is served; flush() tells the process."""
        with self._lock:
            client = self._served.get(event.tgid)
            if client and client.area and not _ended(client.pidfd):
                client.area.add(event)
                client.late = True

    def on_harvest(self, harvest: Harvest) -> None:
        """Takes an interval."""
        with self._lock:
            self._totals.add(harvest)
        self.flush()

    def flush(self) -> None:
        """Tells processes of the late pickups that they have not heard of."""
        with self._lock:
            for client in self._served.values():
                if client.late and client.answered:
                    client.late = False
                    client.said(LATE)

    def fileno(self) -> int:
        """Becomes readable when there is something to do."""
        return self._selector.fileno()

    def timeout_s(self, longest_s: float) -> float:
        """When turn() wants to be called in any case."""
        now_s = time.monotonic()
        due_s = [now_s + longest_s]
        if self._listening_again_s is not None:
            due_s.append(self._listening_again_s)
        if any(client.waiting for client in self._clients):
            due_s.append(self._refreshed_s + self._pause_s)
        return max(0.0, min(due_s) - now_s)

    def turn(self) -> None:
        """Does what there is to do, and no more than some of it if somebody asks for much."""
        now_s = time.monotonic()
        if self._listening_again_s is not None and now_s >= self._listening_again_s:
            self._listening_again_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept(now_s)
            elif key.data in self._clients:
                if key.fileobj is key.data.sock:
                    self._receive(key.data)
                else:
                    self._drop(key.data)
        for client in [client for client in self._clients if not client.area and now_s >= client.deadline_s]:
            self._drop(client)
        if now_s >= self._refreshed_s + self._pause_s and any(client.waiting for client in self._clients):
            self._refresh()

    def _accept(self, now_s: float) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except OSError:  # nobody is left, or no descriptor
                break
            self._admit(sock, now_s)
        self._selector.unregister(self._listener)
        self._listening_again_s = now_s + _ACCEPT_PAUSE_S

    def _admit(self, sock: socket.socket, now_s: float) -> None:
        sock.setblocking(False)
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        reason = None
        if not pid:
            reason = "your process is not visible from the agent's pid namespace"
        elif len(self._clients) >= MOST_CLIENTS or self._of_user(uid) >= MOST_OF_A_USER:
            reason = "the agent serves as many processes as it may"
        try:
            if reason is None:
                pidfd = _pidfd(sock, pid)
        except OSError:
            reason = "the process that connected is gone"
        client = _Client(sock, pid, uid, gid, pidfd if reason is None else -1, now_s + GREETING_S)
        if reason:
            client.said(refusal(reason))
            sock.close()
            return
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)
        self._selector.register(pidfd, selectors.EVENT_READ, client)

    def _of_user(self, uid: int) -> int:
        return sum(client.uid == uid for client in self._clients)

    def _receive(self, client: _Client) -> None:
        try:
            data = client.sock.recv(MOST_GREETING_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
        elif client.area:
            if data.strip(REFRESH):
                self._drop(client)
            client.waiting = True
        else:
            self._greeted(client, data)

    def _greeted(self, client: _Client, data: bytes) -> None:
        client.received += data
        line, end, more = client.received.partition(b"\n")
        if not end and len(line) < MOST_GREETING_BYTES:
            return
        try:
            if more or not end:
                raise ProtocolError("a line is the first that a process says")
            from_ns, pause_ns = read_greeting(line)
            self._serve(client, max(from_ns, LEAST_FROM_NS), max(pause_ns, LEAST_PAUSE_NS))
        except ProtocolError as error:
            self._refuse(client, str(error))
        except OSError as error:
            self._refuse(client, f"the agent cannot serve this process: {error.strerror}")

    def _serve(self, client: _Client, from_ns: int, pause_ns: int) -> None:
        """Raises OSError; what has been begun then goes with _drop()."""
        if before := self._served.get(client.pid):
            self._drop(before)
        area = AreaWriter(self._buckets)
        with self._lock:
            client.area = area
            self._served[client.pid] = client
        self._probe.serve(client.pid, from_ns, pause_ns)
        # From here on the kernel would end it at an exec: so it is still the program that connected, and alive.
        found = _credentials(client.pid)
        if found is None and not _ended(client.pidfd):
            raise ProtocolError("the agent cannot read your process in /proc: is that mounted with hidepid?")
        if _ended(client.pidfd) or found != ({client.uid}, {client.gid}):
            raise ProtocolError("the process that connected is another one now")
        client.waiting = True

    def _refresh(self) -> None:
        """Ends the interval, and writes the totals of those who wait for them."""
        began_s = time.thread_time()
        self._harvest()
        still_served = self._probe.served()
        for client in [client for client in self._clients if client.waiting]:
            untold = still_served.get(client.pid)
            if untold is None:
                self._drop(client)
                continue
            self._publish(client, untold)
            client.waiting = False
            if not client.answered:
                self._answer(client)
            elif not client.said(REFRESH):
                self._drop(client)
        self._refreshed_s = time.monotonic()
        self._pause_s = max(_REFRESH_PAUSE_S, (time.thread_time() - began_s) / _REFRESH_SHARE)

    def _publish(self, client: _Client, untold: int) -> None:
        if client.process is None:
            client.process = self._probe.living_process(client.pid)
            # Found and then still served: the kernel has not seen it exec or end before.
            if client.process is not None and (client.pid not in self._probe.served() or _ended(client.pidfd)):
                client.process = None
        with self._lock:
            if client.area:
                client.area.publish(self._totals.rows(client.process) if client.process else [], untold)

    def _answer(self, client: _Client) -> None:
        assert client.area
        try:
            fd = client.area.open_for_reading()
            try:
                socket.send_fds(client.sock, [answer(self._name, self._buckets)], [fd])
            finally:
                os.close(fd)
        except OSError as error:
            _log.debug("process %d cannot be answered: %s", client.pid, error)
            self._drop(client)
            return
        client.answered = True
        _log.debug("serving process %d", client.pid)

    def _refuse(self, client: _Client, reason: str) -> None:
        client.said(refusal(reason))
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.sock)
        self._selector.unregister(client.pidfd)
        client.sock.close()
        with self._lock:
            if self._served.get(client.pid) is client:
                del self._served[client.pid]
                with contextlib.suppress(OSError):
                    self._probe.stop_serving(client.pid)
            if client.area:
                client.area.close()
                client.area = None
            os.close(client.pidfd)

    def close(self) -> None:
        """Writes everybody's totals a last time, and hangs up."""
        for client in self._clients:
            client.waiting = client.answered
        if any(client.waiting for client in self._clients):
            self._refresh()
        for client in [*self._clients]:
            self._drop(client)
        self._selector.close()
        self._listener.close()
