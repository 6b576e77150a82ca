"""Processes that hold many connections to themselves, over loopback: as many series or sockets as a benchmark wants."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .report import BenchmarkError
from .subjects import REPOSITORY, Process, stop

SPARE_DESCRIPTORS = 64
_COMMANDS = ("send", "read")


@dataclass(frozen=True)
class Crowd:
    """Worker processes, each with its share of the connections. Servers' ends read; clients' ends send.

    ports: of the servers.
    """

    workers: Sequence[Process]
    ports: Sequence[int]

    def do(self, command: str) -> None:
        """`send`: a segment on every connection. `read`: each of them is read, whole."""
        assert command in _COMMANDS
        for worker in self.workers:
            assert worker.stdin
            worker.stdin.write(f"{command}\n".encode())
            worker.stdin.flush()
        for worker in self.workers:
            _expect(worker, command)


def _expect(worker: Process, word: str) -> list[str]:
    assert worker.stdout
    answer = worker.stdout.readline().decode().split()
    if answer[:1] != [word]:
        raise BenchmarkError(f"a process with many connections said {answer!r} instead of {word!r}")
    return answer[1:]


def connections_per_process() -> int:
    """As many as the limit of open files allows, two of them each."""
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS) // 2


@contextlib.contextmanager
def crowd(connections: int, a_port_each: bool) -> Iterator[Crowd]:
    """`connections` in all; with a port each, every one of them is a series, otherwise every process is."""
    most = connections_per_process()
    shares = [min(most, connections - done) for done in range(0, connections, most)]
    workers: list[Process] = []
    try:
        for share in shares:
            command = [sys.executable, "-m", "tests.benchmarks.crowd_worker", str(share), str(int(a_port_each))]
            workers.append(subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        yield Crowd(workers, [int(port) for worker in workers for port in _expect(worker, "ready")])
    finally:
        for worker in workers:
            stop(worker)
