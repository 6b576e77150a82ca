"""What an exemplar carries survives every route that keeps any attribute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from otel_tcppktlat.events import exemplar_attributes
from otel_tcppktlat.probe.layout import COMM_BYTES, Event

MOST_RUNES = (
    128  # of all names and values, in Prometheus (model/exemplar, ExemplarMaxLabelSetLength) and OpenMetrics 1.0
)
IDS = {"trace_id": "0" * 32, "span_id": "0" * 16}
IDS_LIMIT = 1 << 22  # the kernel's PID_MAX_LIMIT

ids = st.integers(1, IDS_LIMIT)
comms = st.binary(max_size=COMM_BYTES - 1).map(lambda name: name.partition(b"\0")[0])


@given(ids, ids, comms | st.text(max_size=15).map(lambda text: text.encode(errors="ignore")[:15].partition(b"\0")[0]))
def test_pid_thread_and_any_name_fit_beside_the_ids(pid: int, tid: int, comm: bytes) -> None:
    attributes = exemplar_attributes(Event(tgid=pid, tid=tid, comm=comm), ())
    assert (attributes["process.pid"], attributes["thread.id"]) == (pid, tid)
    assert attributes["thread.name"] == comm.decode(errors="replace")
    labels = {**IDS, **attributes}
    # Python counts code points, as Go counts runes.
    assert sum(len(name) + len(str(value)) for name, value in labels.items()) <= MOST_RUNES
