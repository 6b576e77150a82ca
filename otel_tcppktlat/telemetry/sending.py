"""Sends one signal's requests, one at a time, and says what became of each, for whoever decides what to do about it."""

from __future__ import annotations

import contextlib
import contextvars
import enum
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.trace.export import SpanExporter

from .diagnosis import Ended, Watch

LONGEST_HOLD_S = 300.0  # that a receiver may ask for
_COME_AGAIN = (  # OTLP specification, "Failures" of OTLP/gRPC and OTLP/HTTP
    *("CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"),
    *(408, 429, 502, 503, 504),
)


class Fate(enum.Enum):
    """What became of a request, for whoever made it."""

    DELIVERED = enum.auto()
    FAILED = enum.auto()  # no receiver was reached, or it asks to come again
    DENIED = enum.auto()  # it will not help to come again, until somebody sets something right
    REFUSED = enum.auto()  # the receiver will never take this data
    TOO_LARGE = enum.auto()  # it may take parts of it


def fate(ended: Ended) -> Fate:
    """What follows from how an export ended."""
    failure = ended.failure
    if ended.delivered:
        return Fate.DELIVERED
    if ended.abandoned:
        return Fate.FAILED
    if failure is None:
        return Fate.DENIED
    if failure.of_size:
        return Fate.TOO_LARGE
    if failure.of_data:
        return Fate.REFUSED
    no_receiver = failure.code is None or isinstance(failure.code, int) and failure.code < 400
    return Fate.FAILED if no_receiver or failure.code in _COME_AGAIN else Fate.DENIED


_E = TypeVar("_E", MetricExporter, SpanExporter)


class Sender(Generic[_E]):
    """One signal's exporter. An export runs in a thread of its own, so that whoever waits for it can stop waiting."""

    def __init__(self, make: Callable[[], _E], watch: Watch, success: object) -> None:
        """`make` makes the exporter, now, and another one after let_go. `success`: what it returns for it."""
        self._make: Callable[[], _E] = make
        self._success = success
        self.watch = watch
        self.exporter: _E = make()
        self._lock = threading.Lock()
        self._answer: Future[Ended] | None = None
        self._last_before_the_end: Future[Ended] | None = None
        self._held_until_s = 0.0

    def send(self, *arguments: Any, **keywords: Any) -> Ended:
        """Exports and waits for the end of it, or until let_go. Raises what the exporter raises."""
        answer: Future[Ended] = Future()
        with self._lock:
            self._answer, exporter = answer, self.exporter

        def export() -> None:
            try:
                ended = self.watch.attend(lambda: exporter.export(*arguments, **keywords), self._success)
            except Exception as error:
                with self._lock:
                    if not answer.done():
                        answer.set_exception(error)
                return
            with self._lock:
                if not answer.done():
                    answer.set_result(ended)

        # With the SDK's context, which says that nobody shall make spans of what is done here.
        threading.Thread(target=contextvars.copy_context().run, args=(export,), name="export", daemon=True).start()
        ended = answer.result()
        if ended.failure:
            hold_s = min(ended.failure.retry_after_s, LONGEST_HOLD_S)
            self._held_until_s = time.monotonic() + hold_s
        return ended

    def hold_s(self) -> float:
        """For how long the receiver has asked to be left alone from now on."""
        return max(0.0, self._held_until_s - time.monotonic())

    def ending(self) -> None:
        """The agent is about to end: what is under way now may not be waited for much longer."""
        with self._lock:
            self._last_before_the_end = self._answer

    def let_go(self) -> None:
        """Waits no longer for what was under way at ending(). What follows goes by a new exporter: a new connection."""
        with self._lock:
            answer = self._last_before_the_end
            if answer is None or answer.done() or not self.watch.knows:
                return
            self.watch.let_go()
            abandoned, self.exporter = self.exporter, self._make()
            answer.set_result(Ended(False, abandoned=True))
        with contextlib.suppress(Exception):  # it is about to go
            abandoned.shutdown()

    def shutdown(self, *arguments: Any, **keywords: Any) -> None:
        """Shuts the exporter down."""
        self.exporter.shutdown(*arguments, **keywords)
