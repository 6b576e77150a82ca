"""The table takes rows from several threads, and prints each of them whole and once."""

from __future__ import annotations

import os
import socket
import threading

from otel_tcppktlat.probe.layout import Event
from otel_tcppktlat.table import Table

ROWS = 2000


def test_rows_from_two_threads_while_a_third_flushes() -> None:
    reading, writing = os.pipe()
    table, done = Table(writing), threading.Event()
    printed = bytearray()

    def read() -> None:
        while data := os.read(reading, 65536):
            printed.extend(data)

    def add(tgid: int) -> None:
        for number in range(ROWS):
            table.row(Event(tgid=tgid, wait_ns=number * 10**7, family=socket.AF_INET, comm=b"reader"))

    def flush() -> None:
        while not done.is_set():
            table.flush()

    reader, flusher = threading.Thread(target=read), threading.Thread(target=flush)
    adders = [threading.Thread(target=add, args=(tgid,)) for tgid in (1, 2)]
    for thread in (reader, flusher, *adders):
        thread.start()
    for thread in adders:
        thread.join()
    done.set()
    flusher.join()
    table.flush(60)
    os.close(writing)
    reader.join()
    os.close(reading)
    rows = [line.split() for line in printed.decode().splitlines()]
    for tgid in ("1", "2"):
        assert [row[-1] for row in rows if row[0] == tgid] == [f"{number * 10:.2f}" for number in range(ROWS)]
    assert len(rows) == 2 * ROWS
