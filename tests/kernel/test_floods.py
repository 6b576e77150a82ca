"""More pickups than user space can hear of: what it does not want is counted, and it goes on with its other work."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from kernel.traced import MS, PORT, Load
from otel_tcppktlat.probe.layout import KIND_EXEMPLAR, KIND_ROW
from telemetry.told import Listener, deliver, queued_for


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(port=PORT) as it:
        yield it


def test_a_poll_ends_though_events_come_as_fast_as_they_are_taken(load: Load, listener: Listener) -> None:
    """Each row has its listener make another one. Later polls have what is left."""
    traced = load(exemplars=False)
    sender, reader = listener.connect()
    traced.on_row = lambda: deliver(sender, reader)
    traced.on_row()
    taken = traced.probe.poll()
    assert taken == len(traced.rows) == traced.books["observed"] - 1
    traced.on_row = None
    assert traced.probe.poll() == 1 and traced.books["observed"] == taken + 1


def test_rows_that_nobody_wants_are_counted(load: Load, listener: Listener) -> None:
    """By the shortest wait that is wanted, in this interval."""
    traced = load(exemplars=False)
    sender, reader = listener.connect()
    traced.probe.want_rows(traced.probe.side, 200 * MS)
    for wait_s in (0, 0.2, 0, 0, 0.2):
        deliver(sender, reader, wait_s)
    assert [row.wait_ns >= 200 * MS for row in traced.poll()] == [True, True]
    assert traced.books["rows_withheld"] == 3 and traced.waits().count == traced.books["observed"] == 5


def test_the_next_interval_wants_all_rows_again_or_not(load: Load, listener: Listener) -> None:
    traced = load(exemplars=False)
    sender, reader = listener.connect()
    traced.probe.want_rows(traced.probe.side, 10_000 * MS)
    deliver(sender, reader)
    traced.probe.harvest(all_rows=False)
    deliver(sender, reader)
    assert traced.poll() == [] and traced.books["rows_withheld"] == 2
    ended, _ = traced.probe.side, traced.probe.harvest()
    traced.probe.want_rows(ended, 10_000 * MS)  # of an interval that has ended meanwhile
    deliver(sender, reader)
    assert len(traced.poll()) == 1 and traced.books["rows_withheld"] == 2


def test_an_exemplar_says_that_it_is_a_row(load: Load, listener: Listener) -> None:
    """So that nobody counts it twice: it goes to user space anyway, and is not withheld."""
    traced = load()
    sender, reader = listener.connect()
    traced.probe.want_rows(traced.probe.side, 10_000 * MS)
    for _ in range(50):
        deliver(sender, reader)
    rows = len(traced.poll())
    exemplars = [event for _, event in traced.harvest().exemplars]
    assert 1 <= len(exemplars) <= rows and {event.kind for event in exemplars} == {KIND_ROW | KIND_EXEMPLAR}
    assert traced.books["observed"] == rows + traced.books["rows_withheld"] == 50


def test_pickups_of_many_segments(load: Load, listener: Listener) -> None:
    """The way of long queues, on which a read may be several pickups."""
    traced = load(exemplars=False)
    sender, reader = listener.connect()

    def read_late() -> None:
        for count in range(1, 31):
            sender.sendall(b"x" * 10)
            queued_for(reader, 10 * count)
        time.sleep(0.01)
        assert len(reader.recv(300)) == 300

    read_late()
    traced.probe.want_rows(traced.probe.side, 10 * MS)
    read_late()
    assert sum(row.segments for row in traced.poll()) == 60 and "rows_withheld" not in traced.books
    traced.probe.want_rows(traced.probe.side, 100_000 * MS)
    read_late()
    assert sum(row.segments for row in traced.poll()) == 60 and traced.books["rows_withheld"]
    assert traced.books["observed"] == 90
