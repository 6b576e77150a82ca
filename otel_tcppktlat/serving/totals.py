"""What each process of the host has read since it began, for those that ask."""

from __future__ import annotations

from ..probe.layout import ProcessKey
from ..probe.probe import Harvest
from .area import Row


class ProcessTotals:
    """Totals of the processes that the kernel has series of; one that is gone, and counted, is forgotten."""

    def __init__(self) -> None:
        self._rows: dict[bytes, dict[bytes, Row]] = {}  # by process, by series

    def add(self, harvest: Harvest) -> None:
        """Adds an interval."""
        for delta in harvest.deltas:
            if delta.series is None:  # the kernel's overflow series is nobody's
                continue
            rows = self._rows.setdefault(bytes(delta.series.key.process), {})
            key = bytes(delta.series.key)
            sum_ns, counts = delta.sum_ns, [*delta.counts]
            if known := rows.get(key):
                sum_ns += known.sum_ns
                counts = [before + more for before, more in zip(known.counts, counts, strict=True)]
            rows[key] = Row(delta.series, sum_ns, counts)
        alive = {bytes(series.key.process) for series in harvest.live.values()}
        for gone in self._rows.keys() - alive:
            del self._rows[gone]

    def rows(self, process: ProcessKey) -> list[Row]:
        """One process's."""
        return [*self._rows.get(bytes(process), {}).values()]
