"""This process's totals in the application's own metrics: same resource, exporter, interval and temporality.

The SDK has no asynchronous histogram and no MetricProducer (open-telemetry/opentelemetry-python#4768). What all its
readers have, pushing and pulling ones, is the callback that they collect with: it is wrapped, with the method that sets
it, and what it returns gets one scope more. _metric_readers and _collect are private names; there are no public ones.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.sdk.metrics import Exemplar, Histogram
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricsData, ResourceMetrics, ScopeMetrics

from .. import __version__
from ..buckets import Buckets
from ..events import exemplar_attributes
from ..probe.probe import Delta
from ..series import AttributeSet, SeriesTotals
from ..serving.area import Row
from ..settings import EXEMPLAR_FILTER
from ..telemetry.collector import SCHEMA_URL, SELF_SCOPE, duration_metric, in_scope
from ..telemetry.points import CUMULATIVE, DELTA, Acknowledged, histogram_point
from .spans import MadeSpan

_log = logging.getLogger(__name__)


class ProcessBooks:
    """What agents have said of this process: each counts from its own begin on, or from the process's."""

    def __init__(self, attributes: Sequence[str]) -> None:
        self._names = attributes
        self._lock = threading.Lock()
        self._begin(None)

    def _begin(self, buckets: Buckets | None) -> None:
        self.buckets, self.began_unix_ns = buckets, time.time_ns()
        self._rows: dict[str, Sequence[Row]] = {}  # by agent

    def anew(self) -> ProcessBooks:
        """Those of another process."""
        return ProcessBooks(self._names)

    def take(self, agent: str, buckets: Buckets, rows: Sequence[Row]) -> None:
        """An agent's totals, in place of what it said before."""
        with self._lock:
            if buckets != self.buckets:
                self._begin(buckets)
            self._rows[agent] = rows

    def totals(self) -> tuple[Buckets, int, SeriesTotals] | None:
        """Buckets, begin and totals by attributes; None if no agent has said anything."""
        with self._lock:
            if self.buckets is None:
                return None
            totals = SeriesTotals(self._names, len(self.buckets.bounds_ns) + 1)
            for rows in self._rows.values():
                for row in rows:
                    totals.add(Delta(row.series, row.sum_ns, row.counts))
            return self.buckets, self.began_unix_ns, totals


@dataclass
class _Reader:
    """What one reader has collected, and the exemplars that it has not, by attributes and bucket."""

    inner: Callable[..., MetricsData | None]
    ours: Callable[..., MetricsData | None] | None = None
    collected: dict[AttributeSet, Acknowledged] = field(default_factory=dict)
    since_unix_ns: int = 0
    exemplars: dict[AttributeSet, dict[int, Exemplar]] = field(default_factory=dict)


class ReceiveHistogram:
    """Adds the histogram to what the readers of a meter provider collect."""

    def __init__(
        self,
        provider: MeterProvider | None,
        books: ProcessBooks,
        refresh: Callable[[], None],
        suppressed: Callable[[], int],
    ) -> None:
        """`provider`: None for the global one, whenever it is set. `refresh` has the books written anew."""
        self._provider, self._books, self._refresh, self._suppressed = provider, books, refresh, suppressed
        self._readers: dict[Any, _Reader] = {}
        self._observed: MeterProvider | None = None
        self._exemplars_wanted = os.environ.get(EXEMPLAR_FILTER, "").strip().lower() != "always_off"
        self._stopped = False
        self._lock = threading.Lock()  # of the readers

    def attach(self) -> bool:
        """Wraps the readers that are there and not wrapped yet. False if there is no SDK yet."""
        with self._lock:
            return self._stopped or self._attach()

    def _attach(self) -> bool:
        provider = self._provider or metrics.get_meter_provider()
        readers = getattr(provider, "_metric_readers", None)
        if readers is None:
            return False
        for reader in readers:
            if reader not in self._readers and reader._collect is not None:
                self._readers[reader] = state = _Reader(reader._collect)
                state.ours = self._collecting(state)
                reader._set_collect_callback(state.ours)
        if self._observed is not provider:
            self._observed = provider
            self._observe(provider)
        return True

    def detach(self) -> None:
        """Gives the readers their own callbacks back."""
        with self._lock:
            self._stopped = True
            for reader, state in self._readers.items():
                if reader._collect is state.ours:
                    reader._set_collect_callback(state.inner)
            self._readers.clear()

    def forked(self, books: ProcessBooks) -> None:
        """In a child, with its own books."""
        self._books, self._lock = books, threading.Lock()
        for state in self._readers.values():
            state.collected, state.exemplars = {}, {}

    def _observe(self, provider: MeterProvider) -> None:
        """Self-telemetry; without any instrument, the SDK would collect nothing that the histogram could go with."""
        meter = metrics.get_meter(SELF_SCOPE, __version__, provider, SCHEMA_URL)

        def suppressed(_options: CallbackOptions) -> Iterable[Observation]:
            if not self._stopped:
                yield Observation(self._suppressed())

        meter.create_observable_counter(
            "tcppktlat.spans.suppressed", [suppressed], "{span}", "Spans not made, because there were too many."
        )

    def _collecting(self, state: _Reader) -> Callable[..., MetricsData | None]:
        def collect(reader: Any, *arguments: Any, **named: Any) -> MetricsData | None:
            data = state.inner(reader, *arguments, **named)
            try:
                return self._with_histogram(reader, state, data)
            except Exception:
                _log.debug("the receive-queue histogram is missing from this collection", exc_info=True)
                return data

        return collect

    def _with_histogram(self, reader: Any, state: _Reader, data: MetricsData | None) -> MetricsData | None:
        if data is None or not data.resource_metrics:
            return data
        self._refresh()
        preferred = getattr(reader, "_preferred_temporality", None) or {}
        scope = self._scope(state, preferred.get(Histogram, CUMULATIVE))
        if scope is None:
            return data
        first, *others = data.resource_metrics
        with_ours = ResourceMetrics(first.resource, [*first.scope_metrics, scope], first.schema_url)
        return MetricsData([with_ours, *others])

    def _scope(self, state: _Reader, temporality: AggregationTemporality) -> ScopeMetrics | None:
        said = self._books.totals()
        if said is None:
            return None
        buckets, began_unix_ns, totals = said
        if state.since_unix_ns != began_unix_ns:
            state.since_unix_ns, state.collected = began_unix_ns, {}
        unix_ns = time.time_ns()
        nothing = Acknowledged((0,) * totals.buckets, 0, began_unix_ns)
        exemplars, state.exemplars = state.exemplars, {}
        points = []
        for attributes, total in totals.totals.items():
            since = state.collected.get(attributes, nothing) if temporality == DELTA else nothing
            if temporality == DELTA:
                if since.counts == tuple(total.counts):
                    continue
                state.collected[attributes] = Acknowledged(tuple(total.counts), total.sum_ns, unix_ns)
            found = [*exemplars.get(attributes, {}).values()]
            points.append(histogram_point(buckets, attributes, total, since, unix_ns, found))
        return in_scope([duration_metric(points, temporality)]) if points else None

    def add_exemplars(self, made: Sequence[MadeSpan]) -> None:
        """The slowest of each bucket since a reader's last collection goes with its next one."""
        if not self._exemplars_wanted:
            return
        for each in made:
            exemplar = Exemplar(
                filtered_attributes=exemplar_attributes(each.event, each.attributes),
                value=each.event.wait_ns / 1e9,
                time_unix_nano=each.end_unix_ns,
                span_id=each.context.span_id,
                trace_id=each.context.trace_id,
            )
            for state in [*self._readers.values()]:
                by_bucket = state.exemplars.setdefault(each.attributes, {})
                known = by_bucket.get(each.event.bucket)
                if known is None or known.value < exemplar.value:
                    by_bucket[each.event.bucket] = exemplar
