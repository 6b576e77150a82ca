"""Spans of single waits, within a budget: the slowest of an interval win, the rest is counted."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Tracer

from ..events import span_attributes
from ..probe.layout import KIND_ROW, Event
from ..series import AttributeSet
from .diagnosis import Watch

SPAN_NAME = "tcp receive"


@dataclass(frozen=True)
class SpanIds:
    """What an exemplar needs to point to a span."""

    trace_id: int
    span_id: int


@dataclass(frozen=True)
class Candidate:
    """A wait that may become a span."""

    event: Event
    attributes: AttributeSet = ()

    @property
    def key(self) -> tuple[int, int, int]:
        """The same for the same wait, however it came here."""
        return self.event.picked_ns, self.event.tid, self.event.wait_ns


class Handover(SpanExporter):
    """Passes spans on, and knows how many were handed over: the queue before it drops what does not fit, silently."""

    def __init__(self, inner: SpanExporter, watch: Watch) -> None:
        self._inner, self._watch = inner, watch
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Counts and exports a batch."""
        self.taken += len(spans)
        return self._watch.run(lambda: self._inner.export(spans), SpanExportResult.SUCCESS)

    def shutdown(self) -> None:
        """Shuts the exporter down."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flushes the exporter."""
        return self._inner.force_flush(timeout_millis)


class SpanBudget:
    """Makes spans of the slowest waits: `rate` a second, as a budget for the whole interval."""

    def __init__(
        self, tracer: Tracer | None, handover: Handover | None, rate: float, room: int, interval_s: float
    ) -> None:
        """`room`: spans that the queue before the exporter holds. Without a tracer nothing becomes a span."""
        self._tracer, self._handover, self._rate, self._room = tracer, handover, rate, room
        self._most_rows = max(1, int(rate * interval_s)) if tracer else 0
        self._rows: list[tuple[int, int, Candidate]] = []  # a heap: the shortest wait first
        self._named_until_ns = 0
        self._order = itertools.count()
        self._rows_lock, self._making_lock = threading.Lock(), threading.Lock()
        self._given = self._evicted = 0
        self.suppressed = 0

    def offer_row(self, event: Event) -> None:
        """Remembers a pickup that waited MIN_US, if it is among the slowest of the interval so far."""
        if not self._most_rows:
            return
        entry = (event.wait_ns, next(self._order), Candidate(event))
        with self._rows_lock:
            if len(self._rows) < self._most_rows:
                heapq.heappush(self._rows, entry)
            else:
                heapq.heappushpop(self._rows, entry)
                self._evicted += 1

    def name_rows(self, attributes_of: Callable[[int], AttributeSet], until_ns: int) -> None:
        """Gives the rows up to a moment, CLOCK_MONOTONIC, the attributes of their series, by its number until then."""

        def named(row: Candidate) -> Candidate:
            if not self._named_until_ns < row.event.picked_ns <= until_ns:
                return row
            return Candidate(row.event, attributes_of(row.event.series))

        with self._rows_lock:
            self._rows = [(wait_ns, order, named(row)) for wait_ns, order, row in self._rows]
            self._named_until_ns = until_ns

    def _take_rows(self) -> tuple[dict[tuple[int, int, int], Candidate], int]:
        """The rows that have been named, which are then forgotten; and how many had no room.

        Later ones are the next interval's, as are the exemplars that some of them are, too.
        """
        with self._rows_lock:
            taken = [row for _, _, row in self._rows if row.event.picked_ns <= self._named_until_ns]
            self._rows = [entry for entry in self._rows if entry[2].event.picked_ns > self._named_until_ns]
            heapq.heapify(self._rows)
            evicted, self._evicted = self._evicted, 0
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
            room = self._room - (self._given - self._handover.taken)
            budget = max(0, min(int(self._rate * elapsed_s) or int(self._rate > 0), room))
            winners = heapq.nlargest(budget, distinct, key=lambda candidate: candidate.event.wait_ns)
            self.suppressed += evicted + len(distinct) - len(winners)
            made = {candidate.key: self._make_span(self._tracer, candidate, unix_offset_ns) for candidate in winners}
        return {key: ids for key, ids in made.items() if ids}

    def _make_span(self, tracer: Tracer, candidate: Candidate, unix_offset_ns: int) -> SpanIds | None:
        event = candidate.event
        end_ns = event.picked_ns + unix_offset_ns
        span = tracer.start_span(
            SPAN_NAME,
            context=Context(),  # a trace of its own
            kind=SpanKind.INTERNAL,
            attributes=span_attributes(event, candidate.attributes),
            start_time=end_ns - event.wait_ns,
        )
        span.end(end_time=end_ns)
        context = span.get_span_context()
        if not context.trace_flags.sampled:
            return None
        self._given += 1
        return SpanIds(context.trace_id, context.span_id)

    def close(self) -> None:
        """No span from now on: the exporter is about to be shut down."""
        with self._making_lock:
            self._tracer = None
