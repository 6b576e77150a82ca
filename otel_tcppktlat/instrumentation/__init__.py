"""A plugin of the OpenTelemetry Python agent: receive-queue waits of this process in its own metrics and traces."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]

from .service import Service, at_fork
from .settings import read_settings

_log = logging.getLogger(__name__)


class TcpReceiveQueueInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Measures how long received TCP data waits until this process reads it.

    `tcppktlat.receive_queue.duration` goes with the application's metrics, and each wait over a threshold becomes a
    span `tcp receive`, child of the span that was current on the thread that read. It takes an agent that serves on
    this host (`otel-tcppktlat --serve`), or the privilege to load eBPF programs.
    """

    _service: Service | None = None
    _follows_forks = False

    def instrumentation_dependencies(self) -> Collection[str]:
        """None: it measures what the kernel does."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        """Takes `tracer_provider` and `meter_provider`; without them the global ones count. Raises nothing."""
        try:
            if not self._follows_forks:
                self._follows_forks = True
                at_fork(lambda: self._service)
            self._service = Service(read_settings(), kwargs.get("tracer_provider"), kwargs.get("meter_provider"))
            self._service.start()
        except Exception as error:  # whatever it is, the application goes on, and so do its other instrumentations
            self._service = None
            _log.warning("receive-queue waits are not measured: %r", error)

    def _uninstrument(self, **kwargs: Any) -> None:
        service, self._service = self._service, None
        if service:
            service.stop()
