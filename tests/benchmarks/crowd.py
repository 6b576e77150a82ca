"""Processes that hold many connections to themselves, over loopback: as many series or sockets as a benchmark wants."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .report import BenchmarkError
from .subjects import REPOSITORY, Process, stop

SPARE_DESCRIPTORS = 64
MESSAGE = b"x" * 100
_COMMANDS = ("send", "read")


@dataclass(frozen=True)
class Crowd:
    """Worker processes, each with its share of the connections. Servers' ends read; clients' ends send."""

    workers: Sequence[Process]

    def do(self, command: str) -> None:
        """`send`: a segment on every connection. `read`: each of them is read, whole."""
        assert command in _COMMANDS
        for worker in self.workers:
            assert worker.stdin
            worker.stdin.write(f"{command}\n".encode())
            worker.stdin.flush()
        for worker in self.workers:
            _expect(worker, command)


def _expect(worker: Process, word: str) -> None:
    assert worker.stdout
    if (answer := worker.stdout.readline().strip().decode()) != word:
        raise BenchmarkError(f"a process with many connections said {answer!r} instead of {word!r}")


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
            command = [sys.executable, "-m", "tests.benchmarks.crowd", str(share), str(int(a_port_each))]
            workers.append(subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for worker in workers:
            _expect(worker, "ready")
        yield Crowd(workers)
    finally:
        for worker in workers:
            stop(worker)


def _connect(connections: int, a_port_each: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    ports = connections if a_port_each else 1
    for _ in range(ports):
        with socket.create_server(("127.0.0.1", 0), backlog=4) as server:
            for _ in range(connections // ports):
                client = socket.create_connection(server.getsockname())
                yield client, server.accept()[0]


def _work(connections: int, a_port_each: bool) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    pairs = list(_connect(connections, a_port_each))
    print("ready", flush=True)
    for line in sys.stdin:
        for client, server in pairs:
            if line == "send\n":
                client.send(MESSAGE)
            else:
                server.recv(len(MESSAGE), socket.MSG_WAITALL)
        print(line, end="", flush=True)
    os._exit(0)  # the kernel closes them faster


if __name__ == "__main__":
    _work(int(sys.argv[1]), sys.argv[2] == "1")
