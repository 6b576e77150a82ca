"""A process that reads late, as told: its name is argv[1] in hexadecimal, its address argv[2], its port argv[3].

It prints its port. For each line on stdin, seconds, it lets what arrives next wait so long, reads it, and prints how
much that was.
"""

from __future__ import annotations

import ctypes
import socket
import sys
import time

PR_SET_NAME = 15


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, bytes.fromhex(sys.argv[1]))
    host, port = sys.argv[2], int(sys.argv[3])
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    for line in sys.stdin:
        connection.recv(1, socket.MSG_PEEK)
        time.sleep(float(line))
        print(len(connection.recv(65536)), flush=True)


if __name__ == "__main__":
    main()
