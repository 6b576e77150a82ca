"""Starts the loader process and receives what it leaves: descriptors of maps, programs and links."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ProbeError
from .loader import START

DISTRIBUTION_PYTHON = "/usr/bin/python3"  # where the distribution's bcc lives
_PACKAGE_PARENT = pathlib.Path(__file__).resolve().parents[2]
_MAX_DESCRIPTORS = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What the loader left. Names are map:NAME, program:NAME and link:NAME.

    `refused`: why the flavour is not the best one of this kernel, or nothing.
    `ids`: whether process and thread ids are the `same` in this pid namespace as in the programs, the host's; or else
    those that were asked for could be `translated`, or this process's own is `unknown`.
    """

    flavour: str
    refused: str
    offsets: str
    ids: Literal["same", "translated", "unknown"]
    seconds: dict[str, float]
    descriptors: dict[str, int]


def bpf_folder() -> pathlib.Path:
    """Where the BPF programs are: inside the installed package, or beside it in a checkout."""
    for folder in (pathlib.Path(__file__).parents[1] / "bpf", _PACKAGE_PARENT / "bpf"):
        if (folder / "maps.h").exists():
            return folder
    raise ProbeError("the BPF programs are missing from this installation: install otel-tcppktlat again")


def _unanswered(status: int) -> str:
    if status < 0:
        what = f"signal {-status} ({signal.strsignal(-status)})"
        return f"{what} ended the loader while it compiled; if it was for want of memory, the kernel's log says so"
    return f"the loader ended without an answer (status {status})"


class Loader:
    """One loader process, running beside the caller until `finish`."""

    def __init__(self, request: dict[str, Any], pythons: tuple[str, ...] = ()) -> None:
        """Starts it. `pythons`: interpreters to try until one has bcc (default: the distribution's, ours)."""
        candidates = pythons or (DISTRIBUTION_PYTHON, sys.executable)
        usable = [python for python in dict.fromkeys(candidates) if os.access(python, os.X_OK)]
        if not usable:
            raise ProbeError(
                f"there is no Python to run the loader with: install {DISTRIBUTION_PYTHON} and python3-bpfcc"
            )
        self._channel, theirs = socket.socketpair()
        # Memory, not a pipe: a verifier's log is larger than a pipe that nobody reads yet.
        self._stderr = open(os.memfd_create("loader's stderr"), "w+b")
        with theirs:
            self._child = subprocess.Popen(
                [usable[0], "-I", "-c", START, str(_PACKAGE_PARENT), str(theirs.fileno()), *usable[1:]],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                cwd="/",  # bcc changes to it and back, and this one may be out of the user's reach
                start_new_session=True,  # Ctrl-C is for the agent, which then ends the loader
            )
        with contextlib.suppress(ConnectionError):  # it has ended already: finish() says how
            self._channel.sendall(json.dumps({"bpf": str(bpf_folder()), **request}).encode() + b"\n")

    def _receive(self) -> tuple[dict[str, Any], list[int], str]:
        text = b""
        descriptors: list[int] = []
        with contextlib.suppress(ConnectionError):  # it ended before it had read the request
            while not text.endswith(b"\n"):
                data, fds, _flags, _address = socket.recv_fds(self._channel, 65536, _MAX_DESCRIPTORS)
                text, descriptors = text + data, descriptors + list(fds)
                if not data:
                    break
        self._child.wait()
        self._stderr.seek(0)
        stderr = self._stderr.read()
        self._close()
        answer = json.loads(text) if text.endswith(b"\n") else {"error": _unanswered(self._child.returncode)}
        return answer, descriptors, stderr.decode(errors="replace")

    def fileno(self) -> int:
        """A descriptor that becomes readable when the loader has answered or ended."""
        return self._channel.fileno()

    def finish(self) -> Loaded:
        """Waits for the loader to end. Raises ProbeError with its reason."""
        answer, descriptors, stderr = self._receive()
        if "error" in answer:
            _log.debug("the loader said: %s", stderr.strip())
            raise ProbeError(answer["error"].splitlines()[0])
        return Loaded(
            flavour=answer["flavour"],
            refused=answer["refused"],
            offsets=answer["offsets"],
            ids=answer["ids"],
            seconds=answer["seconds"],
            descriptors=dict(zip(answer["descriptors"], descriptors, strict=True)),
        )

    def cancel(self) -> None:
        """Ends a loader that nobody waits for."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._close()

    def _close(self) -> None:
        self._channel.close()
        self._stderr.close()
