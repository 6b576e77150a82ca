"""What each process of the host has read since it began, for those that ask."""

from __future__ import annotations

from ..probe.layout import ProcessKey
from ..probe.probe import Harvest, Series
from ..series import Totals
from .area import Row


class ProcessTotals:
    """Totals of the processes that the kernel has series of; one that is gone, and counted, is forgotten."""

    def __init__(self) -> None:
        self._totals: dict[bytes, dict[bytes, tuple[Series, Totals]]] = {}  # by process, by series

    def add(self, harvest: Harvest) -> None:
        """Adds an interval."""
        for delta in harvest.deltas:
            if delta.series is None:  # the kernel's overflow series is nobody's
                continue
            of_process = self._totals.setdefault(bytes(delta.series.key.process), {})
            key = bytes(delta.series.key)
            _, known = of_process.get(key, (delta.series, Totals((0,) * len(delta.counts))))
            of_process[key] = delta.series, known.plus(delta)
        alive = {bytes(series.key.process) for series in harvest.live.values()}
        for gone in self._totals.keys() - alive:
            del self._totals[gone]

    def rows(self, process: ProcessKey) -> list[Row]:
        """One process's."""
        of_process = self._totals.get(bytes(process), {}).values()
        return [Row(series, totals.sum_ns, totals.counts) for series, totals in of_process]
