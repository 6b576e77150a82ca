"""The agent's side of the kernel programs: starts them, and takes from the maps what each interval brought.

An interval ends when its histograms are exchanged for the other, empty ones. The exchange is an update of a map of maps,
which returns only after every program that uses the old one has ended (maybe_wait_bpf_programs() in kernel/bpf/syscall.c),
so that counts and events of an interval belong together and no observation falls between two.
"""

from __future__ import annotations

import ctypes as ct
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .launch import Loaded, Loader
from .layout import (
    FIRST_SERIES,
    KIND_EXEMPLAR,
    KIND_ROW,
    OVERFLOW_SERIES,
    Books,
    Event,
    Identity,
    ProcessKey,
    SeriesKey,
    histogram_bytes,
)
from .libbpf import Libbpf, Map, RingBuffer

CHUNKS = 2048  # of 64 entries: 131,072 segments of stalled readers, exact
MAX_COPIES = 4  # of each series' histogram, shared by CPUs
DRAIN_CHUNKS = 56  # a program's share of a long queue; 33 tail calls of it drain 100,000 entries
RING_BYTES = 1 << 20
_ZERO_KEY = bytes(4)


@dataclass(frozen=True)
class ProbeOptions:
    """What the programs are compiled for."""

    bounds_ns: Sequence[int]
    flavour: str = "auto"
    pid: int | None = None
    tid: int | None = None
    lport: int | None = None
    rport: int | None = None
    min_us: int | None = None
    rows: bool = False  # an event for each pickup that waited min_us
    exemplars: bool = True  # an event for the first wait of each bucket and interval
    key_address: bool = False
    own_tgid: int = 0
    max_series: int = 2048
    max_sockets: int = 16384  # of the raw flavour's hash
    max_chunks: int = CHUNKS

    @property
    def buckets(self) -> int:
        """Buckets of the kernel's histogram: a power of two that holds one more than the bounds."""
        return max(2, 1 << len(self.bounds_ns).bit_length())


@dataclass(frozen=True)
class Series:
    """One series of the kernel: its key and who it is."""

    key: SeriesKey
    identity: Identity


@dataclass(frozen=True)
class Delta:
    """What an interval added to a series; `series` is None for the overflow series."""

    series: Series | None
    sum_ns: int
    counts: Sequence[int]


@dataclass(frozen=True)
class Harvest:
    """One interval. Times are CLOCK_MONOTONIC in ns; events are the interval's exemplar candidates, with their series."""

    began_ns: int
    ended_ns: int
    deltas: list[Delta]
    exemplars: list[tuple[Series | None, Event]]


@dataclass
class _Interval:
    exemplars: dict[tuple[int, int], Event] = field(default_factory=dict)


class Probe:
    """The running programs. All methods may be called from any thread."""

    def __init__(self, options: ProbeOptions, on_row: Callable[[Event], None] | None = None) -> None:
        """Starts the loader; returns while it compiles. `on_row` gets the event of each pickup, in the polling thread."""
        self._options, self._on_row = options, on_row
        self._libbpf = Libbpf()
        self._copies = min(MAX_COPIES, 1 << (self._libbpf.possible_cpus() - 1).bit_length())
        self._loader = Loader(
            {
                "flavour": options.flavour,
                "bounds_ns": list(options.bounds_ns),
                "first_series": FIRST_SERIES,
                "limits": {"series": options.max_series, "chunks": options.max_chunks},
                "defines": self._defines(),
            }
        )
        self._lock = threading.Lock()

    def _defines(self) -> dict[str, int | None]:
        options = self._options
        defines: dict[str, int | None] = {
            "BUCKETS": options.buckets,
            "COPIES": self._copies,
            "MAX_SERIES": options.max_series,
            "MAX_CHUNKS": options.max_chunks,
            "MAX_SOCKETS": options.max_sockets,
            "RING_BYTES": RING_BYTES,
            "DRAIN_CHUNKS": DRAIN_CHUNKS,
            "EXEMPLARS": int(options.exemplars),
            "ROWS": int(options.rows),
            "MIN_NS": (options.min_us or 0) * 1000,
            "OWN_TGID": options.own_tgid,
        }
        filters = {
            "FILTER_PID": options.pid,
            "FILTER_TID": options.tid,
            "FILTER_LPORT": options.lport,
            "FILTER_RPORT": options.rport,
        }
        defines |= {name: value for name, value in filters.items() if value is not None}
        if options.key_address:
            defines["KEY_ADDRESS"] = None
        return defines

    def open(self) -> Loaded:
        """Waits until the programs are attached. Raises ProbeError with one line that says what to do."""
        loaded = self._loader.finish()
        self.loaded = loaded
        value_bytes = histogram_bytes(self._options.buckets)

        def opened(name: str, key_bytes: int, value_bytes: int) -> Map:
            return Map(self._libbpf, loaded.descriptors[f"map:{name}"], key_bytes, value_bytes)

        self._cpus = self._libbpf.possible_cpus()
        self._books = opened("books", 4, ct.sizeof(Books) * self._cpus)
        self._processes = opened("processes", ct.sizeof(ProcessKey), 8)
        self._series = opened("series", ct.sizeof(SeriesKey), 4)
        self._free_series = opened("free_series", 0, 4)
        self._identities = opened("identities", 4, ct.sizeof(Identity))
        self._sides = (opened("histograms_even", 4, value_bytes), opened("histograms_odd", 4, value_bytes))
        self._active = opened("histograms", 4, 4)
        self._histogram = struct.Struct(f"<Q{self._options.buckets}I")
        self._generation = 0
        self._began_ns = time.monotonic_ns()
        self._intervals: dict[int, _Interval] = {}
        self._live: dict[int, Series] = {}
        self._retiring: dict[int, int] = {}  # index: intervals until its last count is in
        self._gone_seen = 0
        self._ring = RingBuffer(self._libbpf, loaded.descriptors["map:events"], self._receive)
        return loaded

    def epoll_fd(self) -> int:
        """Becomes readable when the ring buffer is half full."""
        return self._ring.epoll_fd()

    def poll(self) -> int:
        """Takes what the ring buffer holds; returns the number of events."""
        with self._lock:
            return self._ring.consume()

    def _receive(self, record: bytes) -> None:
        event = Event.from_buffer_copy(record)
        if event.kind & KIND_ROW and self._on_row:
            self._on_row(event)
        if event.kind & KIND_EXEMPLAR:
            slowest = self._intervals.setdefault(event.generation, _Interval()).exemplars
            known = slowest.get((event.series, event.bucket))
            if known is None or known.wait_ns < event.wait_ns:
                slowest[event.series, event.bucket] = event

    def books(self) -> dict[str, int]:
        """The books, summed over the CPUs."""
        raw = self._books.lookup(_ZERO_KEY)
        assert raw is not None
        size = ct.sizeof(Books)
        per_cpu = [struct.unpack_from(f"<{size // 8}Q", raw, cpu * size) for cpu in range(self._cpus)]
        return dict(zip((field[0] for field in Books._fields_), map(sum, zip(*per_cpu, strict=True)), strict=True))

    def gone(self) -> bool:
        """Did a process with series end or exec since the last harvest, or is one still to be cleared away?"""
        return bool(self._retiring) or self.books()["processes_gone"] != self._gone_seen

    def statistics(self) -> dict[str, tuple[int, int, int]]:
        """By attached program: (ns spent, runs, runs that the kernel skipped); see Libbpf.program_statistics.

        What a program tail-calls counts as its own.
        """
        descriptors = self.loaded.descriptors
        attached = [name.removeprefix("link:") for name in descriptors if name.startswith("link:")]
        return {name: self._libbpf.program_statistics(descriptors[f"program:{name}"]) for name in attached}

    def series_in_use(self) -> int:
        """Series that the kernel holds now, as of the last harvest."""
        return len(self._live)

    def harvest(self) -> Harvest:
        """Ends the interval and returns it."""
        with self._lock:
            old = self._sides[self._generation & 1]
            new = self._sides[(self._generation + 1) & 1]
            tag = self._options.max_series * self._copies
            new.update(struct.pack("<I", tag), self._histogram.pack(self._generation + 1, *[0] * self._options.buckets))
            began_ns, called_ns = self._began_ns, time.monotonic_ns()
            self._active.update(_ZERO_KEY, struct.pack("<I", new.fd))
            ended, self._generation = self._generation, self._generation + 1
            self._ring.consume()
            self._read_series()
            deltas = self._read_histograms(old)
            interval = self._intervals.pop(ended, _Interval())
            candidates = [(self._live.get(event.series), event) for event in interval.exemplars.values()]
            # Old programs took their time at or before the exchange, new ones after it.
            ended_ns = max([called_ns, *(event.picked_ns for _, event in candidates)])
            self._began_ns = ended_ns
            self._retire()
            return Harvest(began_ns, ended_ns, deltas, candidates)

    def _read_series(self) -> None:
        for key, value in self._series.items():
            (index,) = struct.unpack("<I", value)
            if index not in self._live:
                identity = self._identities.lookup(value)
                assert identity is not None
                self._live[index] = Series(SeriesKey.from_buffer_copy(key), Identity.from_buffer_copy(identity))

    def _read_histograms(self, side: Map) -> list[Delta]:
        used = max(self._live, default=OVERFLOW_SERIES) + 1
        raw, size = side.head(used * self._copies), side.value_bytes
        empty = bytes(size)
        deltas: list[Delta] = []
        touched: list[int] = []
        for index in (OVERFLOW_SERIES, *self._live):
            slots = range(index * self._copies, (index + 1) * self._copies)
            filled = [slot for slot in slots if raw[slot * size : (slot + 1) * size] != empty]
            if not filled:
                continue
            touched += filled
            numbers = [self._histogram.unpack_from(raw, slot * size) for slot in filled]
            total = [sum(column) for column in zip(*numbers, strict=True)]
            series = None if index == OVERFLOW_SERIES else self._live[index]
            deltas.append(Delta(series, total[0], total[1 : len(self._options.bounds_ns) + 2]))
        side.zero(touched)
        return deltas

    def _retire(self) -> None:
        """Gives back the series of processes that are gone, once both sides have been read after the last pickup."""
        for index, left in list(self._retiring.items()):
            if left > 1:
                self._retiring[index] = left - 1
                continue
            del self._retiring[index], self._live[index]
            self._free_series.update(None, struct.pack("<I", index))
        counted = self.books()["processes_gone"]
        if counted == self._gone_seen:
            return
        self._gone_seen = counted
        gone = {key for key, gone_ns in self._processes.items() if any(gone_ns)}
        for index, series in self._live.items():
            if bytes(series.key.process) in gone and index not in self._retiring:
                self._series.delete(bytes(series.key))
                self._retiring[index] = len(self._sides)
        for key in gone:
            self._processes.delete(key)

    def cancel(self) -> None:
        """Ends the loader, if it still runs."""
        self._loader.cancel()

    def close(self) -> None:
        """Detaches: the programs go with their last descriptor."""
        self._ring.close()
