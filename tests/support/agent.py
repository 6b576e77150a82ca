"""The real agent as a process, and TCP connections of the test's own to be measured."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from support.installed import open_folder

REPOSITORY = pathlib.Path(__file__).parents[2]
PATIENCE = float(os.environ.get("TEST_PATIENCE", "1"))  # so many times as long may anything take: guests compute slowly
LONG_S = 60 * PATIENCE  # for what must come
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


class Agent:
    """One agent; a context manager that ends it. `stdout` and `stderr` are files that collect what it prints."""

    def __init__(
        self,
        folder: pathlib.Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> None:
        """`folder` gets the output; `python` are options of the interpreter, `prefix` a command that becomes it."""
        base = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("OTEL_") and name not in CA_VARIABLES
        }
        defaults = {"OTEL_METRIC_EXPORT_INTERVAL": "500", "OTEL_BSP_SCHEDULE_DELAY": "200"}
        defaults["PYTHONPATH"] = str(REPOSITORY)
        self._stdout_path, self._stderr_path = folder / "stdout", folder / "stderr"
        self._files: list[IO[bytes]] = [path.open("wb") for path in (self._stdout_path, self._stderr_path)]
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *python, "-m", "otel_tcppktlat", *arguments],
            env={**base, **defaults, **(environment or {})},
            stdout=self._files[0],
            stderr=self._files[1],
            cwd=folder,
        )

    @property
    def pid(self) -> int:
        """The agent's process id."""
        return self.process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout_path.read_text()

    @property
    def stderr(self) -> str:
        """What it has complained about so far."""
        return self._stderr_path.read_text()

    def wait_for_stderr(self, text: str, timeout_s: float = 60) -> None:
        """Waits until it has printed `text` on stderr (-v: "attached")."""
        end_s = time.monotonic() + timeout_s * PATIENCE
        while text not in self.stderr:
            assert self.process.poll() is None and time.monotonic() < end_s, self.stderr
            time.sleep(0.02)

    def status(self) -> dict[str, str]:
        """/proc/PID/status."""
        lines = pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def of_threads(self, name: str) -> list[str]:
        """A file of /proc of each thread, but for those that end meanwhile: gRPC's do."""
        found = []
        for thread in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append((thread / name).read_text())
        return found

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Sends a signal and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s * PATIENCE)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for file in self._files:
            file.close()


@contextlib.contextmanager
def serving_agent() -> Iterator[tuple[Agent, pathlib.Path]]:
    """One that serves, and its socket: a short path, in a folder that it made."""
    with open_folder() as folder:
        path = folder / "run/agent.sock"
        with Agent(folder, ["-v", "--serve", str(path)]) as agent:
            agent.wait_for_stderr("otel-tcppktlat: attached")
            yield agent, path


def loader_of(pid: int, timeout_s: float = 60) -> int:
    """The process id of the loader that an agent has just started, or is about to."""
    children, end_s = pathlib.Path(f"/proc/{pid}/task/{pid}/children"), time.monotonic() + timeout_s
    while not (found := children.read_text().split()):
        assert time.monotonic() < end_s, "no loader"
        time.sleep(0.005)
    (loader,) = map(int, found)
    return loader


class Pair:
    """Two connected TCP sockets on loopback; a context manager. `reader` is the server's side."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as server:
            self.port = int(server.getsockname()[1])
            self.sender = socket.create_connection((host, self.port))
            self.reader, _ = server.accept()
        self.sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def wait(self, wait_s: float, length: int = 100) -> None:
        """Sends one segment and reads it after `wait_s`."""
        self.sender.sendall(b"x" * length)
        time.sleep(wait_s)
        assert len(self.reader.recv(length, socket.MSG_WAITALL)) == length

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.sender.close()
        self.reader.close()
