"""tcppktlat's table: one row a pickup."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TextIO

from .probe.layout import Event
from .text import address_text, name_text, printable

FLUSH_S = 1.0


@dataclass
class Table:
    """Prints events as rows, tcppktlat's columns. `wide` adds the thread id and room for IPv6 addresses."""

    out: TextIO
    timestamp: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        self._at_once = self.out.isatty()
        self._flushed_s = 0.0

    def _line(self, clock: str, pid: object, tid: object, comm: str, local: str, lport: object, remote: str, rport: object,
              wait: str) -> None:  # fmt: skip
        width = 26 if self.wide else 15
        self.out.write(
            (f"{clock:<8} " if self.timestamp else "")
            + f"{pid:<7} "
            + (f"{tid:<7} " if self.wide else "")
            + f"{comm:<16} {local:<{width}} {lport:<5} {remote:<{width}} {rport:<5} {wait}\n"
        )

    def header(self) -> None:
        """Prints the names of the columns."""
        self._line("TIME(s)", "PID", "TID", "COMM", "LADDR", "LPORT", "RADDR", "RPORT", "MS")
        self.out.flush()

    def row(self, event: Event) -> None:
        """Prints one pickup: its longest wait in ms."""
        self._line(
            time.strftime("%H:%M:%S"),
            event.tgid,
            event.tid,
            printable(name_text(event.comm)),
            address_text(event.family, bytes(event.local_address)),
            event.local_port,
            address_text(event.family, bytes(event.remote_address)),
            event.remote_port,
            f"{event.wait_ns / 1e6:.2f}",
        )

    def flush(self, now_s: float) -> None:
        """Flushes what was printed: at once to a terminal, else once a second."""
        if self._at_once or now_s - self._flushed_s >= FLUSH_S:
            self.out.flush()
            self._flushed_s = now_s
