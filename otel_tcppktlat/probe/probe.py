"""The agent's side of the kernel programs: starts them, and takes from the maps what each interval brought.

Histograms have two sides, and a pickup's time says which one it goes to. An interval ends at a time that is set a bit
ahead; then an update of a map of maps waits for every program that still runs (maybe_wait_bpf_programs() in
kernel/bpf/syscall.c). So counts, sums and events of an interval belong together, and no observation falls between two.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .launch import Loaded, Loader
from .layout import (
    BOOKS,
    FIRST_SERIES,
    KIND_EXEMPLAR,
    KIND_ROW,
    KIND_SERVED,
    OVERFLOW_SERIES,
    Books,
    Event,
    Identity,
    Interval,
    ProcessKey,
    SeriesKey,
    Served,
    histogram_bytes,
)
from .libbpf import Libbpf, Map, RingBuffer

CHUNKS = 2048  # of 64 entries: 131,072 segments of stalled readers, exact
MAX_COPIES = 4  # of each series' histogram, shared by CPUs
DRAIN_CHUNKS = 56  # a program's share of a long queue; 31 tail calls of it drain 100,000 entries
RING_BYTES = 1 << 20
_RING_RECORDS = RING_BYTES // (ct.sizeof(Event) + 8)  # BPF_RINGBUF_HDR_SZ
_ZERO_KEY = bytes(4)
_AHEAD_NS = 5_000_000
_MOST = 2**63 - 1  # that OTLP's integers hold
_SERIES_AT_ONCE = 256
_EPOCHS = 4096  # EPOCHS in bpf/maps.h
_EPOCH_STEP = 1 << 16  # the kernel adds 1 at a time: no count of its own comes out equal


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
    max_sockets: int = 16384  # of the raw flavour; a power of two. The typed one has more than its array
    max_chunks: int = CHUNKS
    serve: int = 0  # processes, at most, that hear of their own pickups
    serve_all: int = 5000  # events a second of all together
    only_served: bool = False  # what others read is `filtered`

    @property
    def buckets(self) -> int:
        """Buckets of the kernel's histogram: a power of two that holds one more than the bounds."""
        return max(2, 1 << len(self.bounds_ns).bit_length())


@dataclass(frozen=True, slots=True)
class Series:
    """One series of the kernel: its key and who it is."""

    key: SeriesKey
    identity: Identity


@dataclass(frozen=True, slots=True)
class Delta:
    """What an interval added to a series; `series` is None for the overflow series."""

    series: Series | None
    sum_ns: int
    counts: Sequence[int]


@dataclass(frozen=True)
class Harvest:
    """One interval. Times are CLOCK_MONOTONIC in ns; events are the interval's exemplar candidates, with their series.

    `live` has the series by the number that the interval's events give; the overflow series is not in it.
    """

    began_ns: int
    ended_ns: int
    deltas: list[Delta]
    exemplars: list[tuple[Series | None, Event]]
    live: Mapping[int, Series]


class Probe:
    """The running programs. All methods may be called from any thread."""

    def __init__(
        self,
        options: ProbeOptions,
        on_row: Callable[[Event], None] | None = None,
        on_served: Callable[[Event], None] | None = None,
        on_harvest: Callable[[Harvest], None] | None = None,
    ) -> None:
        """Starts the loader; returns while it compiles.

        `on_row` gets each pickup's event, `on_served` those of processes that are served, both from poll or harvest,
        and `on_harvest` each interval, whoever ended it.
        """
        self._options, self._on_row, self._on_served, self._on_harvest = options, on_row, on_served, on_harvest
        self._libbpf = Libbpf()
        self._copies = min(MAX_COPIES, self._libbpf.possible_cpus())
        self._loader = Loader(
            {
                "flavour": options.flavour,
                "bounds_ns": list(options.bounds_ns),
                "first_series": FIRST_SERIES,
                "books_bytes": ct.sizeof(Books),
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
            "SHARED_COPIES": int(self._copies < self._libbpf.possible_cpus()),
            "MAX_SERIES": options.max_series,
            "MAX_CHUNKS": options.max_chunks,
            "MAX_SOCKETS": options.max_sockets,
            "RING_BYTES": RING_BYTES,
            "DRAIN_CHUNKS": DRAIN_CHUNKS,
            "EXEMPLARS": int(options.exemplars),
            "ROWS": int(options.rows),
            "SERVE": options.serve,
            "SERVED_ALL": options.serve_all,
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
        if options.only_served:
            defines["ONLY_SERVED"] = None
        return defines

    def starting_fd(self) -> int:
        """Becomes readable when open() has no more to wait for."""
        return self._loader.fileno()

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
        self._histograms = opened("histograms", 4, value_bytes)
        self._interval = opened("interval", 4, ct.sizeof(Interval))
        self._barrier = opened("barrier", 4, 4)
        self._epochs = opened("epochs", 4, 4)
        self._served = opened("served", 4, ct.sizeof(Served)) if self._options.serve else None
        self._side = self._running_from_ns = 0
        self._rows_from_ns = [0, 0]  # of each side
        self._began_ns = time.monotonic_ns()
        self._slowest: tuple[dict[tuple[int, int], Event], ...] = ({}, {})  # of each side, by (series, bucket)
        self._live: dict[int, Series] = {}
        self._retiring: dict[int, int] = {}  # index: intervals until its last count is in
        self._gone_seen = self._implausible = 0
        self._ring = RingBuffer(self._libbpf, loaded.descriptors["map:events"], self._receive)
        return loaded

    def epoll_fd(self) -> int:
        """Becomes readable when the ring buffer is half full."""
        return self._ring.epoll_fd()

    def poll(self) -> int:
        """Takes what the ring buffer holds now; returns the number of events."""
        with self._lock:
            return self._ring.consume(_RING_RECORDS)

    def _receive(self, record: bytes) -> None:
        event = self._plausible(record)
        if event is None:
            self._implausible += 1
            return
        if event.kind & KIND_ROW and self._on_row:
            self._on_row(event)
        if event.kind & KIND_SERVED and self._on_served:
            self._on_served(event)
        if event.kind & KIND_EXEMPLAR:
            slowest = self._slowest[event.side]
            known = slowest.get((event.series, event.bucket))
            if known is None or known.wait_ns < event.wait_ns:
                slowest[event.series, event.bucket] = event

    def _plausible(self, record: bytes) -> Event | None:
        """The event, unless what the kernel never says would break what is made of it: times and indexes."""
        if len(record) != ct.sizeof(Event):
            return None
        event = Event.from_buffer_copy(record)
        known = event.side < 2 and event.series < self._options.max_series
        known = known and event.bucket <= len(self._options.bounds_ns)
        return event if known and event.wait_ns <= event.picked_ns <= time.monotonic_ns() else None

    def books(self) -> dict[str, int]:
        """The books, summed over the CPUs. Events that made no sense are lost, too."""
        raw = self._books.lookup(_ZERO_KEY)
        assert raw is not None
        size = ct.sizeof(Books)
        per_cpu = [Books.from_buffer_copy(raw, cpu * size) for cpu in range(self._cpus)]
        summed = {name: min(sum(getattr(books, name) for books in per_cpu), _MOST) for name in BOOKS}
        summed["events_lost"] = min(summed["events_lost"] + self._implausible, _MOST)
        return summed

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

    @property
    def side(self) -> int:
        """Of the running interval, as its events have it."""
        return self._side

    def want_rows(self, side: int, from_ns: int) -> None:
        """From now on shorter waits of this side make no row: they are counted as `rows_withheld`."""
        with self._lock:
            if self._rows_from_ns[side] != from_ns:
                self._rows_from_ns[side] = from_ns
                self._tell_interval(self._running_from_ns)

    def _tell_interval(self, running_from_ns: int) -> None:
        self._running_from_ns = running_from_ns
        from_ns = (ct.c_uint64 * 2)(*self._rows_from_ns)
        self._interval.update(_ZERO_KEY, bytes(Interval(running_from_ns, from_ns)))

    def harvest(self, all_rows: bool = True) -> Harvest:
        """Ends the interval and returns it. `all_rows`: whether the next one has rows again that this one withholds."""
        with self._lock:
            old, self._side = self._side, 1 - self._side
            self._rows_from_ns[self._side] = 0 if all_rows else self._rows_from_ns[old]
            began_ns, ended_ns = self._began_ns, (time.monotonic_ns() + _AHEAD_NS) & ~1 | self._side
            self._tell_interval(ended_ns)
            while (ahead_ns := ended_ns - time.monotonic_ns()) > 0:
                time.sleep(ahead_ns / 1e9)
            self._barrier.update(_ZERO_KEY, struct.pack("<I", self._interval.fd))
            self._ring.consume(_RING_RECORDS)
            self._read_series()
            deltas = self._read_histograms(old)
            events = list(self._slowest[old].values())
            self._slowest[old].clear()
            candidates = [(self._live.get(event.series), event) for event in events]
            self._began_ns = ended_ns = max([ended_ns, *(event.picked_ns for event in events)])  # if set too late
            harvest = Harvest(began_ns, ended_ns, deltas, candidates, dict(self._live))
            self._retire()
            if self._on_harvest:
                self._on_harvest(harvest)
            return harvest

    def _read_series(self) -> None:
        for key, value in self._series.items():
            (index,) = struct.unpack("<I", value)
            if index not in self._live and (identity := self._identities.lookup(value)):
                self._live[index] = Series(SeriesKey.from_buffer_copy(key), Identity.from_buffer_copy(identity))

    def _read_histograms(self, side: int) -> list[Delta]:
        used = min(max(self._live, default=OVERFLOW_SERIES) + 1, self._options.max_series)
        deltas: list[Delta] = []
        for first in range(0, used, _SERIES_AT_ONCE):  # all at once would be the agent's largest buffer
            deltas += self._read_some(side, range(first, min(first + _SERIES_AT_ONCE, used)))
        return deltas

    def _read_some(self, side: int, indexes: range) -> Iterator[Delta]:
        size = self._histograms.value_bytes
        copies = range(side * self._copies, (side + 1) * self._copies)
        starts = [copy * self._options.max_series + indexes.start for copy in copies]
        all_values = [self._histograms.values(start, len(indexes)) for start in starts]
        empty = bytes(size)
        touched: list[int] = []
        for position, index in enumerate(indexes):
            series = self._live.get(index)
            if series is None and index != OVERFLOW_SERIES:
                continue
            its = slice(position * size, (position + 1) * size)
            filled = [value for values in all_values if (value := values[its]) != empty]
            if filled:
                touched += [start + position for start in starts]
                yield Delta(series, *self._add_up(filled))
        self._histograms.zero(touched)

    def _add_up(self, copies: Sequence[bytes]) -> tuple[int, Sequence[int]]:
        """(sum in ns, count of each bucket) of a series' struct histogram on each set of CPUs."""
        end = histogram_bytes(len(self._options.bounds_ns) + 1)
        sum_ns = sum(int.from_bytes(copy[: histogram_bytes(0)], "little") for copy in copies)
        counts = [array("I", copy[histogram_bytes(0) : end]) for copy in copies]
        return sum_ns, counts[0] if len(counts) == 1 else array("Q", map(sum, zip(*counts, strict=True)))

    def _retire(self) -> None:
        """Gives back the series of processes that are gone, once both sides have been read after the last pickup."""
        for index, left in list(self._retiring.items()):
            if left > 1:
                self._retiring[index] = left - 1
                continue
            del self._retiring[index], self._live[index]
            self._free_series.push(struct.pack("<I", index))
        counted = self.books()["processes_gone"]
        if counted == self._gone_seen:
            return
        self._gone_seen = counted
        gone = {key for key, gone_ns in self._processes.items() if any(gone_ns)}
        self._read_series()  # once more: some may have begun and gone since
        for index, series in self._live.items():
            if bytes(series.key.process) in gone and index not in self._retiring:
                self._series.delete(bytes(series.key))
                self._retiring[index] = 2  # sides
        for key in gone:
            self._processes.delete(key)

    def serve(self, tgid: int, from_ns: int, pause_ns: int = 0) -> None:
        """From now on this process's pickups that waited so long are events for `on_served`.

        Each `pause_ns` one, as an average over ten seconds; and any that is twice as slow as the slowest told before,
        which counts half as much with each second. Until it ends, or execs: then the kernel forgets it. OSError if
        there are too many.
        """
        assert self._served
        self._served.update(struct.pack("<I", tgid), bytes(Served(from_ns, pause_ns)))
        self._look_up_again(tgid)

    def stop_serving(self, tgid: int) -> None:
        """The opposite."""
        assert self._served
        self._served.delete(struct.pack("<I", tgid))
        self._look_up_again(tgid)

    def served(self) -> dict[int, int]:
        """The processes that are served now: by tgid, how many pickups they did not hear of, as there were too many."""
        assert self._served
        return {
            struct.unpack("<I", key)[0]: Served.from_buffer_copy(value).untold for key, value in self._served.items()
        }

    def living_process(self, tgid: int) -> ProcessKey | None:
        """The process of that number, if it has series and has not ended; one that did exec since is another one."""
        for key, gone_ns in self._processes.items():
            process = ProcessKey.from_buffer_copy(key)
            if process.tgid == tgid and not any(gone_ns):
                return process
        return None

    def _look_up_again(self, tgid: int) -> None:
        """Has the kernel's sockets forget who read them, as an exec does."""
        slot = struct.pack("<I", tgid % _EPOCHS)
        epoch = self._epochs.lookup(slot)
        assert epoch
        self._epochs.update(slot, struct.pack("<I", (struct.unpack("<I", epoch)[0] + _EPOCH_STEP) % (1 << 32)))

    def cancel(self) -> None:
        """Ends the loader, if it still runs."""
        self._loader.cancel()

    def close(self) -> None:
        """Detaches: the programs go with their last descriptor."""
        self._ring.close()
        while self.loaded.descriptors:
            os.close(self.loaded.descriptors.popitem()[1])
