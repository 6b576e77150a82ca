"""What agent and process share: whatever is read is whole, and what is missing is counted."""

from __future__ import annotations

import os

import pytest

from otel_tcppktlat.buckets import explicit_buckets
from otel_tcppktlat.probe.layout import Event, Identity, ProcessKey, SeriesKey
from otel_tcppktlat.probe.probe import Series
from otel_tcppktlat.serving.area import ROWS, SLOTS, AreaReader, AreaWriter, Row

BUCKETS = explicit_buckets((0.001, 0.01))


def area() -> tuple[AreaWriter, AreaReader]:
    writer = AreaWriter(BUCKETS)
    return writer, AreaReader(writer.open_for_reading(), BUCKETS)


def row(port: int, *counts: int) -> Row:
    key = SeriesKey(ProcessKey(1, 2, 3), port, 2, 0)
    return Row(Series(key, Identity(0, b"comm", b"executable")), 1000 * sum(counts), counts)


def event(wait_ns: int) -> Event:
    return Event(wait_ns=wait_ns, comm=b"somebody")


def test_totals_as_they_were_written() -> None:
    writer, reader = area()
    assert reader.totals() == ([], 0)
    for untold, rows in ((0, [row(1, 1, 2, 3)]), (7, [row(1, 1, 2, 4), row(2, 0, 0, 1)]), (8, [])):
        writer.publish(rows, untold)
        read = reader.totals()
        assert read and read[1] == untold
        assert [(one.sum_ns, [*one.counts]) for one in read[0]] == [(one.sum_ns, [*one.counts]) for one in rows]
        for got, wanted in zip(read[0], rows, strict=True):
            assert got.series and wanted.series
            assert bytes(got.series.key) == bytes(wanted.series.key)
            assert bytes(got.series.identity) == bytes(wanted.series.identity)


def test_more_series_than_there_is_room_for() -> None:
    """The rest is one row without a name: nothing is lost."""
    writer, reader = area()
    writer.publish([row(port, 1, 0, port) for port in range(1, ROWS + 11)], 0)
    read = reader.totals()
    assert read and len(read[0]) == ROWS + 1
    assert [one.series is None for one in read[0]] == [False] * ROWS + [True]
    assert [*read[0][-1].counts] == [10, 0, sum(range(ROWS + 1, ROWS + 11))]


@pytest.mark.parametrize("at", [0, 4, 8, 16, 60, 120, 170])
def test_totals_that_are_half_written_are_not_read(at: int) -> None:
    """Whichever byte is another one yet."""
    writer, reader = area()
    writer.publish([row(1, 1, 2, 3)], 5)
    memory = writer._memory
    memory[at] ^= 1
    assert reader.totals() is None
    memory[at] ^= 1
    assert reader.totals() is not None


def test_events_come_once_and_in_order() -> None:
    writer, reader = area()
    assert reader.events() == ([], 0)
    for first, last in ((1, 5), (5, 6), (6, SLOTS + 6)):
        for wait_ns in range(first, last):
            writer.add(event(wait_ns))
        found, lost = reader.events()
        assert ([one.wait_ns for one in found], lost) == ([*range(first, last)], 0)
        assert {one.comm for one in found} == {b"somebody"}
        assert reader.events() == ([], 0)


def test_events_that_were_written_over_are_counted() -> None:
    writer, reader = area()
    for wait_ns in range(1, 2 * SLOTS + 11):
        writer.add(event(wait_ns))
    found, lost = reader.events()
    assert [one.wait_ns for one in found] == [*range(SLOTS + 11, 2 * SLOTS + 11)]
    assert lost == SLOTS + 10


def test_an_event_that_is_half_written_comes_later() -> None:
    writer, reader = area()
    writer.add(event(1))
    writer.add(event(2))
    at = writer._layout.slot(2) + 40
    writer._memory[at] ^= 1
    assert [one.wait_ns for one in reader.events()[0]] == [1]
    writer._memory[at] ^= 1
    assert [one.wait_ns for one in reader.events()[0]] == [2]


def test_what_is_no_area() -> None:
    with pytest.raises(ValueError), open(os.devnull) as other:
        AreaReader(os.memfd_create("small"), BUCKETS)
    assert other.closed
