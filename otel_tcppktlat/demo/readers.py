"""Two processes for the demo: one reads at once, one lets received data wait now and then."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection

PROMPT, STALLING = "prompt-reader", "stalling-reader"
STALL_S = 0.25
MESSAGE = b"x" * 200
INTERVAL_S = 0.01
_PR_SET_NAME = 15


def _serve(name: str, stall_every: int, ready: Connection) -> None:
    """Accepts one connection and reads it; every so many messages it sleeps first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
    with socket.create_server(("127.0.0.1", 0)) as server:
        ready.send(server.getsockname()[1])
        connection, _ = server.accept()
    for number in range(10**9):
        if stall_every and number % stall_every == stall_every - 1:
            time.sleep(STALL_S)
        if not connection.recv(65536):
            return


class Readers:
    """The two processes and the connections to them; a context manager."""

    def __enter__(self) -> Readers:
        context = multiprocessing.get_context("fork")
        self._processes, self._connections = [], []
        for name, stall_every in ((PROMPT, 0), (STALLING, 40)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(name, stall_every, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            connection = socket.create_connection(("127.0.0.1", ours.recv()))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
        return self

    def send_for(self, seconds: float) -> None:
        """Sends both a message every 10 ms."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            for connection in self._connections:
                connection.send(MESSAGE)
            time.sleep(INTERVAL_S)

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGKILL)
