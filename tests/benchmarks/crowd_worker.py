"""One process of a crowd: crowd_worker.py CONNECTIONS A_PORT_EACH. It does what a line on stdin says, and says so."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterator

MESSAGE = b"x" * 100


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
    print("ready", *{server.getsockname()[1] for _, server in pairs}, flush=True)
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
