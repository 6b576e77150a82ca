"""The loopback address, and ports on it that stay the receiver's while its servers are away."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def reserve(ports: tuple[int, int]) -> tuple[socket.socket, socket.socket]:
    """Two loopback sockets, bound and never listening.

    They hold the ports while the servers are away: others cannot be given them, connections to them are refused, and a
    server that sets SO_REUSEADDR, as both here do, can still bind and listen.
    """
    sockets: list[socket.socket] = []
    try:
        for port in ports:
            reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sockets.append(reservation)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind((LOOPBACK, port))
    except BaseException:
        for reservation in sockets:
            reservation.close()
        raise
    return sockets[0], sockets[1]
