"""An agent whose output is a pipe or a terminal of the test's own, line by line with the time of each."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from support.agent import CA_VARIABLES, REPOSITORY

HEADER = "PID     COMM             LADDR           LPORT RADDR           RPORT MS"
WIDE_HEADER = (
    "TIME(s)  PID     TID     COMM             LADDR                      LPORT RADDR                      RPORT MS"
)
PYTHON_VARIABLES = ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
_BYTECODE = os.path.join(tempfile.gettempdir(), f"otel-tcppktlat-bytecode-{os.getuid()}")
_ROW = re.compile(
    r"((?P<time>\d\d:\d\d:\d\d) +)?(?P<pid>\d+) +((?P<tid>\d+) +)?(?P<comm>\S.*?) +(?P<laddr>[0-9a-f.:]+)"
    r" +(?P<lport>\d+) +(?P<raddr>[0-9a-f.:]+) +(?P<rport>\d+) +(?P<ms>\d+\.\d\d)"
)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's, without what would tell the agent something."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OTEL_") and name not in CA_VARIABLES and name not in PYTHON_VARIABLES
    }
    return {**kept, "PYTHONPATH": str(REPOSITORY), "PYTHONPYCACHEPREFIX": _BYTECODE, **(extra or {})}


@dataclass(frozen=True)
class Row:
    """A row of the table; addresses with their ports."""

    pid: int
    comm: str
    local: tuple[str, int]
    remote: tuple[str, int]
    ms: float
    time: str | None = None
    tid: int | None = None


def parse(line: str) -> Row:
    """Raises AssertionError for what is no row."""
    match = _ROW.fullmatch(line)
    assert match, line
    return Row(
        pid=int(match["pid"]),
        comm=match["comm"],
        local=(match["laddr"], int(match["lport"])),
        remote=(match["raddr"], int(match["rport"])),
        ms=float(match["ms"]),
        time=match["time"],
        tid=int(match["tid"]) if match["tid"] else None,
    )


class Printed:
    """A running agent; a context manager that ends it."""

    def __init__(
        self,
        *arguments: str,
        terminal: bool = False,
        variables: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        if terminal:
            self._read_fd, write_fd = pty.openpty()
        else:
            self._read_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [python, "-m", "otel_tcppktlat", *arguments],
            env=environment(variables),
            stdout=write_fd,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(write_fd)
        self.lines: list[str] = []
        self.times_s: list[float] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        pending = b""
        while True:
            try:
                data = os.read(self._read_fd, 65536)
            except OSError:  # a terminal whose other end is closed
                data = b""
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            with self._changed:
                self.lines += [line.decode().rstrip("\r") for line in lines]
                self.times_s += [time.monotonic()] * len(lines)
                self._changed.notify_all()

    def wait_for_lines(self, count: int, timeout_s: float = 60) -> None:
        """Waits for so many, the header included."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.lines) >= count, timeout_s), self.lines

    @property
    def rows(self) -> list[Row]:
        """What follows the header."""
        return [parse(line) for line in self.lines[1:]]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ends it; returns the status and what it said on stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=30)
        self._thread.join(10)
        return self.process.returncode, stderr

    def __enter__(self) -> Printed:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self._thread.join(10)
        os.close(self._read_fd)


def run(
    *arguments: str, variables: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, which must come by itself."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "otel_tcppktlat", *arguments],
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
