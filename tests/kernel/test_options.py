"""The programs load, and count, whatever they are compiled for: each is another text to the verifier."""

from __future__ import annotations

import os

import pytest

from otel_tcppktlat.buckets import explicit_buckets, exponential_buckets
from otel_tcppktlat.probe.layout import Event
from otel_tcppktlat.probe.probe import Probe, ProbeOptions
from support.agent import Pair
from support.kernels import flavours

EXPLICIT, EXPONENTIAL = explicit_buckets().bounds_ns, exponential_buckets().bounds_ns
WAITS = 3


def check(flavour: str, options: ProbeOptions) -> None:
    """Loads the programs with these options, and compares some waits with what they say of them."""
    rows: list[Event] = []
    with Pair() as pair:
        its_options = ProbeOptions(**{**vars(options), "flavour": flavour, "lport": pair.port})
        probe = Probe(its_options, rows.append)
        probe.open()
        try:
            for _ in range(WAITS):
                pair.wait(0.002)
            probe.poll()
            (delta,) = probe.harvest().deltas
            assert sum(delta.counts) == probe.books()["observed"] == WAITS
            assert len(delta.counts) == len(options.bounds_ns) + 1
            assert [row.segments for row in rows] == [1] * WAITS * options.rows
        finally:
            probe.close()


@pytest.mark.parametrize("flavour", flavours())
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ProbeOptions(EXPLICIT, exemplars=False, rows=True), id="table"),
        pytest.param(ProbeOptions(EXPONENTIAL, exemplars=False, rows=True, min_us=1), id="table-exponential-min"),
        pytest.param(ProbeOptions(EXPLICIT, exemplars=False), id="histogram-alone"),
        pytest.param(ProbeOptions(EXPONENTIAL, serve=16), id="serving"),
        pytest.param(ProbeOptions(EXPLICIT, exemplars=False, rows=True, min_us=1, serve=16), id="serving-table"),
        pytest.param(ProbeOptions(EXPONENTIAL, rows=True, key_address=True, max_series=16), id="exponential-all"),
        pytest.param(ProbeOptions((1000,), rows=True), id="one-bound"),
        pytest.param(ProbeOptions(explicit_buckets([s / 1e3 for s in range(1, 128)]).bounds_ns), id="most-bounds"),
        pytest.param(ProbeOptions(EXPLICIT, pid=os.getpid(), tid=os.getpid(), rows=True), id="pid-tid"),
    ],
)
def test_every_combination_loads_and_counts(flavour: str, options: ProbeOptions) -> None:
    check(flavour, options)
