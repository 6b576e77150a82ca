"""Real traffic whose waits the test decides: a process that reads late, and the connection to it."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys

LENGTH = 100


class SlowReader:
    """The process and a connection to it; a context manager. Its comm may be any bytes, 15 at most."""

    def __init__(self, comm: bytes, port: int, host: str = "127.0.0.1") -> None:
        script = pathlib.Path(__file__).with_name("slow_reader.py")
        command = [sys.executable, str(script), comm.hex(), host, str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.comm, self.host, self.port, self.pid = comm, host, self._answer(), self._process.pid
        self._sender = socket.create_connection((host, self.port))
        self._sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sender_port = int(self._sender.getsockname()[1])

    def _answer(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def wait(self, *waits_s: float) -> None:
        """Sends a segment for each wait, which it reads so much later."""
        assert self._process.stdin
        for wait_s in waits_s:
            self._process.stdin.write(f"{wait_s}\n")
            self._process.stdin.flush()
            self._sender.sendall(b"x" * LENGTH)
            assert self._answer() == LENGTH

    def __enter__(self) -> SlowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.close()
        self._process.kill()
        self._process.wait()
