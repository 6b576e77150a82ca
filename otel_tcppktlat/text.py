"""Kernel bytes as text: names that processes chose themselves, and addresses."""

from __future__ import annotations

import ipaddress
import socket


def name_text(name: bytes) -> str:
    """A comm or file name as valid Unicode of at most as many characters as it has bytes."""
    return name.decode("utf-8", errors="replace")


def printable(name: bytes) -> str:
    """The same for a terminal: everything is escaped that could move its cursor, break a line, or is no UTF-8."""
    text = name.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def address_text(family: int, address: bytes) -> str:
    """An address of 16 bytes in network order (IPv4 in the first four) as text."""
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(address[:4]))
    return str(ipaddress.IPv6Address(address))


def network_type(family: int) -> str:
    """OpenTelemetry's network.type."""
    return "ipv4" if family == socket.AF_INET else "ipv6"
