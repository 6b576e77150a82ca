"""Mixed load on one port, until standard input ends. It prints the port. Standard library only.

Streams whose reader stalls now and then, connections of one message, readers that are a process of their own for a
moment, sockets that go with data unread.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
import time

STREAMS, SHORT_S, PROCESS_S, ABANDONED_S = 8, 0.02, 0.2, 0.5
MESSAGE = bytes(100)
over = threading.Event()


def connected(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def serve(sock: socket.socket) -> None:
    """Reads, now and then late, until the sender is done; the first byte says how."""
    with sock:
        kind = sock.recv(1)
        if kind == b"p":  # the reader is a process
            if not os.fork():  # not until the end: it has a copy of the sender's socket, too
                sock.recv(len(MESSAGE), socket.MSG_WAITALL)
                os._exit(0)
        elif kind == b"a":  # abandons what comes
            time.sleep(0.1)
        else:
            while sock.recv(random.choice((30, 100, 10_000))):
                if random.random() < 0.01:
                    time.sleep(random.choice((0.01, 0.1, 0.5)))


def stream(port: int) -> None:
    with connected(port) as sock:
        sock.sendall(b"s")
        while not over.wait(random.expovariate(50)):
            sock.sendall(MESSAGE * random.choice((1, 1, 1, 30)))


def repeat(port: int, kind: bytes, pause_s: float) -> None:
    while not over.wait(pause_s):
        with connected(port) as sock:
            sock.sendall(kind)
            sock.sendall(MESSAGE)


def main() -> None:
    """Runs everything; ends when all that was sent has been read or thrown away."""
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server.settimeout(0.2)
    port = server.getsockname()[1]
    print(port, flush=True)
    readers: list[threading.Thread] = []
    senders = [threading.Thread(target=stream, args=(port,)) for _ in range(STREAMS)]
    for kind, pause_s in ((b"c", SHORT_S), (b"p", PROCESS_S), (b"a", ABANDONED_S)):
        senders.append(threading.Thread(target=repeat, args=(port, kind, pause_s)))
    for sender in senders:
        sender.start()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_the_end).start()
    while any(sender.is_alive() for sender in senders):
        try:
            sock, _ = server.accept()
        except TimeoutError:
            continue
        reader = threading.Thread(target=serve, args=(sock,))
        reader.start()
        readers = [one for one in readers if one.is_alive()] + [reader]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main()
