"""Which span was current on a thread at a time: right, or none."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator

import greenlet
import pytest
import trio
from opentelemetry import context, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags

from otel_tcppktlat.instrumentation import current as module
from otel_tcppktlat.instrumentation.current import REMEMBERED, SUPPRESSED, CurrentSpans

TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[CurrentSpans]:
    monkeypatch.setattr(module, "_ALWAYS_INTERLEAVING", ())  # whatever other tests of this process import
    token = context.attach(context.Context())  # what a test leaves attached is not the next one's
    watching = CurrentSpans()
    watching.start()
    yield watching
    watching.stop()
    context.detach(token)


class Moments:
    """Times of this thread, each with what OpenTelemetry said was current then."""

    def __init__(self) -> None:
        self.tid = threading.get_native_id()
        self.all: list[tuple[int, SpanContext]] = []

    def now(self) -> None:
        self.all.append((time.monotonic_ns(), trace.get_current_span().get_span_context()))

    def found(self, current: CurrentSpans) -> list[SpanContext | None]:
        return [current.at(self.tid, when_ns) for when_ns, _ in self.all]

    def said(self) -> list[SpanContext | None]:
        return [span if span.is_valid else None for _, span in self.all]


def remote(number: int) -> Span:
    """Somebody else's span."""
    return NonRecordingSpan(SpanContext(number, number, is_remote=True, trace_flags=TraceFlags(1)))


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_as_opentelemetry_says(current: CurrentSpans) -> None:
    """Nested, one after the other, and none at all; after the fact."""
    moments = Moments()
    moments.now()
    for _ in range(3):
        with TRACER.start_as_current_span("outer"):
            moments.now()
            with TRACER.start_as_current_span("inner"):
                moments.now()
                token = context.attach(context.set_value("not", "a span"))
                moments.now()
                context.detach(token)
            moments.now()
        moments.now()
    assert moments.found(current) == moments.said()
    assert len({span.span_id for span in moments.found(current) if span}) == 6


def test_each_thread_has_its_own_even_when_it_has_ended(current: CurrentSpans) -> None:
    moments: list[Moments] = []

    def run() -> None:
        mine = Moments()
        mine.now()
        with TRACER.start_as_current_span("in a thread"):
            mine.now()
        mine.now()
        moments.append(mine)

    for _ in range(5):
        in_thread(run)
    for each in moments:
        assert each.found(current) == each.said() and each.found(current)[1]
    assert current.at(1, time.monotonic_ns()) is None


def test_what_a_thread_left_attached_ends_with_it(current: CurrentSpans) -> None:
    """The kernel gives its number away again, and who has it then may attach nothing."""
    moments: list[Moments] = []

    def run() -> None:
        moments.append(Moments())
        context.attach(trace.set_span_in_context(remote(7)))
        moments[0].now()

    in_thread(run)
    assert moments[0].found(current) == moments[0].said() and moments[0].found(current)[0]
    assert current.at(moments[0].tid, time.monotonic_ns()) is None


def test_no_more_is_remembered_than_there_is_room_for(current: CurrentSpans) -> None:
    """Before that, nothing is known: no span, and none that came later."""
    moments = Moments()
    with TRACER.start_as_current_span("first"):
        moments.now()
        for _ in range(REMEMBERED // 2):
            context.detach(context.attach(context.get_current()))
        moments.now()
        with TRACER.start_as_current_span("inner"):
            moments.now()
    assert moments.found(current) == [None, None, moments.said()[2]]


def test_suppressed(current: CurrentSpans) -> None:
    """As a thread's first context, and within a span."""
    moments = Moments()
    with suppress_instrumentation():
        moments.now()
    with TRACER.start_as_current_span("outer"):
        with suppress_instrumentation():
            moments.now()
        moments.now()
    assert moments.found(current) == [SUPPRESSED, SUPPRESSED, moments.said()[2]]


def test_a_context_that_a_pool_runs_in(current: CurrentSpans) -> None:
    """As to_thread() does: what is attached there counts, what is inherited is not known, and nothing stays."""
    with TRACER.start_as_current_span("request"):
        carried = contextvars.copy_context()
    done: list[Moments] = []

    def work() -> None:
        mine = Moments()
        mine.now()
        with TRACER.start_as_current_span("query"):
            mine.now()
        mine.now()
        done.append(mine)

    def run() -> None:
        carried.run(work)
        mine = Moments()
        mine.now()
        done.append(mine)

    in_thread(run)
    inside, after = done
    assert inside.found(current) == [None, inside.said()[1], None]
    assert inside.said()[0] and inside.said()[1]
    assert after.found(current) == [None]


def test_an_event_loop(current: CurrentSpans) -> None:
    """Tasks take turns: nothing is current for sure, until the loop has ended and what was before is restored."""
    moments = Moments()

    async def task(name: str) -> None:
        with TRACER.start_as_current_span(name):
            for _ in range(3):
                moments.now()
                await asyncio.sleep(0)
        moments.now()

    async def main() -> None:
        await asyncio.gather(task("one"), task("other"))

    asyncio.run(main())
    assert moments.found(current) == [None] * 8
    with TRACER.start_as_current_span("outer") as outer:
        asyncio.run(main())
        assert moments.found(current) == [None] * 16
        with TRACER.start_as_current_span("inner") as inner:
            after = Moments()
            after.now()
        after.now()
    assert after.found(current) == [inner.get_span_context(), outer.get_span_context()]


def test_greenlets(current: CurrentSpans) -> None:
    moments = Moments()
    main = greenlet.getcurrent()

    def run(name: str) -> None:
        with TRACER.start_as_current_span(name):
            moments.now()
            main.switch()
            moments.now()

    one, other = greenlet.greenlet(run), greenlet.greenlet(run)
    one.switch("one")
    other.switch("other")
    one.switch()
    other.switch()
    assert moments.found(current) == [None] * 4 and all(moments.said())


def test_trio(current: CurrentSpans) -> None:
    moments = Moments()

    async def task(name: str) -> None:
        with TRACER.start_as_current_span(name):
            moments.now()
            await trio.sleep(0)
            moments.now()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task, "one")
            nursery.start_soon(task, "other")

    trio.run(main)
    assert moments.found(current) == [None] * 4 and all(moments.said())
    with TRACER.start_as_current_span("after"):
        moments.now()
    assert moments.found(current)[-1] == moments.said()[-1]


def test_greenlets_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was logged before may have been theirs: none of it counts, and from then on they are told apart."""
    monkeypatch.setattr(module, "_ALWAYS_INTERLEAVING", ())
    monkeypatch.setattr(module, "_INTERLEAVING", ())
    watching = CurrentSpans()
    watching.start()
    try:
        moments = Moments()
        with TRACER.start_as_current_span("before"):
            moments.now()
            assert moments.found(watching) == moments.said()
            monkeypatch.setattr(module, "_INTERLEAVING", ("greenlet",))
            assert moments.found(watching) == [None]
            greenlet.greenlet(lambda: in_span(moments)).switch()
            in_span(moments)
            moments.now()
        assert moments.found(watching) == [None, None, moments.said()[2], None]
    finally:
        watching.stop()


def in_span(moments: Moments) -> None:
    with TRACER.start_as_current_span("within"):
        moments.now()


def test_gevent_makes_everything_unsure(current: CurrentSpans, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = Moments()
    with TRACER.start_as_current_span("outer"):
        moments.now()
    assert moments.found(current) == moments.said()
    monkeypatch.setattr(module, "_ALWAYS_INTERLEAVING", ("greenlet",))
    assert moments.found(current) == [None]


def test_tokens_in_any_order(current: CurrentSpans) -> None:
    """Detached late, twice, in another thread, or never: no span that has been left is current."""
    moments = Moments()
    spans = [TRACER.start_span(str(number)) for number in range(3)]
    tokens = [context.attach(trace.set_span_in_context(span)) for span in spans]
    context.detach(tokens[0])  # the innermost stays attached, for OpenTelemetry; not for us
    moments.now()
    context.detach(tokens[2])
    context.detach(tokens[1])
    moments.now()
    in_thread(lambda: context.detach(tokens[0]))
    moments.now()
    assert moments.found(current) == [None] * 3
    for _ in range(500):  # never detached
        context.attach(trace.set_span_in_context(spans[0]))
    moments.now()
    assert moments.found(current)[-1] == spans[0].get_span_context()
    context.attach(context.Context())
    moments.now()
    assert moments.found(current)[-1] is None


def test_a_child_goes_on_in_its_parents_span(current: CurrentSpans) -> None:
    with TRACER.start_as_current_span("outer") as outer:
        ends = os.pipe()
        child = os.fork()
        if not child:
            current.forked()
            moments = Moments()
            moments.now()
            with TRACER.start_as_current_span("inner") as inner:
                moments.now()
            well = moments.found(current) == [outer.get_span_context(), inner.get_span_context()]
            os.write(ends[1], b"well" if well else b"not")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(ends[0], 10) == b"well"
    for fd in ends:
        os.close(fd)


def test_all_is_as_it_was_afterwards() -> None:
    runtime = context._RUNTIME_CONTEXT
    before = dict(vars(runtime))
    for _ in range(2):
        watching = CurrentSpans()
        watching.start()
        assert dict(vars(runtime)) != before
        watching.stop()
        assert dict(vars(runtime)) == before


def test_somebody_who_replaced_them_since_stays() -> None:
    runtime = context._RUNTIME_CONTEXT
    watching = CurrentSpans()
    watching.start()
    ours = runtime.attach
    theirs = lambda given: ours(given)  # noqa: E731
    runtime.attach = theirs  # type: ignore[method-assign]
    try:
        watching.stop()
        assert runtime.attach is theirs
        with TRACER.start_as_current_span("outer") as outer:
            assert trace.get_current_span() is outer
        assert watching.at(threading.get_native_id(), time.monotonic_ns()) is None
    finally:
        for name in ("attach", "detach"):
            vars(runtime).pop(name, None)


def test_what_a_span_of_somebodys_own_raises_is_nobodys(current: CurrentSpans) -> None:
    class Broken(trace.NonRecordingSpan):
        def get_span_context(self) -> SpanContext:
            raise RuntimeError

    token = context.attach(trace.set_span_in_context(Broken(trace.INVALID_SPAN_CONTEXT)))
    assert isinstance(trace.get_current_span(), Broken)
    context.detach(token)
    assert current.at(threading.get_native_id(), time.monotonic_ns()) is None


def test_spans_that_were_not_begun_here(current: CurrentSpans) -> None:
    """A remote parent, one that another thread began, and one that is open: it is who is current that counts."""
    moments, begun = Moments(), list[Span]()
    in_thread(lambda: begun.append(TRACER.start_span("elsewhere")))
    with trace.use_span(remote(7)):
        moments.now()
        with trace.use_span(begun[0]):
            opened = TRACER.start_span("open")
            moments.now()
            with trace.use_span(opened, end_on_exit=False):
                moments.now()
            moments.now()
            opened.end()
    assert moments.found(current) == moments.said() and all(moments.found(current))


def test_spans_that_are_none(current: CurrentSpans) -> None:
    """An invalid one is none, and one of another make is asked as the API has it."""

    class Own(NonRecordingSpan):
        def __init__(self) -> None:
            self.mine = SpanContext(5, 5, is_remote=False)

        def get_span_context(self) -> SpanContext:
            return self.mine

    moments = Moments()
    for span in (trace.INVALID_SPAN, Own()):
        with trace.use_span(span):
            moments.now()
    assert moments.found(current) == moments.said() == [None, SpanContext(5, 5, is_remote=False)]


def test_an_applications_objects_are_not_kept(current: CurrentSpans) -> None:
    gone: list[str] = []

    class Own(NonRecordingSpan):
        def __del__(self) -> None:
            gone.append("gone")

    context.detach(context.attach(trace.set_span_in_context(Own(SpanContext(5, 5, is_remote=False)))))
    assert gone == ["gone"]


def test_an_outer_span_is_known_for_so_many_changes_within_it(current: CurrentSpans) -> None:
    moments = Moments()
    with TRACER.start_as_current_span("outer") as outer:
        moments.now()
        for _ in range((REMEMBERED - 2) // 2):
            context.detach(context.attach(trace.set_span_in_context(remote(1))))
        moments.now()
        assert moments.found(current) == [outer.get_span_context()] * 2
        context.detach(context.attach(trace.set_span_in_context(remote(1))))
        assert moments.found(current) == [None, None]
        assert current.at(threading.get_native_id(), time.monotonic_ns()) is None
