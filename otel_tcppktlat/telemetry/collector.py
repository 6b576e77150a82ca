"""Collects an interval from the kernel and turns it into batches of metrics, each to be acknowledged on its own."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import AggregationTemporality, Metric, ScopeMetrics, Sum
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from .. import __version__
from ..buckets import Buckets
from ..events import exemplar_attributes
from ..probe.layout import OVERFLOW_SERIES, Event
from ..probe.probe import Harvest, Probe
from ..series import AttributeSet, SeriesTotals, Totals
from .points import (
    CUMULATIVE,
    DELTA,
    Acknowledged,
    Point,
    histogram_data,
    histogram_point,
    most_encoded_bytes,
    number_point,
)
from .spans import Candidate, SpanBudget

SCOPE = "otel_tcppktlat"
SELF_SCOPE = f"{SCOPE}.self"  # an SDK's meter must not share the injected metrics' scope: the encoder would drop one
SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
DURATION = "tcppktlat.receive_queue.duration"
REJECTED, DROPPED = LOSSES = ("tcppktlat.points.rejected", "tcppktlat.spans.dropped")
BATCH_POINTS, BATCH_BYTES = 250, 2 << 20  # keep a request well below the 4 MiB that gRPC servers take

OUTCOMES: Mapping[str, Mapping[str, str]] = {  # counter in the books: attributes of its point
    "observed": {"tcppktlat.outcome": "observed"},
    "duplicate": {"tcppktlat.outcome": "duplicate"},
    "dropped": {"tcppktlat.outcome": "dropped"},
    "unread": {"tcppktlat.outcome": "unread"},
    "own": {"tcppktlat.outcome": "own"},
    "filtered": {"tcppktlat.outcome": "filtered"},
    "untracked_socket": {"tcppktlat.outcome": "untracked", "tcppktlat.reason": "sockets_full"},
    "untracked_pool": {"tcppktlat.outcome": "untracked", "tcppktlat.reason": "no_room"},
    "untracked_mptcp": {"tcppktlat.outcome": "untracked", "tcppktlat.reason": "mptcp_subflow"},
}


@dataclass(frozen=True)
class Temporality:
    """What the exporter prefers for each kind of instrument."""

    histogram: AggregationTemporality = CUMULATIVE
    counter: AggregationTemporality = CUMULATIVE


@dataclass(frozen=True)
class Batch:
    """Metrics for one request, and what to call once a receiver has them, or refuses them for good.

    `acknowledge` takes the number of points that it refused, and whether it refused the request as a whole. `parts`:
    into how many requests the batch could be split, and `size` is an upper bound of its bytes.
    """

    scope_metrics: ScopeMetrics
    acknowledge: Callable[[int, bool], None]
    parts: int = 1
    size: int = 0

    def with_(self, other: Batch) -> Batch:
        """Both in one request."""

        def acknowledge(rejected: int, whole: bool) -> None:
            self.acknowledge(rejected, whole)
            other.acknowledge(0, whole)

        metrics = [*self.scope_metrics.metrics, *other.scope_metrics.metrics]
        scope, parts = self.scope_metrics, self.parts + other.parts
        return Batch(ScopeMetrics(scope.scope, metrics, scope.schema_url), acknowledge, parts, self.size + other.size)


@dataclass(frozen=True)
class _Number:
    """One number of the books."""

    metric: str
    unit: str
    description: str
    attributes: AttributeSet
    value: float
    monotonic: bool = True

    @property
    def key(self) -> tuple[str, AttributeSet]:
        return self.metric, self.attributes


def queued_segments(books: Mapping[str, int]) -> int:
    """Segments that were received and have no outcome yet; never below 0, though CPUs are read one after the other."""
    return max(0, books["received"] - sum(books[outcome] for outcome in OUTCOMES))


def in_scope(metrics: Sequence[Metric]) -> ScopeMetrics:
    """Metrics under the scope that no SDK's meter uses: the encoder would let equal ones overwrite each other."""
    return ScopeMetrics(InstrumentationScope(SCOPE, __version__, SCHEMA_URL), metrics, SCHEMA_URL)


def duration_metric(points: Sequence[Point], temporality: AggregationTemporality) -> Metric:
    """The histogram of these points, at least one."""
    description = "Time that received TCP segments waited in the receive queue until a thread had read them."
    return Metric(DURATION, description, "s", histogram_data(points, temporality))


class Collector:
    """Totals since the start, and the way from an interval to batches."""

    def __init__(
        self,
        probe: Probe,
        buckets: Buckets,
        totals: SeriesTotals,
        spans: SpanBudget,
        temporality: Temporality,
        reader_filtered: bool = False,
        exemplar_filter: str | None = None,
    ) -> None:
        """`reader_filtered`: whether -p or -t is on, so that the outcome `filtered` exists.

        `exemplar_filter`: OTEL_METRICS_EXEMPLAR_FILTER. Unless it is set, exemplars whose span the budget or the
        sampler left out are exported too, without ids.
        """
        self._probe, self._buckets, self._totals, self._spans = probe, buckets, totals, spans
        self._temporality, self._reader_filtered = temporality, reader_filtered
        self._exemplars_wanted = exemplar_filter != "always_off"
        self._exemplars_without_span = exemplar_filter != "trace_based"
        self._lock = threading.Lock()
        self._started_unix_ns = self._collected_unix_ns = time.time_ns()
        self._collected_ns = time.monotonic_ns()
        self._nothing = Acknowledged(array("Q", (0,) * totals.buckets), 0, self._started_unix_ns)
        self._acknowledged: dict[AttributeSet, Acknowledged] = {}
        self._acknowledged_numbers: dict[tuple[str, AttributeSet], tuple[float, int]] = {}
        self._slowest: dict[tuple[AttributeSet, int], Event] = {}
        self._exemplars: dict[AttributeSet, dict[int, Exemplar]] = {}
        self._most_bytes = BATCH_BYTES
        self._rejected = 0
        self.last_duration_s = 0.0
        self._on_collected: Callable[[], None] = lambda: None

    def on_collected(self, callback: Callable[[], None]) -> None:
        """Has `callback` called after each collection, when its spans are made."""
        self._on_collected = callback

    def sweep(self) -> None:
        """Takes what processes that are gone have left, so that the kernel can forget them."""
        with self._lock:
            self._absorb(self._probe.harvest(all_rows=False))

    def _absorb(self, harvest: Harvest) -> int:
        """Adds a harvest to the totals; returns when it ended, CLOCK_MONOTONIC."""
        for delta in harvest.deltas:
            self._totals.add(delta)
        for series, event in harvest.exemplars:
            if series is None and event.series != OVERFLOW_SERIES:
                continue
            place = self._totals.set_of(series), int(event.bucket)
            known = self._slowest.get(place)
            if known is None or known.wait_ns < event.wait_ns:
                self._slowest[place] = event
        self._spans.name_rows(lambda number: self._totals.set_of(harvest.live.get(number)), harvest.ended_ns)
        return harvest.ended_ns

    def collect(self) -> Iterator[Batch]:
        """Ends the interval: makes its spans, and returns its metrics. At least one batch.

        Batches are made one by one, when they are asked for: all points at once would be most of the agent's memory.
        """
        with self._lock:
            began_s = time.monotonic()
            self._spans.end_interval(self._probe.side)
            ended_ns = self._absorb(self._probe.harvest())
            unix_offset_ns = time.time_ns() - time.monotonic_ns()
            # Points' times never go back: while the clock is behind them, as somebody set it back, at half its speed.
            slowest_ns = self._collected_unix_ns + max(1, (ended_ns - self._collected_ns) // 2)
            unix_ns = max(ended_ns + unix_offset_ns, slowest_ns)
            self._make_exemplars(unix_ns, unix_offset_ns, (ended_ns - self._collected_ns) / 1e9)
            self._collected_ns = ended_ns
            numbers, totals = self._numbers_batch(unix_ns), dict(self._totals.totals)
            self._collected_unix_ns = unix_ns
            self.last_duration_s = time.monotonic() - began_s
        self._on_collected()
        return self._batches(numbers, totals, unix_ns)

    def _batches(self, numbers: Batch, totals: Mapping[AttributeSet, Totals], unix_ns: int) -> Iterator[Batch]:
        histograms = self._histogram_batches(totals, unix_ns)
        together = next(histograms, None) if self._most_bytes == BATCH_BYTES else None
        yield numbers.with_(together) if together else numbers
        yield from histograms

    def shrink(self, batch: Batch) -> bool:
        """Makes the next batches half as large as this one, which no receiver takes; False if it cannot be split."""
        with self._lock:
            if batch.parts > 1:
                self._most_bytes = min(self._most_bytes, batch.size) // 2
            return batch.parts > 1

    def _make_exemplars(self, unix_ns: int, unix_offset_ns: int, elapsed_s: float) -> None:
        chosen = {place: Candidate(event, place[0]) for place, event in self._slowest.items()}
        made = self._spans.make_spans(list(chosen.values()), elapsed_s, unix_offset_ns)
        for (attributes, bucket), candidate in chosen.items():
            event, ids = candidate.event, made.get(candidate.key)
            if not self._exemplars_wanted or not (ids or self._exemplars_without_span):
                continue
            waiting = self._exemplars.setdefault(attributes, {})
            if not ids and bucket in waiting and waiting[bucket].span_id:
                continue  # not delivered yet, and worth more
            waiting[bucket] = Exemplar(
                filtered_attributes=exemplar_attributes(event, attributes),
                value=event.wait_ns / 1e9,
                # Unix time may have been set meanwhile; the interval's bounds hold.
                time_unix_nano=min(max(event.picked_ns + unix_offset_ns, self._collected_unix_ns + 1), unix_ns),
                span_id=ids.span_id if ids else None,
                trace_id=ids.trace_id if ids else None,
            )
        self._slowest.clear()

    def _histogram_batches(self, totals: Mapping[AttributeSet, Totals], unix_ns: int) -> Iterator[Batch]:
        delta = self._temporality.histogram == DELTA
        points: list[Point] = []
        taken: dict[AttributeSet, Acknowledged] = {}
        size = 0
        for attributes, total in totals.items():
            acknowledged = self._acknowledged.get(attributes, self._nothing)
            if delta and total.counts == acknowledged.counts:
                continue
            exemplars = list(self._exemplars.get(attributes, {}).values())
            since = acknowledged if delta else self._nothing
            point = histogram_point(self._buckets, attributes, total, since, unix_ns, exemplars)
            point_size = most_encoded_bytes(point)
            if points and (len(points) == BATCH_POINTS or size + point_size > self._most_bytes):
                yield self._histogram_batch(points, taken, size)
                points, taken, size = [], {}, 0
            points.append(point)
            taken[attributes] = Acknowledged(total.counts, total.sum_ns, unix_ns)
            size += point_size
        if points:
            yield self._histogram_batch(points, taken, size)

    def _histogram_batch(self, points: Sequence[Point], taken: Mapping[AttributeSet, Acknowledged], size: int) -> Batch:
        metric = duration_metric(points, self._temporality.histogram)
        return Batch(in_scope([metric]), self._acknowledger(taken), len(points), size)

    def _acknowledger(self, taken: Mapping[AttributeSet, Acknowledged]) -> Callable[[int, bool], None]:
        def acknowledge(rejected: int, _whole: bool) -> None:
            with self._lock:
                self._rejected += rejected
                if self._temporality.histogram == DELTA:
                    self._acknowledged.update(taken)
                for attributes in taken:
                    self._exemplars.pop(attributes, None)

        return acknowledge

    def _numbers(self) -> list[_Number]:
        books, statistics = self._probe.books(), self._probe.statistics()
        numbers = [
            _Number("tcppktlat.segments.received", "{segment}", "TCP segments with data that reached a socket.", (),
                    books["received"]),
            *(
                _Number("tcppktlat.segments.settled", "{segment}", "Received segments by what became of them.",
                        tuple(attributes.items()), books[outcome])
                for outcome, attributes in OUTCOMES.items()
                if outcome != "filtered" or self._reader_filtered
            ),
            _Number("tcppktlat.segments.queued", "{segment}", "Received segments that nobody has read yet.", (),
                    queued_segments(books), monotonic=False),
            _Number("tcppktlat.segments.merged", "{segment}",
                    "Segments whose wait is rounded up, because the pool of entries was empty.", (), books["merged"]),
            _Number("tcppktlat.bytes.undescribed", "By", "Bytes that were read, but whose arrival no probe saw.", (),
                    books["undescribed_bytes"]),
            _Number("tcppktlat.events.lost", "{event}", "Events that found the ring buffer full.", (),
                    books["events_lost"]),
            _Number("tcppktlat.spans.suppressed", "{span}", "Spans not made, because the budget was spent.", (),
                    self._spans.suppressed + books["rows_withheld"]),
            *(
                _Number(DROPPED, "{span}", "Spans that no receiver gets, by reason.",
                        (("tcppktlat.reason", reason),), count)
                for reason, count in self._spans.dropped().items()
            ),
            _Number(REJECTED, "{data_point}", "Data points that the receiver refused for good.", (),
                    self._rejected),
            *(
                _Number("tcppktlat.bpf.runs.skipped", "{run}",
                        "Runs that the kernel skipped, because the program would have interrupted itself.",
                        (("tcppktlat.bpf.program", name),), skipped)
                for name, (_, _, skipped) in statistics.items()
            ),
            *(
                _Number("tcppktlat.bpf.run.time", "s",
                        "Time spent in a program; counted while kernel.bpf_stats_enabled is 1.",
                        (("tcppktlat.bpf.program", name),), run_ns / 1e9)
                for name, (run_ns, runs, _) in statistics.items()
                if runs
            ),
            *(
                _Number("tcppktlat.bpf.runs.timed", "{run}", "Runs of a program whose time was counted.",
                        (("tcppktlat.bpf.program", name),), runs)
                for name, (_, runs, _) in statistics.items()
                if runs
            ),
        ]  # fmt: skip
        return numbers

    def _numbers_batch(self, unix_ns: int) -> Batch:
        numbers = self._numbers()
        by_metric: dict[str, list[_Number]] = {}
        for number in numbers:
            by_metric.setdefault(number.metric, []).append(number)
        metrics = [self._number_metric(group, unix_ns) for group in by_metric.values()]
        taken = {number.key: (number.value, unix_ns) for number in numbers}
        counts_of_losses = {number.key for number in numbers if number.metric in LOSSES}

        def acknowledge(rejected: int, whole: bool) -> None:
            with self._lock:
                self._rejected += rejected
                for key, value in taken.items():
                    if not (whole and key in counts_of_losses):  # what says how much was refused must not be lost
                        self._acknowledged_numbers[key] = value

        return Batch(in_scope(metrics), acknowledge)

    def _number_metric(self, group: Sequence[_Number], unix_ns: int) -> Metric:
        first = group[0]
        temporality = self._temporality.counter if first.monotonic else CUMULATIVE
        points = []
        for number in group:
            known: tuple[float, int] = (0, self._started_unix_ns)
            if temporality == DELTA:
                known = self._acknowledged_numbers.get(number.key, known)
            grown = number.value - known[0]
            grown = max(0, grown) if number.monotonic else grown
            points.append(number_point(number.attributes, grown, known[1], unix_ns))
        data = Sum(points, temporality, first.monotonic)
        return Metric(first.metric, first.description, first.unit, data)
