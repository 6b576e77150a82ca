"""From the kernel's series to sets of attributes, and their cumulative totals.

The kernel tells processes, ports and addresses apart; the user's choice of attributes makes some of those series equal,
and they are merged here. Totals only grow: a process that is gone leaves its counts behind.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .probe.layout import ROLE_CLIENT
from .probe.probe import Delta, Series
from .text import address_text, name_text, network_type

AttributeValue = str | int | bool
AttributeSet = tuple[tuple[str, AttributeValue], ...]

OVERFLOW: AttributeSet = (("otel.metric.overflow", True),)  # OpenTelemetry metrics SDK, "Overflow attribute"
DEFAULT_LIMIT = 2000


def executable_name(series: Series) -> str:
    """The executable's base name; a kernel thread has none, and goes by its comm."""
    return name_text(series.identity.executable or series.identity.comm)


def role(number: int) -> str:
    """Whether the reader's side of the connection is the server's or the client's."""
    return "client" if number == ROLE_CLIENT else "server"


ATTRIBUTES: Mapping[str, Callable[[Series], AttributeValue]] = {
    "process.executable.name": executable_name,
    "server.port": lambda series: int(series.key.port),
    "network.type": lambda series: network_type(series.key.family),
    "tcppktlat.role": lambda series: role(series.key.role),
    "process.pid": lambda series: int(series.key.process.tgid),
    "tcppktlat.process.comm": lambda series: name_text(series.identity.comm),
    "server.address": lambda series: address_text(series.key.family, bytes(series.key.address)),
}
DEFAULT_ATTRIBUTES = ("process.executable.name", "server.port", "network.type", "tcppktlat.role")


@dataclass(frozen=True, slots=True)
class Totals:
    """What one set of attributes has seen since the agent started. Never changed: who has one may go on reading it."""

    counts: Sequence[int]
    sum_ns: int = 0

    def plus(self, delta: Delta) -> Totals:
        """These totals and an interval's numbers."""
        return Totals(array("Q", map(operator.add, self.counts, delta.counts)), self.sum_ns + delta.sum_ns)


@dataclass
class SeriesTotals:
    """Totals by set of attributes; beyond `limit` sets, new ones go to the overflow set."""

    attributes: Sequence[str]
    buckets: int
    limit: int = DEFAULT_LIMIT
    totals: dict[AttributeSet, Totals] = field(default_factory=dict)
    _sets: dict[AttributeSet, AttributeSet] = field(default_factory=dict)
    _pairs: dict[tuple[str, AttributeValue], tuple[str, AttributeValue]] = field(default_factory=dict)

    def set_of(self, series: Series | None) -> AttributeSet:
        """The attributes under which a series is counted; None is the kernel's overflow series."""
        if series is None:
            return OVERFLOW
        wanted = tuple((name, ATTRIBUTES[name](series)) for name in self.attributes)
        if known := self._sets.get(wanted):
            return known  # and not an equal one: thousands would add up
        return wanted if len(self._sets) < self.limit else OVERFLOW

    def add(self, delta: Delta) -> None:
        """Adds what an interval brought to a series."""
        attributes = self.set_of(delta.series)
        known = self.totals.get(attributes)
        if known is None:
            known = Totals((0,) * self.buckets)
            attributes = tuple(self._pairs.setdefault(pair, pair) for pair in attributes)
            if attributes != OVERFLOW:
                self._sets[attributes] = attributes
        self.totals[attributes] = known.plus(delta)
