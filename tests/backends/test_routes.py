"""Every route into Prometheus: each slow bucket has an exemplar there, whose trace and span are in the trace store."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from backends import dashboard
from backends.chain import KINDS, ROUTES, Chain, chains, start_agents
from backends.servers import TraceStore, free_port
from backends.traffic import LENGTH, SlowReader
from telemetry.told import eventually

# Who waits how long, over which protocol. The last two names are the longest that a comm of 15 bytes can become: no
# UTF-8, and what PromQL and JSON have to quote. All read the same port, so each wait is in a bucket of its own.
SLOW_S = {
    (b"slow-reader", "127.0.0.1"): (0.03, 0.06, 0.12, 0.25),
    (b"\xff" * 15, "::1"): (0.6,),
    (b'"\\\n{}\t,=\x01 \x7f\xc3\xa9\xe2\x82', "127.0.0.1"): (1.2,),
}
COMMS = {comm for comm, _ in SLOW_S}
SENT = sum(len(waits_s) + 1 for waits_s in SLOW_S.values())


@dataclass
class Told:
    """What was sent, and where it must have arrived."""

    chains: dict[tuple[str, str], Chain]
    readers: dict[int, SlowReader]
    since_unix_s: float


@pytest.fixture(scope="module")
def told(store: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """All chains at once, so that they see the same traffic: that of one port."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        those = stack.enter_context(chains(tmp_path_factory.mktemp("chains"), itertools.product(ROUTES, KINDS), store))
        start_agents(list(those.values()), port)
        since_unix_s = time.time()
        readers = {}
        for (comm, host), waits_s in SLOW_S.items():
            reader = stack.enter_context(SlowReader(comm, port, host))
            reader.wait(0, *waits_s)
            readers[reader.pid] = reader
        yield Told(those, readers, since_unix_s)


def test_every_slow_bucket_leads_to_its_span(told: Told, store: TraceStore, route: str, kind: str) -> None:
    it = told.chains[route, kind]
    exemplars = exemplars_of_all_buckets(told, it)
    longest_s: dict[bytes, float] = {}
    for exemplar in exemplars:
        comm, length_s = check_span(store, told.readers, exemplar)
        longest_s[comm] = max(length_s, longest_s.get(comm, 0.0))
    for (comm, host), waits_s in SLOW_S.items():
        if all_kept(it) or ":" not in host:
            assert longest_s[comm] >= waits_s[-1]


def all_kept(it: Chain) -> bool:
    """Not where Prometheus scrapes several exponential histograms: the exemplars of all but the first may be missing.

    It reads a histogram's from the position where it stopped in the one before (seen in 3.16: model/textparse's
    ProtobufParser.Next() leaves exemplarPos as it is between two native histograms of a family).
    """
    return (it.route, it.kind) != ("scrape", "exponential")


def exemplars_of_all_buckets(told: Told, it: Chain) -> list[dict[str, Any]]:
    """Waits until all has arrived and every bucket has an exemplar; returns them."""
    eventually(lambda: sum(it.buckets().values()) == SENT)
    buckets = it.buckets() if all_kept(it) else it.buckets('{tcppktlat_role="server", network_type="ipv4"}')

    def without_one() -> list[tuple[float, float]]:
        values_s = [float(one["value"]) for one in it.exemplars(told.since_unix_s)]
        return [edges_s for edges_s in buckets if not any(edges_s[0] < one <= edges_s[1] for one in values_s)]

    eventually(lambda: not without_one())
    return it.exemplars(told.since_unix_s)


def check_span(store: TraceStore, readers: dict[int, SlowReader], exemplar: dict[str, Any]) -> tuple[bytes, float]:
    """The exemplar's trace is in the store, and its span says who let it wait, where, and for how long."""
    labels = exemplar["labels"]
    eventually(lambda: store.span(labels["trace_id"]))
    span = store.span(labels["trace_id"])
    assert span and span["name"] == "tcp receive"
    assert span["spanId"] == labels["span_id"]
    said = span["attributes"]
    reader = readers[said["process.pid"]]
    assert said["thread.id"] == reader.pid
    assert said["thread.name"] == reader.comm.decode(errors="replace")
    assert said["network.type"] == ("ipv6" if ":" in reader.host else "ipv4")
    assert (said["network.local.address"], said["network.local.port"]) == (reader.host, reader.port)
    assert (said["network.peer.address"], said["network.peer.port"]) == (reader.host, reader.sender_port)
    assert (said["tcppktlat.segments"], said["tcppktlat.bytes"]) == (1, LENGTH)
    length_ns = int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])
    assert length_ns == round(float(exemplar["value"]) * 1e9)
    return reader.comm, length_ns / 1e9


def test_pid_thread_and_name_are_on_the_exemplar_where_a_route_keeps_any(told: Told, route: str, kind: str) -> None:
    it = told.chains[route, kind]
    seen = set()
    for exemplar in exemplars_of_all_buckets(told, it):
        kept = {name.replace(".", "_"): value for name, value in exemplar["labels"].items()}
        if route == "scrape":  # the Collector's Prometheus exporter writes ids only
            assert set(kept) == {"trace_id", "span_id"}
            continue
        reader = told.readers[int(kept["process_pid"])]
        assert kept["thread_id"] == str(reader.pid)
        assert kept["thread_name"] == reader.comm.decode(errors="replace")
        seen.add(reader.comm)
    assert route == "scrape" or seen == COMMS


def test_grafana_links_by_a_label_that_the_exemplars_have(told: Told, route: str, kind: str) -> None:
    """And to data sources that exist."""
    (prometheus,) = (one for one in dashboard.DATA_SOURCES if one["type"] == "prometheus")
    stores = {one["uid"] for one in dashboard.DATA_SOURCES if one["type"] in ("tempo", "jaeger")}
    it = told.chains[route, kind]
    eventually(lambda: it.exemplars(told.since_unix_s))
    for destination in prometheus["jsonData"]["exemplarTraceIdDestinations"]:
        assert destination["datasourceUid"] in stores
        ids = [one["labels"][destination["name"]] for one in it.exemplars(told.since_unix_s)]
        assert all(re.fullmatch("[0-9a-f]{32}", one) for one in ids)


def test_every_query_of_the_dashboard_returns_data(told: Told, route: str, kind: str) -> None:
    """Numbers, and exemplars where it asks for them; its variables have values."""
    it = told.chains[route, kind]
    for title, promql, wants_exemplars in dashboard.queries():
        eventually(lambda promql=promql: it.prometheus.query(promql), 30, (title, promql))  # type: ignore[misc]
        for one in it.prometheus.query(promql):
            assert "histogram" in one or not math.isnan(float(one["value"][1])), (title, one)
        if wants_exemplars:
            eventually(lambda promql=promql: it.prometheus.exemplars(promql, told.since_unix_s), 30, (title, promql))  # type: ignore[misc]
    for selector, label in dashboard.label_values():
        assert it.prometheus.label_values(selector, label), (selector, label)


def test_the_dashboards_quantile_is_the_wait(told: Told, route: str, kind: str) -> None:
    """The longest wait of all, as p99 of one process on one port: in the bucket that has it."""
    it = told.chains[route, kind]
    eventually(lambda: sum(it.buckets().values()) == SENT)
    (promql,) = (one for title, one, _ in dashboard.queries() if title.startswith("p99"))
    longest_s = max(wait_s for waits_s in SLOW_S.values() for wait_s in waits_s)

    def p99_s() -> float:
        found = [one for one in it.prometheus.query(promql) if one["metric"]["tcppktlat_role"] == "server"]
        return float(found[0]["value"][1]) if found else 0.0

    eventually(lambda: p99_s() >= longest_s / 2)
    assert p99_s() <= max(upper_s for _, upper_s in it.buckets())
