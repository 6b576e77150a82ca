"""Which span was current on a thread at a moment: a short log of each change of OpenTelemetry's context, read later.

opentelemetry.context has no hook, and a runtime context of our own (OTEL_PYTHON_CONTEXT) would have to be chosen before
that module is imported. So attach and detach of the one that is in use are replaced, on the object, not on its class.
They take the place of its own: an application calls no function more than before, and all thinking is done when a late
pickup is asked for.

A thread reads its sockets between its own changes of context, never during one. So the time of a pickup tells exactly
which span was current, if the thread runs one thing after the other. Tasks and greenlets do not: while they run, and in
whatever this module did not see begin, no span counts as current.
"""

from __future__ import annotations

import bisect
import sys
import threading
import time
from asyncio import _get_running_loop
from collections import deque
from collections.abc import Callable
from typing import Any

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation import _SPAN_KEY

REMEMBERED = 1024  # changes of a thread; late pickups are told within some ms
REMEMBERED_ENDED, ENDED_THREADS = 64, 64
_ALWAYS_INTERLEAVING = ("gevent", "eventlet")  # they switch wherever a thread would wait
_INTERLEAVING = ("greenlet", "trio")  # asyncio is asked in any case, and other event loops are its


class _Suppressed(SpanContext):
    """Stands for a context in which instrumentation is suppressed: the SDK's own exports."""


SUPPRESSED = _Suppressed(0, 0, is_remote=False)
_DETACHED = _Suppressed(0, 0, is_remote=False)  # in the place of the span: a token was given back
_FORGET = 0  # in the place of the token: nothing of before is known any more

# CLOCK_MONOTONIC in ns, id() of the token, whether the thread ran nothing but this, and the span that is current now.
# No reference to a context, a token or a span: an application's objects live as long as it wants them to.
_Change = tuple[int, int, bool, "SpanContext | None"]


class _Thread:
    """One thread's log."""

    def __init__(self) -> None:
        self.tid = threading.get_native_id()
        self.changes: deque[_Change] = deque(maxlen=REMEMBERED)

    def at(self, when_ns: int) -> tuple[bool, SpanContext | None]:
        """(whether that is remembered, what was current for sure)."""
        changes = self.changes.copy()
        last = bisect.bisect_right(changes, when_ns, key=lambda change: change[0]) - 1
        return last >= 0, _current_after(changes, last)


def _current_after(changes: deque[_Change], last: int) -> SpanContext | None:
    """The innermost of those that were attached by then, and had not been detached."""
    if not changes[last][2]:
        return None
    detached: set[int] = set()
    for number in range(last, -1, -1):
        _, token, alone, span = changes[number]
        if token == _FORGET:
            break
        if not alone:
            continue  # a task's or a greenlet's: what is below stays
        if span is _DETACHED:
            detached.add(token)
        elif token in detached:
            detached.remove(token)
        else:
            return span if not detached else None  # something around it has been left already
    return None


class _End:
    """Told when its thread's locals go."""

    def __init__(self, callback: Callable[[_Thread], None], thread: _Thread) -> None:
        self._callback, self._thread = callback, thread

    def __del__(self) -> None:
        self._callback(self._thread)


class CurrentSpans:
    """Begins to watch with start(), and ends with stop()."""

    def __init__(self) -> None:
        self._runtime: Any = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._local = threading.local()
        self._threads: dict[int, _Thread] = {}
        self._ended: deque[_Thread] = deque(maxlen=ENDED_THREADS)

    def start(self) -> None:
        """Replaces attach and detach."""
        runtime: Any = context_api._RUNTIME_CONTEXT
        self._before = {name: vars(runtime).get(name) for name in ("attach", "detach")}
        attach, detach = runtime.attach, runtime.detach
        if type(runtime) is ContextVarsRuntimeContext and not any(self._before.values()):
            attach, detach = runtime._current_context.set, runtime._current_context.reset  # all that it does itself
        self._asked = _loaded(_INTERLEAVING)
        self._ours = self._watching(attach, detach, _interleaved if self._asked else _get_running_loop)
        runtime.attach, runtime.detach = self._ours
        self._runtime = runtime

    def stop(self) -> bool:
        """Puts them back; False if somebody else has replaced them since: then they stay, and nobody reads the log."""
        runtime, self._runtime = self._runtime, None
        ours = (runtime.attach, runtime.detach) == self._ours
        if ours:
            for name, before in self._before.items():
                if before is None:
                    delattr(runtime, name)  # the class's own
                else:
                    setattr(runtime, name, before)
        self._begin_anew()
        return ours

    def _watching(
        self, attach: Callable[[Any], Any], detach: Callable[[Any], None], interleaved: Callable[[], object]
    ) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
        """`interleaved`: returns None if the thread runs nothing but this."""
        # What runs at each change of context: as little as can be, and what it raises is nobody's.
        local, now_ns, begin = self._local, time.monotonic_ns, self._begin
        span_key, suppress, suppressed = _SPAN_KEY, context_api._SUPPRESS_INSTRUMENTATION_KEY, SUPPRESSED

        def attaching(context: Any) -> Any:
            token = attach(context)
            span: SpanContext | None
            try:
                if suppress in context:
                    span = suppressed
                else:
                    span = context[span_key]._context if span_key in context else None
                local.log((now_ns(), id(token), interleaved() is None, span))
            except Exception:  # this thread's first, or a span of somebody's own
                begin()((now_ns(), id(token), interleaved() is None, _span_of(context)))
            return token

        def detaching(token: Any) -> None:
            try:
                detach(token)
            except BaseException:
                begin()((now_ns(), _FORGET, True, None))
                raise
            try:
                local.log((now_ns(), id(token), interleaved() is None, _DETACHED))
            except AttributeError:
                pass  # a thread that has attached nothing

        return attaching, detaching

    def _begin(self) -> Callable[[_Change], None]:
        """The calling thread's log: how to add to it."""
        if not hasattr(self._local, "log"):
            thread = _Thread()
            self._local.thread, self._local.log = thread, thread.changes.append
            self._local.end = _End(self._thread_ended, thread)
            self._threads[thread.tid] = thread
        log: Callable[[_Change], None] = self._local.log
        return log

    def _thread_ended(self, thread: _Thread) -> None:
        if self._threads.get(thread.tid) is thread:
            del self._threads[thread.tid]
            thread.changes = deque(thread.changes, REMEMBERED_ENDED)
            self._ended.append(thread)

    def forked(self) -> None:
        """In a child: of all threads only the calling one is left, with another id."""
        self._threads.clear()
        self._ended.clear()
        if thread := getattr(self._local, "thread", None):
            thread.tid = threading.get_native_id()
            self._threads[thread.tid] = thread

    def at(self, tid: int, when_ns: int) -> SpanContext | None:
        """The span that was current on a thread, by its kernel id, at a time of CLOCK_MONOTONIC.

        None if there was none, or none for sure. SUPPRESSED if nothing is to be made of what the thread did.
        """
        if self._runtime is None or _loaded(_ALWAYS_INTERLEAVING):
            return None
        if _loaded(_INTERLEAVING) != self._asked:  # whatever was logged until now may have been theirs
            if self.stop():
                self.start()
            return None
        for thread in (self._threads.get(tid), *reversed([one for one in self._ended.copy() if one.tid == tid])):
            known, current = thread.at(when_ns) if thread else (False, None)
            if known:
                return current if current is None or current is SUPPRESSED or current.is_valid else None
        return None


def _span_of(context: Any) -> SpanContext | None:
    if context_api._SUPPRESS_INSTRUMENTATION_KEY in context:
        return SUPPRESSED
    try:
        return trace.get_current_span(context).get_span_context()
    except Exception:  # it is not for us to complain
        return None


def _loaded(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in sys.modules]


def _interleaved() -> object:
    """A task or a greenlet that runs here, and not the thread itself; None if there is neither."""
    if loop := _get_running_loop():
        return loop
    modules: dict[str, Any] = sys.modules
    if "trio" in modules:
        try:
            return modules["trio"].lowlevel.current_task()
        except RuntimeError:
            pass
    current = modules["greenlet"].getcurrent() if "greenlet" in modules else None
    return current if current is not None and current.parent is not None else None
