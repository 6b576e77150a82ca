"""The kernel's records as user space sees them: bpf/maps.h, declared a second time. A test holds the two together."""

from __future__ import annotations

import ctypes as ct

COMM_BYTES = 16  # TASK_COMM_LEN
OVERFLOW_SERIES, SINK_SERIES, FIRST_SERIES = 0, 1, 2
KIND_EXEMPLAR, KIND_ROW, KIND_SERVED = 1, 2, 4
ROLE_SERVER, ROLE_CLIENT = 0, 1

BOOKS = (  # counts of segments, unless the name says otherwise
    "received", "observed", "own", "filtered", "duplicate", "dropped", "unread",
    "untracked_socket", "untracked_pool", "untracked_mptcp", "merged", "undescribed_bytes", "events_lost",
    "rows_withheld", "sockets_opened", "sockets_closed", "processes_gone", "series_overflowed",
)  # fmt: skip


class Books(ct.Structure):
    """struct books: what a CPU keeps for itself, and BOOKS."""

    _fields_ = [(name, ct.c_uint64) for name in ("copy", "bucket_from_ns", "bucket_width_ns", "bucket", *BOOKS)]


class ProcessKey(ct.Structure):
    """struct process_key: start_ns is CLOCK_MONOTONIC."""

    _fields_ = [("start_ns", ct.c_uint64), ("tgid", ct.c_uint32), ("exec_id", ct.c_uint32)]


class SeriesKey(ct.Structure):
    """struct series_key: port in host byte order, address in network order (IPv4 in the first four bytes)."""

    _fields_ = [
        ("process", ProcessKey),
        ("port", ct.c_uint16),
        ("family", ct.c_uint16),
        ("role", ct.c_uint8),
        ("unused", ct.c_uint8 * 3),
        ("address", ct.c_uint8 * 16),
    ]


class Identity(ct.Structure):
    """struct identity: names end at the first NUL."""

    _fields_ = [("cgroup_id", ct.c_uint64), ("comm", ct.c_char * COMM_BYTES), ("executable", ct.c_char * 64)]


class Allowance(ct.Structure):
    """struct allowance: events in the second that began at second_ns."""

    _fields_ = [("second_ns", ct.c_uint64), ("told", ct.c_uint64)]


class Served(ct.Structure):
    """struct served: a process that hears of its own pickups from a wait on; `untold`: those that were too many."""

    _fields_ = [
        ("from_ns", ct.c_uint64),
        ("pause_ns", ct.c_uint64),
        ("due_ns", ct.c_uint64),
        ("slowest_ns", ct.c_uint64),
        ("halved_ns", ct.c_uint64),
        ("untold", ct.c_uint64),
    ]


class Interval(ct.Structure):
    """struct interval: rows_from_ns by side."""

    _fields_ = [("began_ns", ct.c_uint64), ("rows_from_ns", ct.c_uint64 * 2)]


class Event(ct.Structure):
    """struct event: times are CLOCK_MONOTONIC, ports in host byte order, addresses as in SeriesKey.

    own_tid is set where a process may be served.
    """

    _fields_ = [
        ("picked_ns", ct.c_uint64),
        ("wait_ns", ct.c_uint64),
        ("tgid", ct.c_uint32),
        ("tid", ct.c_uint32),
        ("series", ct.c_uint32),
        ("side", ct.c_uint32),
        ("segments", ct.c_uint32),
        ("bytes", ct.c_uint32),
        ("local_port", ct.c_uint16),
        ("remote_port", ct.c_uint16),
        ("family", ct.c_uint16),
        ("bucket", ct.c_uint8),
        ("kind", ct.c_uint8),
        ("role", ct.c_uint8),
        ("unused", ct.c_uint8 * 3),
        ("own_tid", ct.c_uint32),
        ("local_address", ct.c_uint8 * 16),
        ("remote_address", ct.c_uint8 * 16),
        ("comm", ct.c_char * COMM_BYTES),
    ]


def histogram_bytes(buckets: int) -> int:
    """Size of struct histogram: a sum in ns (u64) and `buckets` counts (u32)."""
    return 8 + 4 * buckets
