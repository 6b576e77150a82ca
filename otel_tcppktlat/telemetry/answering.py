"""Finds out what answers on a port, for when that is not what an exporter expects.

Two or three connections at most, each with a short timeout; nothing is sent but a greeting.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

LONGEST_S = 1.5  # no connection begins later; the look-up of the name is not counted
_STEP_S = 0.5
_READ_BYTES = 256
_BANNER_LENGTH = 40

Speech = Literal["HTTP/1.1", "HTTP/2"]
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and empty SETTINGS
_ALPN: dict[Speech, str] = {"HTTP/1.1": "http/1.1", "HTTP/2": "h2"}


@dataclass(frozen=True)
class Answer:
    """What a server says, and whether within TLS. `trouble`: instead, why nothing can be known of it."""

    speech: Speech | None = None
    tls: bool = False
    banner: str = ""
    trouble: Literal["refused", "unreachable", "closes", "silent", None] = None


def _greeting(speech: Speech, host: str) -> bytes:
    if speech == "HTTP/2":
        return _PREFACE
    return f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("ascii", "replace")


def _said(first: bytes, tls: bool) -> Answer:
    if not first:
        return Answer(tls=tls, trouble="closes")
    if first.startswith(b"HTTP/1."):
        return Answer("HTTP/1.1", tls)
    if len(first) >= 9 and first[3] in (4, 7) and not any(first[5:9]):  # SETTINGS or GOAWAY, of no stream
        return Answer("HTTP/2", tls)
    line = first.splitlines()[0].decode("ascii", "replace")
    return Answer(tls=tls, banner="".join(c if c.isprintable() and c.isascii() else "?" for c in line)[:_BANNER_LENGTH])


class _Caller:
    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._end_s = time.monotonic() + LONGEST_S

    def _connect(self) -> socket.socket:
        left_s = min(_STEP_S, self._end_s - time.monotonic())
        if left_s <= 0:
            raise TimeoutError
        return socket.create_connection((self._host, self._port), left_s)

    def _exchange(self, sock: socket.socket, speech: Speech, tls: bool) -> Answer:
        try:
            sock.sendall(_greeting(speech, self._host))
            return _said(sock.recv(_READ_BYTES), tls)
        except TimeoutError:
            return Answer(tls=tls, trouble="silent")
        except OSError:
            return Answer(tls=tls, trouble="closes")

    def by_tls(self, speech: Speech) -> Answer | None:
        """None if there is no TLS. Raises OSError if there is no connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # whom the certificate names is the exporter's to judge
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([_ALPN[speech]])
        with self._connect() as plain:
            try:
                with context.wrap_socket(plain, server_hostname=self._host) as sock:
                    agreed = sock.selected_alpn_protocol() is not None
                    answer = self._exchange(sock, speech, tls=True)
                    return replace(answer, speech=speech, banner="") if agreed else answer
            except ssl.SSLError as error:
                alert = "ALERT" in (error.reason or "")
                return Answer(tls=True, trouble="closes") if alert else None
            except (OSError, ValueError):
                return None

    def plainly(self, speech: Speech) -> Answer:
        """Raises OSError if there is no connection."""
        with self._connect() as sock:
            return self._exchange(sock, speech, tls=False)


def what_answers(host: str, port: int, expected: Speech) -> Answer:
    """Asks in TLS, then as expected, then otherwise."""
    order: Sequence[Speech] = ("HTTP/2", "HTTP/1.1") if expected == "HTTP/2" else ("HTTP/1.1", "HTTP/2")
    caller = _Caller(host, port)
    answers: list[Answer] = []
    try:
        if within_tls := caller.by_tls(expected):
            return within_tls if within_tls.speech else caller.by_tls(order[1]) or within_tls
        for speech in order:
            answers.append(caller.plainly(speech))
            if answers[-1].speech:
                return answers[-1]
    except ConnectionRefusedError:
        answers.append(Answer(trouble="refused"))
    except (OSError, UnicodeError):  # no name of a host may be like this one
        answers.append(Answer(trouble="unreachable"))
    return next((one for one in answers if one.banner), answers[0])
