"""A hand-made TCP peer behind a TUN device: it sends any segment in any order to real kernel sockets.

    with TunPeer() as peer:
        conversation = peer.accept("ipv4", isn=0xFFFFFF00)
        conversation.send(100, at=100)                      # a gap
        conversation.send(100)                              # filled
        assert conversation.last_ack == 200
        assert conversation.socket.recv(200) == expected(0, 200)

The sockets and the TUN device live in an anonymous network namespace; the process itself stays in its own. It needs
root, /dev/net/tun and iproute2's `ip`.

Offsets are payload bytes of the peer's stream: byte 0 has the sequence number ISN + 1. They are plain integers that
don't wrap. A FIN takes the offset after the last byte.

Writing a packet to the TUN device (without IFF_NAPI, as here) calls netif_receive_skb() before write() returns: IP and
TCP are through with the segment when `send` returns, there is no GRO, and the ACK that it caused, unless delayed or
compressed by TCP, is ready to be read. There is one exception: while another thread is inside a system call that has
locked the socket (recv, mostly), the segment waits in the socket's backlog until that call unlocks it. TCP counts it
(`tcp_info_data_segs_in`) before that; `Conversation.settle` waits for it.

The kernel drops what lies wholly beyond its window (it keeps a segment that merely sticks out), and, without a reader,
its window is full after some 64 KiB: `window`, `send_many(..., within_window=True)`. Small segments cost it far more
memory than their payload, so it also collapses its queues, or drops segments out of order, inside the window.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import logging
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

logging.getLogger("scapy.runtime").setLevel(logging.ERROR)

from scapy.layers.inet import IP, TCP  # noqa: E402
from scapy.layers.inet6 import IPv6  # noqa: E402

Family = Literal["ipv4", "ipv6", "mapped"]
Result = TypeVar("Result")

LOCAL_IPV4, PEER_IPV4 = "10.77.0.1", "10.77.0.2"
LOCAL_IPV6, PEER_IPV6 = "fd77::1", "fd77::2"
DEVICE = "tun77"
WSCALE = 7  # the peer's window scale: its window's unit is 128 bytes
DEFAULT_ISN = 1_000_000

_CLONE_NEWNET = 0x40000000
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_FIN, _SYN, _RST, _PSH, _ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_FLAG_BITS = {letter: 1 << bit for bit, letter in enumerate("FSRPAUEC")}
_MASK = 0xFFFFFFFF
_PATTERN = random.Random(77).randbytes(65521)  # a prime length, so that no power of two repeats it
_PATTERN_LONG = _PATTERN * 3

_libc = ctypes.CDLL(None, use_errno=True)


def expected(offset: int, length: int) -> bytes:
    """The payload bytes of the peer's stream from `offset` (>= 0) on, `length` bytes."""
    start = offset % len(_PATTERN)
    if start + length <= len(_PATTERN_LONG):
        return _PATTERN_LONG[start : start + length]
    return (_PATTERN * ((start + length) // len(_PATTERN) + 1))[start : start + length]


def tcp_info_data_segs_in(sock: socket.socket) -> int:
    """tcpi_data_segs_in: how many segments with payload TCP got for this socket, useless ones and backlog included.

    Modulo 2**32. Raises OSError if the socket is closed. The call takes the socket's lock, thus waits for its backlog.
    """
    value: int = struct.unpack_from("=I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232), 152)[0]
    return value


def tcp_info_bytes_received(sock: socket.socket) -> int:
    """tcpi_bytes_received: how far TCP's rcv_nxt has come: payload bytes received in order, each once (a FIN counts).

    Raises OSError if the socket is closed.
    """
    value: int = struct.unpack_from("=Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232), 128)[0]
    return value


def _signed(difference: int) -> int:
    """A difference of sequence numbers as a signed 32-bit number."""
    return ((difference + 0x80000000) & _MASK) - 0x80000000


def _sum16(data: bytes) -> int:
    """A number congruent, modulo 65535, to the sum of the 16-bit words (the last byte padded with a zero)."""
    number = int.from_bytes(data, "big")
    return (number << 8 if len(data) & 1 else number) % 65535


def _checksum(total: int) -> int:
    """The internet checksum of words whose sum, not 0, is congruent to `total`."""
    return 65535 - (total % 65535 or 65535)


def _flag_bits(flags: str) -> int:
    return sum(_FLAG_BITS[letter] for letter in set(flags))


def _system(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def _in_thread(function: Callable[[], Result]) -> Result:
    """The result of `function`, or its exception, from a thread of its own (which may change its namespace)."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="tun-netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Conversation:
    """One connection between a real socket and the peer; made by `TunPeer.accept` and `TunPeer.connect`.

    Attributes:
        socket: the real socket, blocking; the TunPeer aborts and closes it at its end.
        isn: the peer's initial sequence number; byte 0 of its stream is at isn + 1 (modulo 2**32).
        peer_port, local_port: the TCP ports of the peer and of the real socket.
        next_offset: where `send` without `at` continues, in bytes. A segment from `at` on moves it to its end if
            at <= next_offset < end, nothing else does: what was sent beyond a gap doesn't count when the gap is filled.
        timestamps: whether segments carry the timestamp option (milliseconds), as agreed in the handshake.
    """

    socket: socket.socket

    def __init__(
        self, peer: TunPeer, family: Family, isn: int, peer_port: int, *, window: int, mss: int, timestamps: bool
    ) -> None:
        """Used by TunPeer only."""
        self._peer = peer
        self._ipv6 = family == "ipv6"
        self.isn = isn & _MASK
        self.peer_port = peer_port
        self.local_port = 0
        self.next_offset = 0
        self.timestamps = timestamps
        self._window_field = min(window >> WSCALE, 0xFFFF)
        self._syn_window = min(window, 0xFFFF)
        self._mss = mss
        self._acked = -1  # the SYN is not acknowledged
        self._window = 0
        self._wscale = 0
        self._irs: int | None = None  # the kernel's initial sequence number
        self._received = bytearray()
        self._got_fin = False
        self._reset = False
        self._ts_recent = 0
        self._template = b""
        self._ip_sum = self._tcp_sum = self._ip_length = 0

    # --- what the kernel said ---

    @property
    def last_ack(self) -> int:
        """The highest acknowledgement number that the kernel sent so far, as an offset in bytes (a FIN counts as one).

        0 after the handshake. Everything the kernel has sent is read first, but it may delay an ACK: `wait_acked`.
        """
        self._peer._drain()
        return self._acked

    @property
    def window(self) -> int:
        """The receive window that the kernel advertised last, in bytes: it accepts offsets < last_ack + window."""
        self._peer._drain()
        return self._window

    @property
    def received(self) -> bytes:
        """What the peer got in order from the real socket; it was acknowledged at once."""
        self._peer._drain()
        with self._peer._changed:
            return bytes(self._received)

    @property
    def got_fin(self) -> bool:
        """Whether the peer got the real socket's FIN, after all its data."""
        self._peer._drain()
        return self._got_fin

    @property
    def reset(self) -> bool:
        """Whether the kernel sent an RST."""
        self._peer._drain()
        return self._reset

    def wait_acked(self, offset: int, timeout_s: float = 5) -> None:
        """Waits until the kernel has acknowledged everything before `offset` (bytes; one more for a FIN).

        Raises TimeoutError after `timeout_s` seconds, ConnectionResetError if the kernel reset the connection.
        """
        self._wait(lambda: self._acked >= offset, f"an ACK of {offset}", timeout_s)

    def settle(self) -> None:
        """Waits until the kernel is through with all that was sent, a locked socket's backlog included.

        Only needed while other threads use the socket. Raises OSError if the socket is closed.
        """
        tcp_info_data_segs_in(self.socket)

    def _wait(self, reached: Callable[[], bool], what: str, timeout_s: float) -> None:
        self._peer._drain()
        with self._peer._changed:
            self._peer._changed.wait_for(lambda: self._reset or reached(), timeout_s)
            if reached():
                return
            state = f"waiting for {what} (acknowledged: {self._acked}, window: {self._window})"
        if self._reset:
            raise ConnectionResetError(f"the kernel sent an RST: {state}")
        raise TimeoutError(f"{timeout_s} s over: {state}")

    # --- what the peer sends ---

    def send(self, data: int | bytes, at: int | None = None, *, flags: str = "PA", **fields: Any) -> None:
        """Sends one segment.

        Args:
            data: the payload, or its length in bytes (0 to 65,400; larger than the MTU is fine) for `expected` bytes.
            at: the payload's first offset, any; None: next_offset.
            flags: TCP flags, letters of FSRPAUEC.
            fields: fields of scapy's TCP that replace the usual ones (seq, ack, window, urgptr, options, chksum...).

        Raises ValueError if the segment is too long for an IP packet, OSError if the TunPeer is closed.
        """
        start = self.next_offset if at is None else at
        payload = expected(start, data) if isinstance(data, int) else data
        self._emit(start, _flag_bits(flags), payload, fields)
        self._advance(start, len(payload))

    def send_many(
        self,
        lengths: Iterable[int],
        at: int | Iterable[int] | None = None,
        *,
        flags: str = "PA",
        within_window: bool = False,
        timeout_s: float = 5,
    ) -> None:
        """Sends many segments of `expected` bytes, fast (some 10 us each).

        Args:
            lengths: each segment's payload in bytes.
            at: the first segment's offset, with the others following without gaps; None: next_offset. Or each segment's
                own offset, as many as lengths: any order, gaps, duplicates.
            flags: as in `send`.
            within_window: before each segment, wait until it fits the advertised window, thus somebody must read the
                socket. False: send anyway; the kernel drops what is beyond its window.
            timeout_s: for each such wait, in seconds.

        Raises ValueError as `send` or if at and lengths differ in number, TimeoutError and ConnectionResetError with
        within_window.
        """
        bits = _flag_bits(flags)
        if at is None or isinstance(at, int):
            sizes = list(lengths)
            start = self.next_offset if at is None else at
            starts: Iterable[int] = itertools.accumulate(sizes[:-1], initial=start) if sizes else ()
        else:
            sizes, starts = list(lengths), list(at)
            if len(sizes) != len(starts):
                raise ValueError(f"{len(sizes)} lengths, but {len(starts)} offsets")
        for begin, size in zip(starts, sizes):  # noqa: B905
            if within_window and begin + size > self._acked + self._window:
                self._wait_room(begin + size, timeout_s)
            self._emit(begin, bits, expected(begin, size))
            self._advance(begin, size)

    def _wait_room(self, end: int, timeout_s: float) -> None:
        self._wait(lambda: end <= self._acked + self._window, f"a window up to {end}", timeout_s)

    def fin(self, at: int | None = None, **fields: Any) -> None:
        """Sends a FIN without payload at offset `at` (None: next_offset). Acknowledged, it makes last_ack at + 1."""
        self._emit(self.next_offset if at is None else at, _FIN | _ACK, b"", fields)

    def rst(self, at: int | None = None, **fields: Any) -> None:
        """Sends an RST at offset `at`; None: where the kernel expects it (elsewhere it answers a challenge ACK)."""
        self._peer._drain()
        self._emit(self._current() if at is None else at, _RST | _ACK, b"", fields)

    def ack(self, at: int | None = None, **fields: Any) -> None:
        """Sends a bare ACK of all that was received, with the sequence number of offset `at`; None: the current one."""
        self._peer._drain()
        self._emit(self._current() if at is None else at, _ACK, b"", fields)

    def _current(self) -> int:
        """The offset that a segment without payload should have for the kernel to accept it."""
        best = max(self.next_offset, self._acked)
        return best if best <= self._acked + self._window else self._acked

    def _advance(self, start: int, length: int) -> None:
        if start <= self.next_offset < start + length:
            self.next_offset = start + length

    def _ack_number(self) -> int:
        return 0 if self._irs is None else (self._irs + 1 + len(self._received) + self._got_fin) & _MASK

    def _options(self, bits: int) -> list[tuple[str, Any]]:
        stamp = ("Timestamp", (int(time.monotonic() * 1000) & _MASK, self._ts_recent))
        if not bits & _SYN:
            return [("NOP", None), ("NOP", None), stamp] if self.timestamps else []
        options: list[tuple[str, Any]] = [("MSS", self._mss), ("NOP", None), ("WScale", WSCALE)]
        options += [("SAckOK", b""), stamp] if self.timestamps else [("NOP", None), ("NOP", None), ("SAckOK", b"")]
        return options

    def _build(self, offset: int, bits: int, payload: bytes, fields: dict[str, Any]) -> bytes:
        """The packet, by scapy."""
        tcp: dict[str, Any] = {
            "sport": self.peer_port,
            "dport": self.local_port,
            "seq": (self.isn + 1 + offset) & _MASK,
            "ack": self._ack_number(),
            "flags": bits,
            "window": self._syn_window if bits & _SYN else self._window_field,
            "options": self._options(bits),
        }
        below: Any = (
            IPv6(src=PEER_IPV6, dst=LOCAL_IPV6) if self._ipv6 else IP(src=PEER_IPV4, dst=LOCAL_IPV4, flags="DF", id=0)
        )
        return bytes(below / TCP(**tcp | fields) / payload)

    def _patch(self, offset: int, bits: int, payload: bytes) -> bytes:
        """The same packet as `_build` makes (no SYN), from a template of its headers."""
        if not self._template:
            self._make_template()
        ip = self._ip_length
        packet = bytearray(self._template)
        tcp_length = len(packet) - ip + len(payload)
        if tcp_length + (0 if self._ipv6 else ip) > 65535:
            raise ValueError(f"{len(payload)} bytes of payload are too many for an IP packet")
        seq, ack = (self.isn + 1 + offset) & _MASK, self._ack_number()
        total = self._tcp_sum + tcp_length + seq + ack + bits + _sum16(payload)
        struct.pack_into("!II", packet, ip + 4, seq, ack)
        packet[ip + 13] = bits
        if self.timestamps:
            value, echo = int(time.monotonic() * 1000) & _MASK, self._ts_recent
            struct.pack_into("!II", packet, ip + 24, value, echo)
            total += value + echo
        struct.pack_into("!H", packet, ip + 16, _checksum(total))
        if self._ipv6:
            struct.pack_into("!H", packet, 4, tcp_length)
        else:
            struct.pack_into("!H", packet, 2, tcp_length + ip)
            struct.pack_into("!H", packet, 10, _checksum(self._ip_sum + tcp_length + ip))
        return bytes(packet) + payload

    def _make_template(self) -> None:
        """Headers by scapy with zeros for what `_patch` fills in, and the sums of the rest."""
        packet = bytearray(self._build(0, _ACK, b"", {}))
        ip = 40 if self._ipv6 else 20
        for at, length in [(ip + 4, 8), (ip + 13, 1), (ip + 16, 2)] + [(ip + 24, 8)] * self.timestamps:
            packet[at : at + length] = bytes(length)
        for at in (4,) if self._ipv6 else (2, 10):
            packet[at : at + 2] = bytes(2)
        addresses = bytes(packet[8:40] if self._ipv6 else packet[12:20])
        self._ip_length, self._ip_sum = ip, _sum16(bytes(packet[:ip]))
        self._tcp_sum = _sum16(addresses) + socket.IPPROTO_TCP + _sum16(bytes(packet[ip:]))
        self._template = bytes(packet)

    def _emit(self, offset: int, bits: int, payload: bytes, fields: dict[str, Any] | None = None) -> None:
        if fields or bits & _SYN:
            if len(payload) > 65400:
                raise ValueError(f"{len(payload)} bytes of payload are too many for an IP packet")
            self._peer._write(self._build(offset, bits, payload, fields or {}))
        else:
            self._peer._write(self._patch(offset, bits, payload))

    # --- the kernel's segments ---

    def _handle(self, port: int, seq: int, ack: int, bits: int, window: int, options: bytes, payload: bytes) -> None:
        """Takes in a segment from the kernel; the caller holds the TunPeer's lock."""
        if bits & _RST:
            self._reset = True
            return
        known = _parse_options(options)
        if "ts" in known:
            self._ts_recent = known["ts"]
        if bits & _SYN:
            self._irs, self.local_port = seq, port
            self._wscale = known.get("wscale", 0)
            self.timestamps = self.timestamps and "ts" in known
        elif self._irs is None:
            return
        if bits & _ACK:
            offset = self._acked + _signed(ack - (self.isn + 1 + self._acked))
            if offset >= self._acked:
                self._acked = offset
                self._window = window if bits & _SYN else window << self._wscale
        if bits & _SYN:
            if bits & _ACK:
                self._emit(max(self.next_offset, self._acked), _ACK, b"")
            else:
                self._emit(-1, _SYN | _ACK, b"")
            return
        ahead = _signed(seq - self._ack_number())  # of the segment's start to what was received
        if ahead <= 0 and not self._got_fin and -ahead < len(payload) + bool(bits & _FIN):
            self._received += payload[-ahead:]
            self._got_fin = bool(bits & _FIN)
        if payload or bits & _FIN or ahead < 0:  # data, or a probe
            self._emit(self._current(), _ACK, b"")

    def _abort(self) -> None:
        """Ends both sides at once, so that no orphan of the kernel keeps the network namespace."""
        with contextlib.suppress(AttributeError, OSError):
            if self.socket.fileno() >= 0:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_RDWR)  # ends other threads' recv(), which would keep it open
                self.socket.close()
        if self._irs is not None and not self.reset:
            with contextlib.suppress(OSError):
                self.rst()


def _parse_options(options: bytes) -> dict[str, int]:
    """wscale (a shift) and ts (the timestamp's value), as far as TCP's options have them."""
    found: dict[str, int] = {}
    at = 0
    while at < len(options) and options[at] != 0:
        if options[at] == 1:
            at += 1
            continue
        if options[at] == 3:
            found["wscale"] = options[at + 2]
        elif options[at] == 8:
            found["ts"] = int.from_bytes(options[at + 2 : at + 6], "big")
        at += options[at + 1]
    return found


class TunPeer:
    """A network namespace with a TUN device, and the TCP peer behind it; a context manager.

    Inside are LOCAL_IPV4 and LOCAL_IPV6 (no duplicate address detection); every other address of 10.77.0.0/24 and
    fd77::/64 is behind the device, where the peer uses PEER_IPV4 and PEER_IPV6. lo is up. At the end the conversations'
    sockets are aborted and closed; nothing remains, also after an exception. Several TunPeers can exist at once.
    """

    def __init__(self, *, mtu: int = 1500) -> None:
        """Nothing happens before `with`.

        Args:
            mtu: of the device, in bytes; it limits what the kernel sends, not what the peer sends.
        """
        self._mtu = mtu
        self._stack = contextlib.ExitStack()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._conversations: dict[int, Conversation] = {}
        self._ports = itertools.count(40001)
        self._netns = self._tun = self._wake = -1

    def __enter__(self) -> TunPeer:
        """Raises OSError (not root, no /dev/net/tun), RuntimeError (`ip` is missing or failed)."""
        try:
            _in_thread(self._set_up)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._stack.callback(self._close_fd, "_wake")
            reader = threading.Thread(target=self._read, name="tun-reader", daemon=True)
            reader.start()
            self._stack.callback(reader.join)
            self._stack.callback(os.eventfd_write, self._wake, 1)
            self._stack.callback(self._abort)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _set_up(self) -> None:
        """Runs in a thread that ends in the new namespace."""
        _system("unshare", _CLONE_NEWNET)
        self._netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._stack.callback(self._close_fd, "_netns")
        self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._stack.callback(self._close_fd, "_tun")
        fcntl.ioctl(self._tun, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        commands = [
            "link set lo up",
            f"link set {DEVICE} mtu {self._mtu} txqueuelen 20000 addrgenmode none up",
            f"address add {LOCAL_IPV4}/24 dev {DEVICE}",
            f"address add {LOCAL_IPV6}/64 dev {DEVICE} nodad",
        ]
        for name, value in (("disable_ipv6", 0), ("accept_ra", 0), ("accept_dad", 0), ("router_solicitations", 0)):
            self._set_sysctl(f"net.ipv6.conf.{DEVICE}.{name}", str(value))
        try:
            done = subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError("iproute2's `ip` is missing") from error
        if done.returncode:
            raise RuntimeError(f"ip: {done.stderr.strip()}")

    def _close_fd(self, name: str) -> None:
        with self._lock:
            fd: int = getattr(self, name)
            setattr(self, name, -1)
        os.close(fd)

    def _abort(self) -> None:
        for conversation in list(self._conversations.values()):
            conversation._abort()

    # --- the namespace ---

    def inside(self, function: Callable[[], Result]) -> Result:
        """Calls `function` in a new thread inside the namespace; returns its result or raises its exception.

        Sockets made there, and processes started there, stay in the namespace; sockets work from any thread.
        """

        def body() -> Result:
            _system("setns", self._netns, _CLONE_NEWNET)
            return function()

        return _in_thread(body)

    def sysctl(self, name: str, value: str) -> None:
        """Sets a setting of the namespace, for sockets made later: sysctl("net.ipv4.tcp_rmem", "4096 65536 65536").

        Raises OSError if there is none of that name, or the kernel refuses the value.
        """
        self.inside(lambda: self._set_sysctl(name, value))

    @staticmethod
    def _set_sysctl(name: str, value: str) -> None:
        with open("/proc/sys/" + name.replace(".", "/"), "w") as file:
            file.write(value)

    # --- conversations ---

    def accept(
        self,
        family: Family = "ipv4",
        *,
        isn: int = DEFAULT_ISN,
        rcvbuf: int | None = None,
        window: int = 1 << 20,
        mss: int = 1460,
        timestamps: bool = False,
        local_port: int | None = None,
    ) -> Conversation:
        """The peer connects to a listening socket; the conversation's socket is what accept() returned.

        Args:
            family: ipv4, ipv6, or mapped: an AF_INET6 socket that gets IPv4.
            isn: the peer's initial sequence number (32 bits).
            rcvbuf: receive buffer in bytes, also beyond net.core.rmem_max (the kernel doubles it); None: its own sizes.
            window: what the peer lets the kernel send at once, in bytes; a multiple of 128, at most 8,388,480.
            mss: the peer's maximum segment size, in bytes.
            timestamps: use TCP timestamps.
            local_port: where to listen; None: a free port.

        Raises TimeoutError if the kernel doesn't answer within 5 s, OSError if the port is in use.
        """
        kind = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        with self.inside(lambda: socket.socket(kind, socket.SOCK_STREAM)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(family == "ipv6"))
            if rcvbuf is not None:
                listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, rcvbuf)
            listener.bind(("0.0.0.0" if family == "ipv4" else "::", local_port or 0))
            listener.listen()
            listener.settimeout(5)
            conversation = self._converse(family, isn, window, mss, timestamps)
            conversation.local_port = listener.getsockname()[1]
            for tries_left in range(9, -1, -1):  # a busy kernel may still be at its IPv6 address, and drop the SYN
                conversation._emit(-1, _SYN, b"", {"ack": 0})
                try:
                    conversation._wait(lambda: conversation._acked == 0, "the handshake", 0.5)
                    break
                except TimeoutError:
                    if not tries_left:
                        raise
            conversation.socket = listener.accept()[0]
        return conversation

    def connect(
        self,
        family: Family = "ipv4",
        *,
        isn: int = DEFAULT_ISN,
        rcvbuf: int | None = None,
        window: int = 1 << 20,
        mss: int = 1460,
        timestamps: bool = False,
    ) -> Conversation:
        """A real socket connects to the peer (the kernel's socket is the client). Arguments and errors: as `accept`."""
        kind = socket.AF_INET if family == "ipv4" else socket.AF_INET6
        address = {"ipv4": PEER_IPV4, "ipv6": PEER_IPV6, "mapped": f"::ffff:{PEER_IPV4}"}[family]
        conversation = self._converse(family, isn, window, mss, timestamps)
        conversation.socket = self.inside(lambda: socket.socket(kind, socket.SOCK_STREAM))
        if rcvbuf is not None:
            conversation.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, rcvbuf)
        conversation.socket.settimeout(5)
        conversation.socket.connect((address, conversation.peer_port))
        conversation.socket.settimeout(None)
        conversation._wait(lambda: conversation._acked == 0, "the handshake", 5)
        return conversation

    def _converse(self, family: Family, isn: int, window: int, mss: int, timestamps: bool) -> Conversation:
        port = next(self._ports)
        conversation = Conversation(self, family, isn, port, window=window, mss=mss, timestamps=timestamps)
        with self._lock:
            self._conversations[port] = conversation
        return conversation

    @property
    def conversations(self) -> Sequence[Conversation]:
        """All conversations so far, oldest first."""
        with self._lock:
            return tuple(self._conversations.values())

    # --- packets ---

    def _write(self, packet: bytes) -> None:
        os.write(self._tun, packet)

    def _read(self) -> None:
        """The reader thread: reads when nobody else does (delayed ACKs, data of the real socket)."""
        poll = select.poll()
        poll.register(self._tun, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while all(fd != self._wake for fd, _ in poll.poll()):
            self._drain()

    def _drain(self) -> None:
        """Takes in all packets that the kernel has sent."""
        with self._lock:
            news = False
            while self._tun >= 0:
                try:
                    packet = os.read(self._tun, 65536)
                except OSError:  # BlockingIOError: there is no more; else the device is gone
                    break
                news = self._take(packet) or news
            if news:
                self._changed.notify_all()

    def _take(self, packet: bytes) -> bool:
        """Hands a packet to its conversation; returns whether there is one."""
        if packet[0] >> 4 == 4:
            start, protocol = (packet[0] & 15) * 4, packet[9]
        else:
            start, protocol = 40, packet[6]
        if protocol != socket.IPPROTO_TCP:
            return False
        port, peer_port, seq, ack, bits, window = struct.unpack_from("!HHIIHH", packet, start)
        conversation = self._conversations.get(peer_port)
        if conversation is None:
            return False
        data = start + (bits >> 12) * 4
        conversation._handle(port, seq, ack, bits & 0xFF, window, packet[start + 20 : data], packet[data:])
        return True
