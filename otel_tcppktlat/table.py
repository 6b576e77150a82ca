"""tcppktlat's table: one row a pickup."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from dataclasses import dataclass

from .probe.layout import Event
from .text import address_text, printable

MOST_PENDING_BYTES, WORTH_WRITING_BYTES = 1 << 20, 1 << 14
_QUIET_S = 10.0  # between two lines about lost rows
_PIPE_BUF = 4096  # a pipe that is ready takes as much without blocking

_End = tuple[str, object]  # address and port

_log = logging.getLogger(__name__)


@dataclass
class Table:
    """Prints events as rows, tcppktlat's columns. `wide` adds the thread id and room for IPv6 addresses.

    Whoever reads the output slowly, or not at all, delays nothing: rows wait, and beyond 1 MiB they are lost. `beside`:
    an export goes on whatever becomes of the output, and rows wait while its disk is full.
    """

    fd: int
    timestamp: bool = False
    wide: bool = False
    encoding: str = "utf-8"
    beside: bool = False

    def __post_init__(self) -> None:
        self._pending = bytearray()
        self._lost = 0
        self._said_lost_s = -_QUIET_S
        self._trouble = ""
        self._lock = threading.Lock()  # rows come from whoever polls or harvests
        self._ready = select.poll()
        self._ready.register(self.fd, select.POLLOUT)

    def _line(self, clock: str, pid: object, tid: object, comm: str, local: _End, remote: _End, wait: str) -> None:
        (local_address, local_port), (remote_address, remote_port) = local, remote
        width = 26 if self.wide else 15
        line = (
            (f"{clock:<8} " if self.timestamp else "")
            + f"{pid:<7} "
            + (f"{tid:<7} " if self.wide else "")
            + f"{comm:<16} {local_address:<{width}} {local_port:<5} {remote_address:<{width}} {remote_port:<5} {wait}\n"
        )
        with self._lock:
            if len(self._pending) >= MOST_PENDING_BYTES:
                self._lost += 1
                return
            self._pending += line.encode(self.encoding, errors="backslashreplace")
            if len(self._pending) >= WORTH_WRITING_BYTES:
                with contextlib.suppress(OSError):  # flush() meets it again
                    self._write(0.0)

    def header(self) -> None:
        """Prints the names of the columns."""
        self._line("TIME(s)", "PID", "TID", "COMM", ("LADDR", "LPORT"), ("RADDR", "RPORT"), "MS")
        self.flush()

    def row(self, event: Event) -> None:
        """Prints one pickup: its longest wait in ms. It appears at the next flush."""
        picked_unix_s = time.time() + (event.picked_ns - time.monotonic_ns()) / 1e9
        self._line(
            time.strftime("%H:%M:%S", time.localtime(picked_unix_s)) if self.timestamp else "",
            event.tgid,
            event.tid,
            printable(event.comm),
            (address_text(event.family, bytes(event.local_address)), event.local_port),
            (address_text(event.family, bytes(event.remote_address)), event.remote_port),
            f"{event.wait_ns / 1e6:.2f}",
        )

    def flush(self, timeout_s: float = 0.0) -> None:
        """Writes what the output takes now, or within `timeout_s`.

        Raises BrokenPipeError when nobody reads it, and OSError for other reasons, unless an export goes on beside.
        """
        trouble = ""
        with self._lock:
            try:
                self._write(timeout_s)
            except BrokenPipeError:
                raise
            except OSError as error:
                trouble = f"standard output: {error.strerror}"
            due = timeout_s or time.monotonic() - self._said_lost_s >= _QUIET_S
            lost = self._lost if due else 0
            self._lost -= lost
        if lost:
            self._said_lost_s = time.monotonic()
            _log.warning("%d rows lost: nobody reads the table as fast as it grows", lost)
        if trouble and not self.beside:
            raise OSError(trouble)
        if trouble not in ("", self._trouble):
            _log.warning("%s; the table waits, the export goes on", trouble)
        self._trouble = trouble

    def _write(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while ready := self._ready.poll(max(0.0, deadline_s - time.monotonic()) * 1e3 if self._pending else 0):
            if ready[0][1] & (select.POLLERR | select.POLLHUP):
                raise BrokenPipeError
            if not self._pending:
                break
            del self._pending[: os.write(self.fd, self._pending[:_PIPE_BUF])]
