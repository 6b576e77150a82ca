"""The memory that the agent shares with a process that it serves: its totals, and a ring of its latest late pickups.

The agent writes, the process reads, without a system call; each may be gone at any time. Whoever reads what is just
being written finds that its checksum is wrong, and comes back later: that holds whatever a processor reorders.
"""

from __future__ import annotations

import ctypes as ct
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..buckets import Buckets
from ..probe.layout import Event, Identity, SeriesKey
from ..probe.probe import Series

ROWS = 64  # series of one process; what exceeds them is one more, without a name
SLOTS = 256  # of the ring: more than the kernel tells a process at once

_HEADER = struct.Struct("<IIQ")  # checksum of all that follows, rows, pickups untold
_CHECKED_FROM = 4
_SLOT = struct.Struct(f"<IxxxxQ{ct.sizeof(Event)}s")  # checksum of number and event, number from 1 on
_KEY, _NAME = ct.sizeof(SeriesKey), ct.sizeof(Identity)
_F_SEAL_FUTURE_WRITE = 0x10  # include/uapi/linux/fcntl.h, Linux 5.1


@dataclass(frozen=True)
class Row:
    """One series of a process since it began; `series` is None for what exceeds ROWS."""

    series: Series | None
    sum_ns: int
    counts: Sequence[int]


class _Layout:
    def __init__(self, buckets: Buckets) -> None:
        self.row = struct.Struct(f"<{_KEY}s{_NAME}sQ{len(buckets.bounds_ns) + 1}Q")
        end_of_rows = _HEADER.size + self.row.size * (ROWS + 1)
        self.ring = -(-end_of_rows // 64) * 64
        self.bytes = self.ring + SLOTS * _SLOT.size

    def slot(self, number: int) -> int:
        return self.ring + (number - 1) % SLOTS * _SLOT.size


def _checksum(number: int, event: bytes) -> int:
    return zlib.crc32(event, number & 0xFFFFFFFF)


class AreaWriter:
    """The agent's side. OSError if there is no memory or no descriptor left."""

    def __init__(self, buckets: Buckets) -> None:
        self._layout = _Layout(buckets)
        self._fd = os.memfd_create("otel-tcppktlat", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self._layout.bytes)
            self._memory = mmap.mmap(self._fd, self._layout.bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        except BaseException:
            os.close(self._fd)
            raise
        self._next = 1
        self.publish([], 0)

    def open_for_reading(self) -> int:
        """A descriptor that can only be read, not even by opening it once more; the writer's own is closed."""
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._close_fd()
        return fd

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def publish(self, rows: Sequence[Row], untold: int) -> None:
        """Writes the totals. `untold`: late pickups that were too many to be told of."""
        shown, layout = _merged(rows), self._layout
        packed = b"".join(
            layout.row.pack(
                bytes(row.series.key) if row.series else bytes(_KEY),
                bytes(row.series.identity) if row.series else bytes(_NAME),
                row.sum_ns,
                *row.counts,
            )
            for row in shown
        )
        text = _HEADER.pack(0, len(shown), untold) + packed
        self._memory[: len(text)] = struct.pack("<I", zlib.crc32(text[_CHECKED_FROM:])) + text[_CHECKED_FROM:]

    def add(self, event: Event) -> None:
        """Writes a late pickup over the oldest one."""
        raw, number = bytes(event), self._next
        _SLOT.pack_into(self._memory, self._layout.slot(number), _checksum(number, raw), number, raw)
        self._next += 1

    def close(self) -> None:
        """Gives the memory up; whoever reads it keeps it."""
        self._memory.close()
        self._close_fd()


def _merged(rows: Sequence[Row]) -> list[Row]:
    if len(rows) <= ROWS:
        return [*rows]
    rest = rows[ROWS:]
    counts = [sum(column) for column in zip(*(row.counts for row in rest), strict=True)]
    return [*rows[:ROWS], Row(None, sum(row.sum_ns for row in rest), counts)]


class AreaReader:
    """The process's side. OSError or ValueError if the descriptor is not such an area."""

    def __init__(self, fd: int, buckets: Buckets) -> None:
        """Takes the descriptor."""
        self._layout = _Layout(buckets)
        try:
            self._memory = mmap.mmap(fd, self._layout.bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._next = 1

    def totals(self) -> tuple[list[Row], int] | None:
        """The rows, and how many late pickups were untold; None while they are being written."""
        _, count, untold = _HEADER.unpack_from(self._memory)
        if count > ROWS + 1:
            return None
        size = self._layout.row.size
        text = self._memory[: _HEADER.size + count * size]
        if zlib.crc32(text[_CHECKED_FROM:]) != int.from_bytes(text[:4], "little"):
            return None
        rows = (self._layout.row.unpack_from(text, _HEADER.size + number * size) for number in range(count))
        return [Row(_series(key, name), sum_ns, counts) for key, name, sum_ns, *counts in rows], untold

    def events(self) -> tuple[list[Event], int]:
        """Late pickups since the last call, oldest first, and how many more were written over before."""
        found: list[Event] = []
        while slot := self._read_slot(self._next):
            if slot[0] != self._next:  # the writer has come round
                return self._latest(found)
            found.append(slot[1])
            self._next += 1
        return found, 0

    def _read_slot(self, number: int) -> tuple[int, Event] | None:
        """What is in the place of this number, if it is whole, and not older."""
        checksum, its_number, raw = _SLOT.unpack_from(self._memory, self._layout.slot(number))
        whole = its_number >= self._next and checksum == _checksum(its_number, raw)
        return (its_number, Event.from_buffer_copy(raw)) if whole else None

    def _latest(self, found: list[Event]) -> tuple[list[Event], int]:
        slots = dict(slot for number in range(SLOTS) if (slot := self._read_slot(number)))
        newest = max(slots, default=self._next - 1)
        lost = newest + 1 - self._next - len(slots)
        self._next = newest + 1
        return [*found, *(slots[number] for number in sorted(slots))], lost

    def close(self) -> None:
        """Unmaps it."""
        self._memory.close()


def _series(key: bytes, name: bytes) -> Series | None:
    return Series(SeriesKey.from_buffer_copy(key), Identity.from_buffer_copy(name)) if any(key) else None
