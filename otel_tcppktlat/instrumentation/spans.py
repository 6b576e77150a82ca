"""Late pickups of this process as spans: children of the one that was current on the thread that read, if known."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, Tracer, set_span_in_context

from ..probe.layout import ROLE_CLIENT, Event, Identity, ProcessKey, SeriesKey
from ..probe.probe import Series
from ..series import ATTRIBUTES, AttributeSet
from ..telemetry.spans import record_span
from .current import SUPPRESSED, CurrentSpans
from .settings import export_ports


@dataclass(frozen=True)
class MadeSpan:
    """A pickup whose span is sampled."""

    event: Event
    attributes: AttributeSet
    context: SpanContext
    end_unix_ns: int


def monotonic_offset_ns() -> int:
    """What this process's CLOCK_MONOTONIC has more than the kernel's own: see time_namespaces(7)."""
    try:
        for line in pathlib.Path("/proc/self/timens_offsets").read_text().splitlines():
            name, seconds, ns = line.split()
            if name in ("monotonic", "1"):
                return int(seconds) * 10**9 + int(ns)
    except (OSError, ValueError):
        pass  # a kernel without time namespaces
    return 0


def _own_names() -> tuple[bytes, bytes]:
    """The executable's file name and the process's name, as the kernel cuts them; empty where there is no /proc."""
    try:
        executable = os.path.basename(os.readlink("/proc/self/exe")).removesuffix(" (deleted)")
        return executable.encode()[:63], pathlib.Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    except OSError:
        return b"", b""


def _series_of(event: Event, executable: bytes, comm: bytes) -> Series:
    client = event.role == ROLE_CLIENT
    key = SeriesKey(
        ProcessKey(0, event.tgid, 0), event.remote_port if client else event.local_port, event.family, event.role
    )
    key.address = event.remote_address if client else event.local_address
    return Series(key, Identity(0, comm, executable))


class ReceiveSpans:
    """Makes the spans."""

    def __init__(self, tracer: Tracer, current: CurrentSpans, attributes: Sequence[str]) -> None:
        self._tracer, self._current, self._names = tracer, current, attributes
        self._export_ports = export_ports()
        self._offset_ns = monotonic_offset_ns()
        self._executable, self._comm = _own_names()

    def make(self, events: Sequence[Event]) -> list[MadeSpan]:
        """Starts and ends a span for each; returns those that are sampled."""
        unix_offset_ns = time.time_ns() - time.monotonic_ns() + self._offset_ns
        made = (self._make(event, unix_offset_ns) for event in sorted(events, key=lambda event: event.picked_ns))
        return [each for each in made if each]

    def _make(self, event: Event, unix_offset_ns: int) -> MadeSpan | None:
        parent = self._current.at(event.own_tid, event.picked_ns + self._offset_ns)
        if parent is SUPPRESSED or (parent and not parent.trace_flags.sampled):
            return None
        if parent is None and event.role == ROLE_CLIENT and event.remote_port in self._export_ports:
            return None  # gRPC's own threads read what the SDK's exporters wait for
        context = set_span_in_context(NonRecordingSpan(parent), Context()) if parent else Context()
        event.tgid, event.tid = os.getpid(), event.own_tid  # as this process's own pid namespace has them
        series = _series_of(event, self._executable, self._comm)
        attributes = tuple((name, ATTRIBUTES[name](series)) for name in self._names)
        end_ns = event.picked_ns + unix_offset_ns
        made = record_span(self._tracer, event, attributes, end_ns, context)
        return MadeSpan(event, attributes, made, end_ns) if made else None
