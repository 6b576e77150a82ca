"""The budget of spans: the slowest win, each wait has one span at most, and what is left out is counted exactly."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult

from otel_tcppktlat.probe.layout import KIND_EXEMPLAR, KIND_ROW, Event
from otel_tcppktlat.telemetry.diagnosis import Failure, Target, Watch
from otel_tcppktlat.telemetry.sending import Sender
from otel_tcppktlat.telemetry.spans import Candidate, Handover, SpanBudget


class Kept(SpanExporter):
    """Keeps the lengths of what it gets."""

    def __init__(self) -> None:
        self.lengths_ns: list[int] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.lengths_ns += [(span.end_time or 0) - (span.start_time or 0) for span in spans]
        return SpanExportResult.SUCCESS


def handing_to(exporter: SpanExporter) -> Handover:
    return Handover(Sender(lambda: exporter, Watch(None), SpanExportResult.SUCCESS), 0.01)


def made_up(number: int, wait_ns: int, kind: int) -> Event:
    return Event(picked_ns=10**12 + number, wait_ns=wait_ns, tid=7, series=2, kind=kind, family=2)


# Pickups of an interval: (longest wait, has it a row, is it the one that its bucket's exemplar shows).
PICKUPS = st.lists(st.tuples(st.integers(1, 10**9), st.booleans(), st.booleans()), max_size=30)


@settings(deadline=None)
@given(st.lists(PICKUPS, max_size=4), st.integers(0, 20), st.booleans())
def test_budget(intervals: list[list[tuple[int, bool, bool]]], rate: int, late: bool) -> None:
    """Intervals of 1 s, or of 2 where the collection is late: by then, rows beyond the budget for 1 s have gone."""
    kept = Kept()
    handover = handing_to(kept)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(handover))
    budget = SpanBudget(provider.get_tracer("test"), handover, rate, 1000, 1.0)
    number = candidates = 0
    for pickups in intervals:
        chosen, expected = [], []
        for wait_ns, is_row, is_exemplar in pickups:
            number += 1
            event = made_up(number, wait_ns, KIND_ROW * is_row | KIND_EXEMPLAR * is_exemplar)
            if is_row:
                budget.offer_row(event)
            if is_exemplar:
                chosen.append(Candidate(event, (("a", 1),)))
            if is_row or is_exemplar:
                candidates += 1
                expected.append(wait_ns)
        budget.name_rows(lambda _series: (("a", 1),), 10**12 + number)
        kept.lengths_ns.clear()
        suppressed = budget.suppressed
        made = budget.make_spans(chosen, 2.0 if late else 1.0, 10**18)
        most = rate * (2 if late else 1)
        assert len(kept.lengths_ns) <= most
        assert len(kept.lengths_ns) + budget.suppressed - suppressed == len(expected)
        assert set(made) <= {(10**12 + n, 7, wait) for n in range(1, number + 1) for wait in expected}
        assert len(made) == len(kept.lengths_ns)
        if not late:
            assert sorted(kept.lengths_ns) == sorted(expected)[len(expected) - min(most, len(expected)) :]


def test_no_spans_once_closed() -> None:
    kept = Kept()
    provider = TracerProvider(shutdown_on_exit=False)
    budget = SpanBudget(provider.get_tracer("test"), handing_to(kept), 100, 1000, 1.0)
    budget.close()
    assert budget.make_spans([Candidate(made_up(1, 5, KIND_EXEMPLAR))], 1.0, 0) == {}


def test_rows_of_the_next_interval_wait_for_it() -> None:
    """And have the attributes of their series as of the interval's end."""
    kept = Kept()
    handover = handing_to(kept)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(handover))
    budget = SpanBudget(provider.get_tracer("test"), handover, 100, 1000, 1.0)
    budget.offer_row(made_up(1, 11, KIND_ROW))
    budget.offer_row(made_up(9, 99, KIND_ROW))
    budget.name_rows(lambda series: (("series", series),), 10**12 + 5)
    budget.make_spans([], 1.0, 0)
    assert kept.lengths_ns == [11]
    budget.name_rows(lambda series: (("series", series),), 10**12 + 9)
    budget.make_spans([], 1.0, 0)
    assert kept.lengths_ns == [11, 99]
    assert budget.suppressed == 0


def test_memory_is_bounded_while_nothing_is_delivered() -> None:
    """Thousands of spans and no receiver: the queue and one batch are kept, the rest is never made, and counted."""
    released = threading.Event()

    class Away(Kept):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if not released.is_set():
                watch.note(Failure("UNAVAILABLE", ""))
                return SpanExportResult.FAILURE
            return super().export(spans)

    kept, room, batch, offered = Away(), 64, 16, 5000
    watch = Watch(Target("traces", "grpc", urlsplit("http://127.0.0.1:9"), False, [], {}))
    handover = Handover(Sender(lambda: kept, watch, SpanExportResult.SUCCESS), 0.01)
    processor = BatchSpanProcessor(handover, room, schedule_delay_millis=10, max_export_batch_size=batch)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    budget = SpanBudget(provider.get_tracer("test"), handover, 10**6, room, 1.0)
    made = 0
    for number in range(0, offered, 10):
        chosen = [Candidate(made_up(number + one, 1000 + number + one, KIND_EXEMPLAR)) for one in range(10)]
        made += len(budget.make_spans(chosen, 1.0, 10**18))
        assert made - len(kept.lengths_ns) <= room + batch
    assert room <= made <= room + batch
    assert budget.dropped() == {"queue_full": offered - made, "rejected": 0} and budget.suppressed == 0
    released.set()
    provider.shutdown()
    assert sorted(kept.lengths_ns) == sorted(set(kept.lengths_ns)) and len(kept.lengths_ns) == made


def test_spans_go_in_smaller_requests_once_one_was_too_large() -> None:
    """Split until the receiver takes them; one that it takes alone neither is dropped, and counted."""

    class Small(Kept):
        most, sizes = 10, []

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.sizes.append(len(spans))
            if len(spans) > self.most:
                watch.note(Failure(413, "Request Entity Too Large"))
                return SpanExportResult.FAILURE
            return super().export(spans)

    kept = Small()
    watch = Watch(Target("traces", "http/protobuf", urlsplit("http://h/v1/traces"), False, [], {}))
    handover = Handover(Sender(lambda: kept, watch, SpanExportResult.SUCCESS), 0.01)
    provider = TracerProvider(shutdown_on_exit=False)
    tracer = provider.get_tracer("test")
    spans = []
    for number in range(50):
        span = tracer.start_span("span", start_time=0)
        span.end(number)
        assert isinstance(span, ReadableSpan)
        spans.append(span)
    assert handover.export(spans[:25]) is SpanExportResult.SUCCESS
    assert handover.export(spans[25:]) is SpanExportResult.SUCCESS
    assert kept.lengths_ns == list(range(50)) and handover.rejected == 0
    assert kept.sizes == [25, 12, 6, 6, 6, 6, 1, 6, 6, 6, 6, 1]
    kept.most = 0
    assert handover.export(spans[:3]) is SpanExportResult.FAILURE
    assert handover.rejected == 3 and len(kept.lengths_ns) == 50
