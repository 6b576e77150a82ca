"""The socket that any local process may connect to."""

from __future__ import annotations

import pathlib
import resource
import socket
import stat

from ..probe.loader.pids import in_host_namespace
from .connection import is_served

BACKLOG, DESCRIPTORS = 64, 4096


def check_pid_namespace() -> None:
    """Raises OSError unless process ids here are those that the kernel's programs see."""
    if not in_host_namespace():
        raise OSError("--serve needs the host's pid namespace: run it there (hostPID: true in Kubernetes)")


def listen(path: pathlib.Path) -> socket.socket:
    """Listens; a folder that is missing is made. Raises OSError, one line."""
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        _clear(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o666)
    except OSError as error:
        raise OSError(f"--serve {path}: {error.strerror or error}") from None
    _allow_descriptors()
    listener.listen(BACKLOG)
    return listener


def _clear(path: pathlib.Path) -> None:
    """Removes what an agent left that did not end well. Raises OSError if there is anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError("it is there already, and no socket: name another path")
    if is_served(str(path)):
        raise OSError("another agent serves there: end it, or name another path")
    path.unlink()


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
