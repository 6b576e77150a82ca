"""The plugin at work: one daemon thread that keeps a connection to an agent and makes spans of what it tells."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

from opentelemetry import metrics, trace

from .. import __version__
from ..serving.connection import Connection, is_served
from ..serving.protocol import ProtocolError
from ..telemetry.collector import SCHEMA_URL, SCOPE
from .current import CurrentSpans
from .histogram import ProcessBooks, ReceiveHistogram
from .own_agent import START_S, OwnAgent, may_load
from .settings import PluginSettings
from .spans import ReceiveSpans

ANSWER_S = 10.0  # for an agent that is attached and busy
REFRESH_S = 0.5  # a collection waits so long for fresh totals, at most
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LOOK_FOR_SDK_S = 1.0

_log = logging.getLogger("otel_tcppktlat.instrumentation")


class Service:
    """Begins with start() and ends with stop(); no method raises, or waits longer than REFRESH_S."""

    def __init__(
        self,
        settings: PluginSettings,
        tracer_provider: trace.TracerProvider | None,
        meter_provider: metrics.MeterProvider | None,
    ) -> None:
        """Without a provider, the global one counts, whenever it is set."""
        self._settings = settings
        self._current = CurrentSpans()
        tracer = trace.get_tracer(SCOPE, __version__, tracer_provider, SCHEMA_URL)
        self._spans = ReceiveSpans(tracer, self._current, settings.attributes)
        self._books = ProcessBooks(settings.attributes)
        self._suppressed_before = self._untold = 0
        self._histogram = ReceiveHistogram(meter_provider, self._books, self.refresh, self._suppressed)
        self._own_agent: OwnAgent | None = None
        self._own_agent_starts = False
        self._complained = self._was_served = False
        self._begin()

    def _begin(self) -> None:
        """What belongs to one process: the thread and all that it waits for."""
        self._stopping, self._refreshed, self._tried = threading.Event(), threading.Event(), threading.Event()
        self._connection: Connection | None = None
        self._refreshing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="otel-tcppktlat", daemon=True)

    def start(self) -> None:
        """Watches the current span from now on, and looks for an agent. What it raises leaves everything as it was."""
        try:
            self._start()
        except BaseException:
            self._own_agent_starts = False  # there is no thread that would start it
            self.stop()
            raise

    def _start(self) -> None:
        self._current.start()
        self._histogram.attach()
        if self._settings.load and not is_served(self._settings.socket) and may_load():
            # Now, not in the thread: children that are forked meanwhile have to know where to find it.
            with contextlib.suppress(OSError):
                self._own_agent, self._own_agent_starts = OwnAgent(), True
        self._thread.start()

    def stop(self) -> None:
        """Puts everything back."""
        self._stopping.set()
        self._histogram.detach()
        self._current.stop()
        if connection := self._connection:
            connection.interrupt()
        if self._own_agent and not self._own_agent_starts:
            self._own_agent.end()

    def forked(self) -> None:
        """In a child: the connection is the parent's, and everything is counted anew."""
        if connection := self._connection:
            connection.close()
        if self._own_agent:
            self._own_agent.forked()
        self._own_agent_starts = False
        self._current.forked()
        self._books = self._books.anew()
        self._suppressed_before = self._untold = 0
        self._histogram.forked(self._books)
        stopped = self._stopping.is_set()
        self._begin()
        if not stopped:
            self._thread.start()

    def refresh(self) -> None:
        """Has the agent write this process's totals, and its late pickups before; returns when it has, or too late."""
        self._tried.wait(REFRESH_S)  # a program may be over sooner than it has found the agent
        connection = self._connection
        if connection is None or threading.current_thread() is self._thread:
            return
        with self._refreshing:
            self._refreshed.clear()
            try:
                connection.ask_for_totals()
            except OSError:
                return
            self._refreshed.wait(REFRESH_S)

    def _suppressed(self) -> int:
        return self._suppressed_before + self._untold

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        try:
            if self._own_agent and self._own_agent_starts:
                self._start_own_agent(self._own_agent)
            while not self._stopping.is_set():
                if connection := self._connect():
                    self._listen(connection)
                    pause_s = FIRST_PAUSE_S
                self._tried.set()
                self._wait(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except Exception as error:  # whatever it is, the application goes on without
            _log.warning("receive-queue waits are measured no more: %r", error)
            self._tried.set()

    def _start_own_agent(self, own_agent: OwnAgent) -> None:
        try:
            own_agent.start()
        except OSError as error:
            _log.warning("no agent could be started: %s", error)
            own_agent.forked()
        self._own_agent_starts = False
        if self._stopping.is_set():
            own_agent.end()

    def _wait(self, pause_s: float) -> None:
        """Until the next attempt; meanwhile the SDK may have come."""
        end_s = time.monotonic() + pause_s
        while not self._stopping.is_set() and (left_s := end_s - time.monotonic()) > 0:
            attached = self._histogram.attach()
            self._stopping.wait(left_s if attached else min(left_s, LOOK_FOR_SDK_S))

    def _connect(self) -> Connection | None:
        reasons = []
        addresses = [(self._settings.socket, ANSWER_S)]
        if self._own_agent:
            addresses.append((self._own_agent.address, START_S))
        for address, answer_s in addresses:
            try:
                return Connection(address, self._settings.from_ns, self._settings.pause_ns, answer_s)
            except (OSError, ValueError, ProtocolError) as error:
                reasons.append(getattr(error, "strerror", None) or str(error))
        if self._own_agent and not self._was_served and (trouble := self._own_agent.trouble()):
            self._complain(trouble)
        else:
            self._complain(
                f"no agent on {self._settings.socket} ({reasons[0]}): start one on this host with "
                f"`otel-tcppktlat --serve {self._settings.socket}`, or name its socket in OTEL_PYTHON_TCPPKTLAT_SOCKET"
            )
        return None

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("receive-queue waits are not measured: %s", why)

    def _listen(self, connection: Connection) -> None:
        """Until the agent is gone."""
        self._connection, self._was_served = connection, True
        _log.info("receive-queue waits are measured")
        try:
            self._take_totals(connection)
            self._tried.set()
            while not self._stopping.is_set():
                if not self._histogram.attach() and not connection.has_news(LOOK_FOR_SDK_S):
                    continue
                late, totals = connection.hear()
                if late or totals:
                    self._take_late(connection)
                if totals:
                    self._take_totals(connection)
                    self._refreshed.set()
        except OSError:
            self._take_late(connection)
            self._take_totals(connection)  # an agent that ends well writes them a last time
        finally:
            self._connection = None
            self._suppressed_before, self._untold = self._suppressed(), 0
            self._refreshed.set()
            connection.close()

    def _take_late(self, connection: Connection) -> None:
        events, lost = connection.area.events()
        self._suppressed_before += lost
        if events:
            self._histogram.add_exemplars(self._spans.make(events))

    def _take_totals(self, connection: Connection) -> None:
        if read := connection.area.totals():
            rows, self._untold = read
            self._books.take(connection.agent, connection.buckets, rows)


def at_fork(service_of: Callable[[], Service | None]) -> None:
    """From now on a child of this process has a service of its own, if its parent had one."""

    def after_in_child() -> None:
        service = service_of()
        if service:
            try:
                service.forked()
            except Exception as error:
                _log.warning("receive-queue waits are not measured in this child: %r", error)

    os.register_at_fork(after_in_child=after_in_child)
