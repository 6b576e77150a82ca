"""Which span was current on a thread at a time: never a wrong one, whatever the application does with its contexts."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags

from otel_tcppktlat.instrumentation.current import REMEMBERED, SUPPRESSED, CurrentSpans, _newest_first

Times = dict[str, int]


@pytest.fixture
def spans() -> Iterator[CurrentSpans]:
    token = context.attach(context.Context())  # what a test leaves attached is not the next one's
    it = CurrentSpans()
    it.start()
    yield it
    it.stop()
    context.detach(token)


@pytest.fixture(scope="module")
def tracer() -> trace.Tracer:
    return TracerProvider(shutdown_on_exit=False).get_tracer("test")


def now_ns() -> int:
    """A time that nothing else of the test has."""
    time.sleep(0.00001)
    it = time.monotonic_ns()
    time.sleep(0.00001)
    return it


def at(spans: CurrentSpans, when_ns: int, tid: int | None = None) -> SpanContext | None:
    return spans.at(threading.get_native_id() if tid is None else tid, when_ns)


def attach(span: Span) -> contextvars.Token[context.Context]:
    return context.attach(trace.set_span_in_context(span))


def remote(number: int) -> Span:
    """Somebody else's span."""
    return NonRecordingSpan(SpanContext(number, number, is_remote=True, trace_flags=TraceFlags(1)))


def in_thread(work: Callable[[], None]) -> int:
    """Runs it in a thread of its own; returns its id."""
    tids: list[int] = []

    def run() -> None:
        tids.append(threading.get_native_id())
        work()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return tids[0]


def test_one_within_another(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    before = now_ns()
    with tracer.start_as_current_span("outer") as outer:
        first = now_ns()
        with tracer.start_as_current_span("inner") as inner:
            second = now_ns()
        third = now_ns()
    after = now_ns()
    expected = [None, outer.get_span_context(), inner.get_span_context(), outer.get_span_context(), None]
    assert [at(spans, when) for when in (before, first, second, third, after)] == expected


def test_what_was_not_begun_here(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    """A remote parent, and a span that another thread began: it is who is current that counts."""
    begun: list[Span] = []
    in_thread(lambda: begun.append(tracer.start_span("elsewhere")))
    token = attach(remote(7))
    first = now_ns()
    with trace.use_span(begun[0]):
        second = now_ns()
    context.detach(token)
    assert at(spans, first) == remote(7).get_span_context()
    assert at(spans, second) == begun[0].get_span_context()


def test_one_that_is_open_and_not_current(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("current") as current:
        opened = tracer.start_span("open")
        first = now_ns()
        with trace.use_span(opened, end_on_exit=False):
            pass
        second = now_ns()
        opened.end()
    assert [at(spans, when) for when in (first, second)] == [current.get_span_context()] * 2


def test_left_out_of_order(spans: CurrentSpans) -> None:
    """What was around it goes first: nobody knows then, until all of it is gone."""
    outer, inner = attach(remote(1)), attach(remote(2))
    context.detach(outer)
    first = now_ns()
    context.detach(inner)
    second = now_ns()
    context.detach(attach(remote(3)))
    assert [at(spans, when) for when in (first, second)] == [None, None]


def test_a_token_of_somebody_elses(spans: CurrentSpans, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused as ever, and what was before is not sure any more."""
    tokens: list[contextvars.Token[context.Context]] = []
    in_thread(lambda: tokens.append(attach(remote(1))))
    mine = attach(remote(2))
    first = now_ns()
    context.detach(tokens[0])
    second = now_ns()
    context.detach(mine)
    assert "Failed to detach context" in caplog.text
    assert at(spans, first) == remote(2).get_span_context() and at(spans, second) is None


def test_each_thread_has_its_own(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    """Also one that has ended, and whose number might be another one's by now."""
    times: Times = {}

    def work() -> None:
        with tracer.start_as_current_span("theirs") as theirs:
            times["id"] = theirs.get_span_context().span_id
            times["at"] = now_ns()

    with tracer.start_as_current_span("mine") as mine:
        tid = in_thread(work)
    theirs = at(spans, times["at"], tid)
    assert theirs and theirs.span_id == times["id"]
    assert at(spans, times["at"]) == mine.get_span_context()
    assert at(spans, now_ns(), tid) is None


def test_a_context_that_was_carried_over(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    """As asyncio.to_thread does: what it brings was not seen to begin there, and does not stay."""
    times: Times = {}

    def work() -> None:
        times["brought"] = now_ns()
        with tracer.start_as_current_span("inner"):
            times["inner"] = now_ns()
        times["left"] = now_ns()

    with tracer.start_as_current_span("outer"):
        carried = contextvars.copy_context()

    def run() -> None:
        carried.run(work)
        times["after"] = now_ns()

    tid = in_thread(run)
    assert {name: at(spans, when, tid) is not None for name, when in times.items()} == {
        "brought": False,
        "inner": True,
        "left": False,
        "after": False,
    }


def test_tasks(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    """Neither while a task's span is current, nor after it; what was begun around the loop is sure again later."""
    times: Times = {}

    async def task() -> None:
        with tracer.start_as_current_span("task"):
            times["within"] = now_ns()
            await asyncio.sleep(0)
        times["left"] = now_ns()

    with tracer.start_as_current_span("around") as around:
        asyncio.run(task())
        with tracer.start_as_current_span("later"):
            pass
        times["around"] = now_ns()
    found = {name: at(spans, when) for name, when in times.items()}
    assert found == {"within": None, "left": None, "around": around.get_span_context()}


def test_exports(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("export"), suppress_instrumentation():
        when = now_ns()
    assert at(spans, when) is SUPPRESSED


def test_spans_that_are_none(spans: CurrentSpans) -> None:
    """An invalid one is none, and one of another make is asked as the API has it."""

    class Own(NonRecordingSpan):
        def __init__(self) -> None:
            self.mine = SpanContext(5, 5, is_remote=False)

        def get_span_context(self) -> SpanContext:
            return self.mine

    with trace.use_span(trace.INVALID_SPAN):
        invalid = now_ns()
    with trace.use_span(Own()):
        own = now_ns()
    assert at(spans, invalid) is None and at(spans, own) == SpanContext(5, 5, is_remote=False)


def test_so_far_and_no_further(spans: CurrentSpans, tracer: trace.Tracer) -> None:
    """An outer span is known for so many changes within it; what was longer ago is not."""
    with tracer.start_as_current_span("outer") as outer:
        early = now_ns()
        for _ in range((REMEMBERED - 2) // 2):
            context.detach(attach(remote(1)))
        assert [at(spans, when) for when in (early, now_ns())] == [outer.get_span_context()] * 2
        context.detach(attach(remote(1)))
        assert [at(spans, when) for when in (early, now_ns())] == [None, None]
        with tracer.start_as_current_span("inner") as inner:
            assert at(spans, now_ns()) == inner.get_span_context()


def test_an_applications_objects_are_not_kept(spans: CurrentSpans) -> None:
    gone: list[str] = []

    class Own(NonRecordingSpan):
        def __del__(self) -> None:
            gone.append("gone")

    context.detach(attach(Own(SpanContext(5, 5, is_remote=False))))
    assert gone == ["gone"]


def test_nothing_is_left_behind() -> None:
    """Started twice; and what somebody else has put in its place stays."""
    before = dict(vars(context._RUNTIME_CONTEXT))
    it = CurrentSpans()
    it.start()
    assert it.stop() and dict(vars(context._RUNTIME_CONTEXT)) == before
    it.start()
    ours = context._RUNTIME_CONTEXT.attach
    vars(context._RUNTIME_CONTEXT)["attach"] = lambda given: ours(given)
    try:
        assert not it.stop()
        context.detach(attach(remote(1)))
        assert at(it, now_ns()) is None
    finally:
        vars(context._RUNTIME_CONTEXT).clear()
        vars(context._RUNTIME_CONTEXT).update(before)


def test_a_log_that_is_just_being_written() -> None:
    """The change that a thread is about to add is no change yet; what a signal's handler has torn is not believed."""
    one, other = remote(1).get_span_context(), remote(2).get_span_context()
    assert [*_newest_first([10, 1, one, 20, 2, other])] == [(20, 2, other), (10, 1, one)]
    assert [*_newest_first([10, 1, one, 20, 2])] == [*_newest_first([10, 1, one, 20])] == [(10, 1, one)]
    assert [*_newest_first([10, 1, one, 20, 30, 3, other, 2, None, 40, 4, None])] == [(40, 4, None)]
    assert [*_newest_first([one, 20, 2, other])] == [(20, 2, other)]  # the oldest has lost a part
