"""Spans of single waits, within a budget: the slowest of an interval win, the rest is counted."""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Tracer

from ..events import span_attributes
from ..probe.layout import KIND_ROW, Event
from ..series import AttributeSet
from .sending import Fate, Sender, fate

SPAN_NAME = "tcp receive"


def record_span(
    tracer: Tracer, event: Event, attributes: AttributeSet, end_unix_ns: int, parent: Context
) -> SpanContext | None:
    """Starts and ends a wait's span; an empty context makes a trace of its own. None if it is not sampled."""
    span = tracer.start_span(
        SPAN_NAME,
        context=parent,
        kind=SpanKind.INTERNAL,
        attributes=span_attributes(event, attributes),
        start_time=end_unix_ns - event.wait_ns,
    )
    span.end(end_time=end_unix_ns)
    context = span.get_span_context()
    return context if context.trace_flags.sampled else None


@dataclass(frozen=True)
class SpanIds:
    """What an exemplar needs to point to a span."""

    trace_id: int
    span_id: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A wait that may become a span."""

    event: Event
    attributes: AttributeSet = ()

    @property
    def key(self) -> tuple[int, int, int]:
        """The same for the same wait, however it came here."""
        return self.event.picked_ns, self.event.tid, self.event.wait_ns


class Handover(SpanExporter):
    """Passes spans on until the receiver has them, and knows how many it was handed.

    The SDK's processor forgets a batch that it has exported, whatever became of it, and so does its queue what finds no
    room. So a batch that may still be delivered is sent again and again here, while the queue fills behind it, and no
    span is made that has no room there.
    """

    def __init__(self, sender: Sender[SpanExporter], pause_s: float) -> None:
        """`pause_s`: between two attempts, unless the receiver asks for more."""
        self._sender, self._pause_s = sender, pause_s
        self._ending = threading.Event()
        self._most = sys.maxsize  # spans in a request that the receiver takes
        self.taken = self.rejected = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Returns when the receiver has them, refuses them for good, or the agent ends."""
        self.taken += len(spans)
        left = deque(spans)
        result = SpanExportResult.SUCCESS
        while left:
            part = list(itertools.islice(left, self._most))
            before_the_end = not self._ending.is_set()
            try:
                ended = self._sender.send(part)
            except Exception:
                self.rejected += len(left)
                raise
            what = fate(ended)
            if what is Fate.TOO_LARGE and len(part) > 1:
                self._most = len(part) // 2
                continue
            self._sender.watch.tell(ended)
            if what is Fate.FAILED and before_the_end:
                self._ending.wait(max(self._pause_s, self._sender.hold_s()))
                continue
            for _ in part:
                left.popleft()
            if what is Fate.DELIVERED:
                self.rejected += ended.rejected
                continue
            result = SpanExportResult.FAILURE
            if what is not Fate.FAILED:
                self.rejected += len(part)
        return result

    def ending(self) -> None:
        """The agent is about to end: whatever waits is tried once more, at once."""
        self._ending.set()

    def shutdown(self) -> None:
        """Shuts the exporter down."""
        self._sender.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flushes the exporter."""
        return self._sender.exporter.force_flush(timeout_millis)


class _Rows:
    """The slowest rows, so many at most."""

    def __init__(self, most: int) -> None:
        self._most, self._order = most, itertools.count()
        self._heap: list[tuple[int, int, Candidate]] = []  # the shortest wait first
        self.evicted = 0

    def offer(self, row: Candidate) -> None:
        entry = (row.event.wait_ns, next(self._order), row)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)
            self.evicted += 1

    @property
    def from_ns(self) -> int:
        """The shortest wait that there is room for."""
        return self._heap[0][0] + 1 if len(self._heap) == self._most else 0

    def name(self, named: Callable[[Candidate], Candidate]) -> None:
        """Has each replaced by the same one with attributes."""
        self._heap = [(wait_ns, order, named(row)) for wait_ns, order, row in self._heap]

    def __iter__(self) -> Iterator[Candidate]:
        return (row for _, _, row in self._heap)


class SpanBudget:
    """Makes spans of the slowest waits: `rate` a second, as a budget for the whole interval."""

    def __init__(
        self, tracer: Tracer | None, handover: Handover | None, rate: float, room: int, interval_s: float
    ) -> None:
        """`room`: spans that the queue before the exporter holds. Without a tracer nothing becomes a span."""
        self._tracer, self._handover, self._rate, self._room = tracer, handover, rate, room
        self._most_rows = max(1, int(rate * interval_s)) if tracer else 0
        self._rows, self._next_rows = _Rows(self._most_rows), _Rows(self._most_rows)
        self._ending_side: int | None = None
        self._named_until_ns = 0
        self._rows_lock, self._making_lock = threading.Lock(), threading.Lock()
        self._given = 0
        self.suppressed = self._without_room = 0

    def offer_row(self, event: Event) -> None:
        """Remembers a pickup that waited MIN_US, if it is among the slowest of the interval so far."""
        if self._most_rows:
            with self._rows_lock:
                self._rows_of(event.side).offer(Candidate(event))

    def _rows_of(self, side: int) -> _Rows:
        return self._rows if self._ending_side in (None, side) else self._next_rows

    def rows_from_ns(self, side: int) -> int:
        """The shortest wait of a row on this side that may still become a span."""
        with self._rows_lock:
            return self._rows_of(side).from_ns if self._most_rows else 0

    def end_interval(self, side: int) -> None:
        """Until its spans are made, rows of the other side are the next interval's."""
        with self._rows_lock:
            self._ending_side = side

    def name_rows(self, attributes_of: Callable[[int], AttributeSet], until_ns: int) -> None:
        """Gives the rows up to a moment, CLOCK_MONOTONIC, the attributes of their series, by its number until then."""

        def named(row: Candidate) -> Candidate:
            if not self._named_until_ns < row.event.picked_ns <= until_ns:
                return row
            return Candidate(row.event, attributes_of(row.event.series))

        with self._rows_lock:
            self._rows.name(named)
            self._named_until_ns = until_ns

    def _take_rows(self) -> tuple[dict[tuple[int, int, int], Candidate], int]:
        """The rows that have been named, which are then forgotten; and how many had no room.

        Later ones are the next interval's, as are the exemplars that some of them are, too.
        """
        with self._rows_lock:
            taken = [row for row in self._rows if row.event.picked_ns <= self._named_until_ns]
            for row in self._rows:
                if row.event.picked_ns > self._named_until_ns:
                    self._next_rows.offer(row)
            evicted = self._rows.evicted
            self._rows, self._next_rows = self._next_rows, _Rows(self._most_rows)
            self._ending_side = None
        return {row.key: row for row in taken}, evicted

    def make_spans(
        self, chosen: Sequence[Candidate], elapsed_s: float, unix_offset_ns: int
    ) -> dict[tuple[int, int, int], SpanIds]:
        """Starts and ends spans for the slowest of the exemplars' candidates and of the rows that have been named.

        Returns the ids of those that go to the exporter, by Candidate.key.
        """
        rows, evicted = self._take_rows()
        if evicted:  # a row that had no room may come back as the candidate of an exemplar: count it once
            both = sum(bool(candidate.event.kind & KIND_ROW) and candidate.key not in rows for candidate in chosen)
            evicted = max(0, evicted - both)
        distinct = {**rows, **{candidate.key: candidate for candidate in chosen}}.values()
        with self._making_lock:
            if self._tracer is None or self._handover is None:
                return {}
            room = max(0, self._room - (self._given - self._handover.taken))
            budget = min(len(distinct), int(self._rate * elapsed_s) or int(self._rate > 0))
            winners = heapq.nlargest(min(budget, room), distinct, key=lambda candidate: candidate.event.wait_ns)
            self.suppressed += evicted + len(distinct) - budget
            self._without_room += budget - len(winners)
            made = {candidate.key: self._make_span(self._tracer, candidate, unix_offset_ns) for candidate in winners}
        return {key: ids for key, ids in made.items() if ids}

    def _make_span(self, tracer: Tracer, candidate: Candidate, unix_offset_ns: int) -> SpanIds | None:
        event = candidate.event
        context = record_span(tracer, event, candidate.attributes, event.picked_ns + unix_offset_ns, Context())
        if context is None:
            return None
        self._given += 1
        return SpanIds(context.trace_id, context.span_id)

    def dropped(self) -> Mapping[str, int]:
        """Spans that the budget has allowed and no receiver gets, by reason."""
        return {"queue_full": self._without_room, "rejected": self._handover.rejected if self._handover else 0}

    def close(self) -> None:
        """No span from now on: the exporter is about to be shut down."""
        with self._making_lock:
            self._tracer = None
