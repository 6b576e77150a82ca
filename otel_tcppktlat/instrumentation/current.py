"""Which span was current on a thread at a moment: a short log of each change of OpenTelemetry's context, read later.

opentelemetry.context has no hook, and a runtime context of our own (OTEL_PYTHON_CONTEXT) would have to be chosen before
that module is imported. So attach and detach of the one that is in use are replaced, on the object, not on its class.
They take the place of its own: an application calls no function more than before, and all thinking is done when a late
pickup is asked for. What they do costs by what it touches: an application's code has left little of it in the caches.

A thread reads its sockets between its own changes of context, never during one. So the time of a pickup tells exactly
which span was current, if the thread runs one thing after the other. Tasks and greenlets do not: while they run, and in
whatever this module did not see begin, no span counts as current.
"""

from __future__ import annotations

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

REMEMBERED = 128  # changes of a thread; late pickups are told within some ms, and a long log is never in the caches
REMEMBERED_ENDED, ENDED_THREADS = 64, 64
_ALWAYS_INTERLEAVING = ("gevent", "eventlet")  # they switch wherever a thread would wait
_INTERLEAVING = ("greenlet", "trio")  # asyncio is asked in any case, and other event loops are its


class _Suppressed(SpanContext):
    """Stands for a context in which instrumentation is suppressed: the SDK's own exports."""


SUPPRESSED = _Suppressed(0, 0, is_remote=False)

_INTERLEAVED, _DETACHED, _FORGOTTEN = (_Suppressed(0, 0, is_remote=False) for _ in range(3))

# Each change is three parts, one after the other, as a tuple kept for each would cost more than all else. They come
# with one call of deque.extend(), which neither another thread nor a signal's handler sees half done:
# - when it was, CLOCK_MONOTONIC in ns;
# - id() of its token;
# - what is current since: a span or none, SUPPRESSED, or, of a task or a greenlet, _INTERLEAVED. _DETACHED: what was
#   before its token was made. _FORGOTTEN: nobody knows.
# No reference to a context, a token or a span: an application's objects live as long as it wants them to.
_Change = tuple[int, int, SpanContext | None]


class _Thread:
    """One thread's log."""

    def __init__(self) -> None:
        self.tid = threading.get_native_id()
        self.changes: deque[Any] = deque(maxlen=3 * REMEMBERED)

    def at(self, when_ns: int) -> tuple[bool, SpanContext | None]:
        """(whether that is remembered, what was current for sure): the innermost that was attached and not detached."""
        known, detached, latest = False, set[int](), 0
        newest_first = reversed(list(self.changes))
        for what, token, changed_ns in zip(newest_first, newest_first, newest_first, strict=True):
            if changed_ns > when_ns:
                continue
            if not known:
                known, latest = True, token
            if what is _FORGOTTEN:
                break
            if what is _DETACHED:
                detached.add(token)
                continue
            if token == latest:
                if what is _INTERLEAVED:
                    break  # the thread runs tasks or greenlets
                latest = 0
            if token in detached:
                detached.remove(token)
            elif what is not _INTERLEAVED:  # a task's, of before: what is below stays
                return True, what if not detached else None  # else something around it has been left already
        return known, None


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
        """Replaces attach and detach; and get_current, where that makes up for some of it."""
        runtime: Any = context_api._RUNTIME_CONTEXT
        self._before = {name: vars(runtime).get(name) for name in ("attach", "detach", "get_current")}
        attach, detach, get_current = runtime.attach, runtime.detach, runtime.get_current
        if type(runtime) is ContextVarsRuntimeContext and not any(self._before.values()):
            current = runtime._current_context
            attach, detach, get_current = current.set, current.reset, current.get  # all that its own do
        self._asked = _loaded(_INTERLEAVING)
        attach, detach = self._watching(attach, detach, _interleaved if self._asked else _get_running_loop)
        self._ours = {"attach": attach, "detach": detach, "get_current": get_current}
        for name, ours in self._ours.items():
            setattr(runtime, name, ours)
        self._runtime = runtime

    def stop(self) -> bool:
        """Puts them back; False if nothing was begun, or somebody has replaced them: they stay, and nobody reads it."""
        runtime, self._runtime = self._runtime, None
        if runtime is None:
            return False
        ours = all(vars(runtime).get(name) is each for name, each in self._ours.items())
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
        span_key, suppress = _SPAN_KEY, context_api._SUPPRESS_INSTRUMENTATION_KEY

        def attaching(context: Any) -> Any:
            token = attach(context)
            what: SpanContext | None
            try:
                if interleaved() is not None:
                    what = _INTERLEAVED
                elif suppress in context:
                    what = SUPPRESSED
                else:
                    what = None if (span := context.get(span_key)) is None else span._context
                log = local.log
            except Exception:  # this thread's first, or a span of somebody's own
                what = _INTERLEAVED if interleaved() is not None else _span_of(context)
                log = begin()
            log((now_ns(), id(token), what))
            return token

        def detaching(token: Any) -> None:
            try:
                detach(token)
            except BaseException:
                log = begin()
                log((now_ns(), 0, _FORGOTTEN))
                raise
            try:
                log = local.log
            except AttributeError:
                return  # a thread that has attached nothing
            log((now_ns(), id(token), _DETACHED))

        return attaching, detaching

    def _begin(self) -> Callable[[_Change], None]:
        """The calling thread's log: how to add to it."""
        if not hasattr(self._local, "log"):
            thread = _Thread()
            self._local.thread, self._local.log = thread, thread.changes.extend
            self._local.end = _End(self._thread_ended, thread)
            self._threads[thread.tid] = thread
        log: Callable[[_Change], None] = self._local.log
        return log

    def _thread_ended(self, thread: _Thread) -> None:
        if self._threads.get(thread.tid) is thread:
            del self._threads[thread.tid]
            changes = deque(thread.changes, 3 * REMEMBERED_ENDED)
            changes.extend((time.monotonic_ns(), 0, _FORGOTTEN))  # the next one of this number has attached nothing
            thread.changes = changes
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
