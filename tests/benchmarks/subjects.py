"""What is measured: subjects that trace in a process of their own, one at a time."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON

from .kernel import RECEIVE_HOOKS, Kernel, Link
from .report import BenchmarkError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TCPPKTLAT = REPOSITORY / "tests" / "support" / "tcppktlat"
FLAVOURS = ("typed", "raw")
START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
SETTLE_S = 0.3  # after attaching: the agent starts its exporters, tcppktlat its reader
QUIET_LIMIT_S = 600.0
DISTURBED = "another program traces tcp_probe or tcp_rcv_space_adjust: end it, or use --not-alone"

Process = subprocess.Popen[bytes]


class Cores:
    """`measured` is the ping-pong's."""

    def __init__(self) -> None:
        self._all = sorted(os.sched_getaffinity(0))
        self.measured = self._all[0]

    @contextmanager
    def kept_apart(self) -> Iterator[None]:
        """This process and all that it starts leave the measured core alone, if there is another one."""
        os.sched_setaffinity(0, self._all[1:] or self._all)
        yield
        os.sched_setaffinity(0, self._all)


@dataclass(frozen=True)
class Subject:
    """`start` returns the process that will hold the programs; None where nothing traces."""

    kind: str
    flavour: str = ""
    start: Callable[[], Process] | None = None

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.kind}, {self.flavour}" if self.flavour else self.kind


NOTHING, EMPTY, OURS, PROTOTYPE, PEER = "nothing", "empty programs", "otel-tcppktlat", "prototype", "tcppktlat"


def subjects(endpoint: str, with_peer: bool) -> list[Subject]:
    """All of them, in the order in which a round measures them; the agent exports to `endpoint`."""

    def held(kind: str, programs: str, flavour: str) -> Subject:
        return Subject(kind, flavour, lambda: _start_holder(programs, flavour))

    def ours(flavour: str) -> Subject:
        return Subject(OURS, flavour, lambda: start_agent(flavour, endpoint))

    found = [Subject(NOTHING)]
    for flavour in FLAVOURS:
        found += [
            held(EMPTY, "empty", flavour),
            ours(flavour),
            held(PROTOTYPE, "prototype", flavour),
        ]
    return [*found, Subject(PEER, start=_start_peer)] if with_peer else found


def _start_holder(programs: str, flavour: str) -> Process:
    return subprocess.Popen(
        [DISTRIBUTION_PYTHON, "-m", "tests.benchmarks.prototype.hold", programs, flavour],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
    )


def start_agent(
    flavour: str,
    endpoint: str,
    environment: Mapping[str, str] | None = None,
    verbose: bool = False,
    stderr: IO[bytes] | int | None = None,
) -> Process:
    """The product, exporting to `endpoint`: default settings but for `environment`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "otel_tcppktlat",
            "--flavour",
            flavour,
            "--otlp",
            endpoint,
            *(["-v"] if verbose else []),
        ],
        cwd=REPOSITORY,
        env={**inherited, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def peer_runs() -> bool:
    """Can tcppktlat be had? Its first use downloads it."""
    return (
        subprocess.run([TCPPKTLAT, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    )


def _start_peer() -> Process:
    return subprocess.Popen([TCPPKTLAT], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def stop(process: Process) -> None:
    """Ends a process that this module started."""
    if process.stdin:
        process.stdin.close()
    else:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def tracing(subject: Subject, kernel: Kernel) -> Iterator[list[Link]]:
    """Runs a subject; gives its programs on the receive path once all are attached."""
    wait_until_quiet(kernel)
    if subject.start is None:
        yield []
        return
    process = subject.start()
    try:
        links = wait_until_attached(process, kernel)
        time.sleep(SETTLE_S)
        yield links
    finally:
        stop(process)


def wait_until_attached(process: Process, kernel: Kernel, poll_s: float = 0.02) -> list[Link]:
    """The programs of a process that has just started. Raises BenchmarkError when it ends instead."""
    end_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise BenchmarkError(f"{process.args!r} ended with status {process.returncode}")
        links = kernel.links_of(process.pid)
        if {link.tracepoint for link in links} == set(RECEIVE_HOOKS):
            return links
        time.sleep(poll_s)
    raise BenchmarkError(f"{process.args!r} attached nothing within {START_LIMIT_S:g} s")


def wait_until_quiet(kernel: Kernel) -> None:
    """Waits until nobody else traces the receive path. Raises BenchmarkError when that takes too long."""
    end_s = time.monotonic() + QUIET_LIMIT_S
    while kernel.disturbed():
        if time.monotonic() > end_s:
            raise BenchmarkError(DISTURBED)
        time.sleep(0.2)
