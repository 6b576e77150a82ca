"""Spans of single waits, within a budget: the slowest of an interval win, the rest is counted."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Tracer

from ..events import span_attributes
from ..probe.layout import Event
from ..series import AttributeSet

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
    attributes: AttributeSet

    @property
    def key(self) -> tuple[int, int, int]:
        """The same for the same wait, however it came here."""
        return self.event.picked_ns, self.event.tid, self.event.wait_ns


class Handover(SpanExporter):
    """Passes spans on, and knows how many were handed over: the queue before it drops what does not fit, silently."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self.taken = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Counts and exports a batch."""
        self.taken += len(spans)
        return self._inner.export(spans)

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
        self._rows: list[tuple[int, int, Event]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._given = 0
        self.suppressed = 0

    def offer_row(self, event: Event) -> None:
        """Remembers a pickup that waited MIN_US, if it is among the slowest of the interval so far."""
        if not self._most_rows:
            return
        entry = (event.wait_ns, next(self._order), event)
        with self._lock:
            if len(self._rows) < self._most_rows:
                heapq.heappush(self._rows, entry)
            else:
                heapq.heappushpop(self._rows, entry)
                self.suppressed += 1

    def take_rows(self) -> list[Event]:
        """The remembered pickups, which are then forgotten."""
        with self._lock:
            rows, self._rows = self._rows, []
        return [event for _, _, event in rows]

    def make_spans(
        self, candidates: Sequence[Candidate], elapsed_s: float, unix_offset_ns: int
    ) -> dict[tuple[int, int, int], SpanIds]:
        """Starts and ends spans for the slowest candidates; ids of those that go to the exporter, by Candidate.key."""
        if self._tracer is None or self._handover is None:
            return {}
        distinct = {candidate.key: candidate for candidate in candidates}
        room = self._room - (self._given - self._handover.taken)
        budget = max(0, min(int(self._rate * elapsed_s) or int(self._rate > 0), room))
        winners = heapq.nlargest(budget, distinct.values(), key=lambda candidate: candidate.event.wait_ns)
        self.suppressed += len(distinct) - len(winners)
        made: dict[tuple[int, int, int], SpanIds] = {}
        for candidate in winners:
            event = candidate.event
            end_ns = event.picked_ns + unix_offset_ns
            span = self._tracer.start_span(
                SPAN_NAME,
                context=Context(),  # a trace of its own
                kind=SpanKind.INTERNAL,
                attributes=span_attributes(event, candidate.attributes),
                start_time=end_ns - event.wait_ns,
            )
            span.end(end_time=end_ns)
            context = span.get_span_context()
            if context.trace_flags.sampled:
                self._given += 1
                made[candidate.key] = SpanIds(context.trace_id, context.span_id)
        return made
