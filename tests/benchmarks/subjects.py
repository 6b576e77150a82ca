"""What is measured: programs of processes that are all running; one set at a time is attached."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON

from .kernel import RECEIVE_HOOKS, Kernel, Link
from .report import BenchmarkError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TCPPKTLAT = REPOSITORY / "tests" / "support" / "tcppktlat"
FLAVOURS = ("typed", "raw")
NOTHING, EMPTY, CLOCKS, OURS = "nothing", "empty programs", "the clock alone", "otel-tcppktlat"
PROTOTYPE, PEER = "prototype", "tcppktlat"
FLOODED = "otel-tcppktlat 1"  # every pickup wants a span
DISTURBED = "another program traces tcp_probe or tcp_rcv_space_adjust: end it, or use --not-alone"
START_LIMIT_S, STOP_LIMIT_S, QUIET_LIMIT_S = 60.0, 15.0, 600.0

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Subject:
    """One set of programs. They stay loaded as long as `process` runs; `tracing` attaches them."""

    kind: str
    flavour: str = ""
    process: Process | None = None
    links: Sequence[Link] = ()

    @property
    def label(self) -> str:
        """Its name in tables."""
        return label(self.kind, self.flavour)

    @contextmanager
    def tracing(self, kernel: Kernel) -> Iterator[list[Link]]:
        """Attaches the programs; gives those of the receive path."""
        descriptors = [kernel.attach(link, typed=self.flavour == "typed") for link in self.links]
        try:
            yield kernel.links_of(os.getpid())
        finally:
            for fd in descriptors:
                os.close(fd)


def label(kind: str, flavour: str) -> str:
    """A subject's name in tables."""
    return f"{kind}, {flavour}" if flavour else kind


@contextmanager
def loaded_subjects(
    endpoint: str,
    kernel: Kernel,
    flavours: Sequence[str] = FLAVOURS,
    kinds: Sequence[str] = (EMPTY, CLOCKS, OURS, PROTOTYPE),
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[list[Subject]]:
    """All that can be detached, in the order in which a round measures them.

    The agents export to `endpoint`, with this environment and these arguments.
    """

    def agent(flavour: str, *more: str) -> Process:
        return start_agent(flavour, endpoint, environment, arguments=[*more, *arguments], detachable=True)

    starts: Mapping[str, Callable[[str], Process]] = {
        EMPTY: lambda flavour: start_holder("empty", flavour),
        CLOCKS: lambda flavour: start_holder("clocks", flavour),
        OURS: agent,
        FLOODED: lambda flavour: agent(flavour, "1"),
        PROTOTYPE: lambda flavour: start_holder("prototype", flavour),
    }
    started = (Subject(kind, flavour, starts[kind](flavour)) for flavour in flavours for kind in kinds)
    with detached(started, kernel) as subjects:
        yield [Subject(NOTHING), *subjects]


@contextmanager
def detached(started: Iterable[Subject], kernel: Kernel) -> Iterator[list[Subject]]:
    """Subjects whose processes are started as this asks for each; with nothing attached, and ended at the end."""
    subjects: list[Subject] = []
    try:
        for subject in started:
            subjects.append(subject)
        yield [_detached(subject, kernel) for subject in subjects]
    finally:
        for subject in subjects:
            if subject.process:
                stop(subject.process)


def _detached(subject: Subject, kernel: Kernel) -> Subject:
    """Waits for its programs, remembers them, and has the process let go of them."""
    process = subject.process
    assert process
    wait_until_attached(process, kernel)
    links = kernel.links_of(process.pid, receive_only=False)
    assert process.stdin
    process.stdin.write(b"detach\n")
    process.stdin.flush()
    while process.poll() is None and kernel.links_of(process.pid):
        time.sleep(0.01)
    return Subject(subject.kind, subject.flavour, process, links)


def start_holder(programs: str, flavour: str) -> Process:
    """Programs of prototype/, loaded and attached."""
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
    *,
    arguments: Sequence[str] = (),
    detachable: bool = False,
    verbose: bool = False,
    stderr: IO[bytes] | int | None = None,
) -> Process:
    """The product, exporting to `endpoint`: default settings but for `environment`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    module = "tests.benchmarks.detachable" if detachable else "otel_tcppktlat"
    return subprocess.Popen(
        [sys.executable, "-m", module, "--flavour", flavour, "--otlp", endpoint, *["-v"] * verbose, *arguments],
        cwd=REPOSITORY,
        env={**inherited, **(environment or {})},
        stdin=subprocess.PIPE if detachable else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def peer_runs() -> bool:
    """Can tcppktlat be had? Its first use downloads it."""
    nowhere = subprocess.DEVNULL
    return subprocess.run([TCPPKTLAT, "--version"], stdout=nowhere, stderr=nowhere).returncode == 0


@contextmanager
def tracing_peer(kernel: Kernel) -> Iterator[list[Link]]:
    """tcppktlat, started and ended: it cannot be detached."""
    process = subprocess.Popen([TCPPKTLAT], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield wait_until_attached(process, kernel)
    finally:
        stop(process)


def stop(process: Process) -> None:
    """Ends a process that this module started."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin:
        process.stdin.close()


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


def wait_until_quiet(kernel: Kernel, ours: Sequence[Link] = ()) -> None:
    """Waits until nobody else traces the receive path. Raises BenchmarkError when that takes too long."""
    end_s = time.monotonic() + QUIET_LIMIT_S
    while kernel.disturbed(ours):
        if time.monotonic() > end_s:
            raise BenchmarkError(DISTURBED)
        time.sleep(0.2)
