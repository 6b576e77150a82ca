"""The process's side of the broker's socket."""

from __future__ import annotations

import contextlib
import select
import socket
import time

from .area import AreaReader
from .protocol import LATE, MOST_ANSWER_BYTES, REFRESH, ProtocolError, greeting, read_answer

_FULL_PAUSE_S = 0.02


def is_served(address: str) -> bool:
    """Does anybody listen there?"""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except BlockingIOError:
            pass  # its backlog is full
        except (OSError, ValueError):
            return False
        return True


class Connection:
    """Greets a broker and gets the area of this process. OSError if there is no broker, ProtocolError if it refuses."""

    def __init__(self, address: str, from_ns: int, pause_ns: int, timeout_s: float) -> None:
        """`address`: a path, or a NUL and an abstract name. Waits `timeout_s` at most for each answer."""
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout_s)
        descriptors: list[int] = []
        try:
            self._connect(address, timeout_s)
            with contextlib.suppress(BrokenPipeError):  # it has refused already: it says why
                self._sock.sendall(greeting(from_ns, pause_ns))
            line = b""
            while not line.endswith(b"\n") and len(line) < MOST_ANSWER_BYTES:
                data, fds, _, _ = socket.recv_fds(self._sock, MOST_ANSWER_BYTES, 1)
                line, descriptors = line + data, descriptors + list(fds)
                if not data:
                    raise ProtocolError("the agent hung up")
            self.agent, self.buckets = read_answer(line)
            if len(descriptors) != 1:
                raise ProtocolError("the agent sent no descriptor")
            self.area = AreaReader(descriptors.pop(), self.buckets)
        except BaseException:
            for fd in descriptors:
                socket.close(fd)
            self._sock.close()
            raise
        self._sock.settimeout(None)

    def _connect(self, address: str, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                return self._sock.connect(address)
            except BlockingIOError:  # more callers than it has accepted yet
                if time.monotonic() >= end_s:
                    raise
                time.sleep(_FULL_PAUSE_S)

    def fileno(self) -> int:
        """Becomes readable when there is something to hear."""
        return self._sock.fileno()

    def ask_for_totals(self) -> None:
        """Has the broker write this process's totals; hear() tells when it has. Never waits; OSError if it is gone."""
        with contextlib.suppress(BlockingIOError):  # it has been asked so often already
            self._sock.send(REFRESH, socket.MSG_DONTWAIT)

    def hear(self) -> tuple[bool, bool]:
        """Waits for the broker: (there are late pickups, totals are written). Raises OSError when it is gone."""
        data = self._sock.recv(256)
        if not data:
            raise ConnectionResetError("the agent hung up")
        return LATE in data, REFRESH in data

    def has_news(self, timeout_s: float) -> bool:
        """Waits until there is something to hear, or for so long: is there?"""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout_s * 1e3))

    def interrupt(self) -> None:
        """Has hear() raise OSError in whichever thread waits there."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hangs up. The area stays: the broker wrote it a last time if it ended well."""
        self._sock.close()
