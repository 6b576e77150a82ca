"""Real servers of Debian's packages on loopback, and what drives them: clients that ask again as soon as they may."""

from __future__ import annotations

import abc
import contextlib
import csv
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from backends.servers import Server, free_port
from instrumentation.programs import Postgres, Redis

from .machine import Cores
from .report import BenchmarkError

PERCENTILE = 0.99
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Outcome:
    """One measurement; `per_s` and `operations` in the workload's unit. A bulk stream has no latency."""

    per_s: float
    operations: float
    p99_ms: float | None


class Nginx(Server):
    """One worker, which has a body of so many bytes to give."""

    def __init__(self, folder: pathlib.Path, body_bytes: int) -> None:
        self.port = free_port()
        (folder / "body").write_bytes(b"x" * body_bytes)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {folder};" for kind in kinds)
        (folder / "nginx.conf").write_text(
            f"""
            daemon off;
            pid {folder}/nginx.pid;
            worker_processes 1;
            user nobody nogroup;
            events {{ worker_connections 1024; }}
            http {{
                access_log off;
                sendfile on;
                tcp_nopush on;
                keepalive_requests 1000000000;
                {temporary}
                server {{
                    listen 127.0.0.1:{self.port};
                    root {folder};
                }}
            }}
            """
        )
        command = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
        super().__init__("nginx", command, f"127.0.0.1:{self.port}", folder)


class Iperf3(Server):
    """For one client after the other."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.port = free_port()
        command = ["iperf3", "--server", "--forceflush", "--bind=127.0.0.1", f"--port={self.port}"]
        super().__init__("iperf3", command, f"127.0.0.1:{self.port}", folder)

    def _answers(self) -> bool:
        *_, last = self.log.split("Server listening on")  # a connection to see would be a client that fails
        return len(last.splitlines()) == 2  # (test #N), a rule, and nothing about a client yet


class Workload(abc.ABC):
    """A server, which is not started yet, and its client."""

    title: ClassVar[str]
    unit: ClassVar[str] = "requests/s"
    digits: ClassVar[int] = 0
    latency: ClassVar[bool] = True
    tools: ClassVar[Sequence[str]]

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.server = self.make_server(folder)

    @property
    def port(self) -> str:
        """The server's."""
        return self.server.ready.rpartition(":")[2]

    @abc.abstractmethod
    def make_server(self, folder: pathlib.Path) -> Server:
        """It listens on loopback, and its `ready` is the address."""

    @contextlib.contextmanager
    def running(self, cores: Cores) -> Iterator[None]:
        """Has the server run on the measured core."""
        try:
            with cores.measured_alone():
                self.server.start()
            self.server.wait_until_ready()
            yield
        finally:
            self.server.stop()

    def prepare(self) -> None:
        """What is to be done once, when the server runs: a first slice, unless there is more."""
        self.drive(1)

    @abc.abstractmethod
    def drive(self, seconds: int) -> Outcome:
        """Keeps it busy for so long, or about that."""


def run(command: Sequence[str], folder: pathlib.Path) -> str:
    """What a client prints. Raises BenchmarkError if it did not do well."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        raise BenchmarkError(f"{command[0]} ended with status {done.returncode}: {said[-300:]}")
    return done.stdout


def find(pattern: str, said: str) -> tuple[str, ...]:
    """The groups of a pattern in what a client printed. Raises BenchmarkError if it printed something else."""
    found = re.search(pattern, said)
    if not found:
        raise BenchmarkError(f"a client did not say what it measured: {' '.join(said.split())[-300:]}")
    return found.groups()


class RedisGet(Workload):
    """redis-benchmark knows a number of requests and no time: as many as fit."""

    title = "redis-server, GET"
    tools = ("redis-server", "redis-benchmark")
    pipeline: ClassVar[int] = 1

    def make_server(self, folder: pathlib.Path) -> Server:
        return Redis(folder)

    def prepare(self) -> None:
        self._per_s = 20_000.0
        for _ in range(2):
            self._per_s = self.drive(1).per_s

    def drive(self, seconds: int) -> Outcome:
        requests = max(1000, round(self._per_s * seconds))
        asked = ["-p", self.port, "-n", str(requests), "-P", str(self.pipeline)]
        said = run(["redis-benchmark", "-t", "get", "-c", "50", "--csv", *asked], self.folder)
        (row,) = csv.DictReader(said.splitlines())
        return Outcome(float(row["rps"]), requests, float(row["p99_latency_ms"]))


class RedisPipelined(RedisGet):
    title = "redis-server, GET, 16 pipelined"
    pipeline = 16


class NginxSmall(Workload):
    """A file over connections that stay."""

    title = "nginx, 600 bytes"
    tools = ("nginx", "wrk")
    body_bytes: ClassVar[int] = 600
    connections: ClassVar[int] = 50

    def make_server(self, folder: pathlib.Path) -> Server:
        return Nginx(folder, self.body_bytes)

    def drive(self, seconds: int) -> Outcome:
        asked = ["--latency", "-t1", f"-c{self.connections}", f"-d{seconds}s", f"http://127.0.0.1:{self.port}/body"]
        said = run(["wrk", *asked], self.folder)
        if "Non-2xx" in said or "Socket errors" in said:
            raise BenchmarkError(f"wrk could not drive nginx: {' '.join(said.split())}")
        (rate,), (requests,) = find(r"Requests/sec:\s+([0-9.]+)", said), find(r"(\d+) requests in", said)
        p99, unit = find(r"99%\s+([0-9.]+)(us|ms|s)\b", said)
        return Outcome(float(rate), int(requests), float(p99) * _MS[unit])


class NginxLarge(NginxSmall):
    title = "nginx, 1 MB"
    body_bytes = 1_000_000
    connections = 10


class PostgresSelect(Workload):
    title = "PostgreSQL, pgbench -S"
    unit = "transactions/s"
    tools = ()

    def make_server(self, folder: pathlib.Path) -> Server:
        server = Postgres(folder)
        self._binaries = server.binaries
        return server

    def _pgbench(self, *arguments: str) -> str:
        at = ["--host=127.0.0.1", f"--port={self.port}", "--username=test", "postgres"]
        return run([str(self._binaries / "pgbench"), *arguments, *at], self.folder)

    def prepare(self) -> None:
        self._pgbench("--initialize", "--quiet", "--scale=1")
        super().prepare()

    def drive(self, seconds: int) -> Outcome:
        for log in self.folder.glob("pgbench_log*"):
            log.unlink()
        said = self._pgbench("--select-only", "--no-vacuum", "--client=8", f"--time={seconds}", "--log")
        (failed,), (rate,) = find(r"failed transactions: (\d+)", said), find(r"tps = ([0-9.]+)", said)
        if int(failed):
            raise BenchmarkError(f"pgbench failed: {' '.join(said.split())}")
        took_us = sorted(
            int(line.split()[2]) for log in self.folder.glob("pgbench_log*") for line in log.read_text().splitlines()
        )
        return Outcome(float(rate), len(took_us), took_us[int(PERCENTILE * len(took_us))] / 1e3)


class BulkStream(Workload):
    """What the server's end receives."""

    title = "iperf3, one stream"
    unit = "Gbit/s"
    digits = 1
    latency = False
    tools = ("iperf3",)

    def make_server(self, folder: pathlib.Path) -> Server:
        return Iperf3(folder)

    def drive(self, seconds: int) -> Outcome:
        self.server.wait_until_ready()  # it is done with a client a moment after the client is
        said = run(["iperf3", "--client=127.0.0.1", f"--port={self.port}", f"--time={seconds}", "--json"], self.folder)
        found = json.loads(said)
        if "error" in found:
            raise BenchmarkError(f"iperf3 failed: {found['error']}")
        received = found["end"]["sum_received"]
        return Outcome(received["bits_per_second"] / 1e9, received["bytes"] * 8 / 1e9, None)


WORKLOADS: Mapping[str, type[Workload]] = {
    "redis": RedisGet,
    "redis-pipelined": RedisPipelined,
    "nginx": NginxSmall,
    "nginx-1mb": NginxLarge,
    "postgres": PostgresSelect,
    "iperf3": BulkStream,
}


def make(name: str, folder: pathlib.Path) -> Workload:
    """The workload of a name; `folder` may be entered by any user. Raises BenchmarkError if a program is missing."""
    kind = WORKLOADS[name]
    for tool in kind.tools:
        if not shutil.which(tool):
            raise BenchmarkError(f"{tool} is missing: install it (make bench-tools)")
    return kind(folder)
