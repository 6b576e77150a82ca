"""An agent of the application's own, for one that may load eBPF programs on a host where no agent serves.

It is the same agent in a process of its own, without privilege once it has attached, that sees only what asks it: the
application and the children that it forks, which find it by an abstract socket. It lives as long as one of them does:
they hold the writing end of a pipe, and it the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import tempfile

from ..probe.loader import capabilities
from ..serving.listening import BACKLOG, check_pid_namespace
from ..settings import AGGREGATION

START_S = 60.0  # a compiler on a busy machine
_PACKAGE_PARENT = pathlib.Path(__file__).resolve().parents[2]
_START = "import sys; sys.path.append(sys.argv.pop(1)); from otel_tcppktlat.__main__ import main; main()"

_log = logging.getLogger(__name__)


def may_load() -> bool:
    """May this process load eBPF programs, and does it see the host's process ids?"""
    try:
        check_pid_namespace()
        privileged = capabilities.may_load()
    except OSError:
        return False
    return privileged and "python" in os.path.basename(sys.executable or "")


class OwnAgent:
    """Where it will be found, at once; start() starts it, in its own time."""

    def __init__(self) -> None:
        """Listens. OSError."""
        self.address = f"\0otel-tcppktlat-{secrets.token_hex(16)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(BACKLOG)
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        self._theirs, self._ours = [listener.detach(), theirs], [ours]  # emptied by whoever closes them first
        self._errors = tempfile.TemporaryFile()

    def start(self) -> None:
        """Starts it; it leaves this process's children at once. Raises OSError if it cannot be started."""
        descriptors = tuple(self._theirs)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("OTEL_") or name == AGGREGATION
        }
        command = [
            sys.executable,
            "-I",
            "-c",
            _START,
            str(_PACKAGE_PARENT),
            "--serve-application",
            ",".join(map(str, descriptors)),
        ]
        starting = subprocess.Popen(
            command,
            pass_fds=descriptors,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            cwd="/",
            start_new_session=True,
        )
        starting.wait()
        self.forked()

    def trouble(self) -> str:
        """What it complained about, one line, or nothing."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return lines[-1].removeprefix("otel-tcppktlat: ") if lines else ""

    def forked(self) -> None:
        """Closes what only the agent shall hold: then a connection is refused once it has ended."""
        _close(self._theirs)

    def end(self) -> None:
        """Lets go of it: it ends when nobody is left. Safe to call twice, and from two threads."""
        self.forked()
        _close(self._ours)


def _close(descriptors: list[int]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            os.close(descriptors.pop())
