"""Every route into Prometheus: each slow bucket has an exemplar there, whose trace and span are in Jaeger."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from backends.servers import Collector, Jaeger, Prometheus, free_port
from backends.traffic import LENGTH, SlowReader
from support.agent import Agent
from telemetry.told import eventually

AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
KINDS = {"explicit": "explicit_bucket_histogram", "exponential": "base2_exponential_bucket_histogram"}
ROUTES = ("scrape", "remote-write", "otlp", "straight")
SERVER = 'tcppktlat_role="server"'
NAME = "tcppktlat_receive_queue_duration_seconds"
# Who waits how long. The last two names are the longest that a comm of 15 bytes can become: no UTF-8, and what PromQL
# and JSON have to quote. All read the same port, so each wait is in a bucket of its own.
SLOW_S = {
    b"slow-reader": (0.03, 0.06, 0.12, 0.25),
    b"\xff" * 15: (0.6,),
    b'"\\\n{}\t,=\x01 \x7f\xc3\xa9\xe2\x82': (1.2,),
}
SENT = sum(len(waits_s) + 1 for waits_s in SLOW_S.values())


@dataclass
class Chain:
    """An agent and all that stands behind it."""

    route: str
    kind: str
    agent: Agent
    prometheus: Prometheus

    def buckets(self) -> dict[tuple[float, float], float]:
        """Counts of the histogram by (lower, upper) bound in seconds; empty while it is not there."""
        if self.kind == "exponential":
            result = self.prometheus.query(f"{NAME}{{{SERVER}}}")
            return {
                (float(lower), float(upper)): float(count)
                for _, lower, upper, count in (result[0]["histogram"][1].get("buckets", []) if result else [])
            }
        result = self.prometheus.query(f"{NAME}_bucket{{{SERVER}}}")
        cumulative = sorted((float(one["metric"]["le"]), float(one["value"][1])) for one in result)
        found, lower_s, before = {}, 0.0, 0.0
        for upper_s, count in cumulative:
            if count > before:
                found[lower_s, upper_s] = count - before
            lower_s, before = upper_s, count
        return found

    def exemplars(self, since_unix_s: float) -> list[dict[str, Any]]:
        """The histogram's exemplars."""
        suffix = "_bucket" if self.kind == "explicit" else ""
        return self.prometheus.exemplars(f"{NAME}{suffix}{{{SERVER}}}", since_unix_s)


@contextlib.contextmanager
def chain(folder: pathlib.Path, route: str, kind: str, jaeger: Jaeger, port: int) -> Iterator[Chain]:
    """An agent, a Collector with the files of collector-config/, a Prometheus; started, the agent not yet attached."""
    variables = {AGGREGATION: KINDS[kind], "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
    with contextlib.ExitStack() as stack:
        if route == "straight":
            prometheus = Prometheus(folder)
            variables |= {
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{prometheus.url}/api/v1/otlp/v1/metrics",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{jaeger.otlp}",
            }
        else:
            prometheus = Prometheus(folder, scrapes=route == "scrape")
            environment = {"TCPPKTLAT_SCRAPE": prometheus.scrape, "PROMETHEUS_URL": prometheus.url}
            environment["JAEGER_OTLP"] = jaeger.otlp
            collector = Collector(folder, f"prometheus/{route}.yaml", "jaeger.yaml", environment=environment)
            variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{collector.otlp}"
            stack.enter_context(collector)
        stack.enter_context(prometheus)
        yield Chain(route, kind, stack.enter_context(Agent(folder, ["-v", "-l", str(port)], variables)), prometheus)


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as it:
        yield it


@dataclass
class Told:
    """What was sent, and where it must have arrived."""

    chains: dict[tuple[str, str], Chain]
    readers: dict[int, SlowReader]
    since_unix_s: float


@pytest.fixture(scope="module")
def told(jaeger: Jaeger, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """All chains at once, so that they see the same traffic: that of one port."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        chains = {}
        for route in ROUTES:
            for kind in KINDS:
                folder = tmp_path_factory.mktemp(f"{route}-{kind}")
                chains[route, kind] = stack.enter_context(chain(folder, route, kind, jaeger, port))
        for each in chains.values():
            each.agent.wait_for_stderr("otel-tcppktlat: attached")
        since_unix_s = time.time()
        readers = {}
        for comm, waits_s in SLOW_S.items():
            reader = stack.enter_context(SlowReader(comm, port))
            reader.wait(0, *waits_s)
            readers[reader.pid] = reader
        yield Told(chains, readers, since_unix_s)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_slow_bucket_leads_to_its_span(told: Told, jaeger: Jaeger, route: str, kind: str) -> None:
    it = told.chains[route, kind]
    eventually(lambda: sum(it.buckets().values()) == SENT)
    buckets = it.buckets()
    eventually(lambda: len(it.exemplars(told.since_unix_s)) >= len(buckets))
    exemplars = it.exemplars(told.since_unix_s)
    longest_s: dict[bytes, float] = {}
    for exemplar in exemplars:
        comm, length_s = check_span(jaeger, told.readers, exemplar)
        longest_s[comm] = max(length_s, longest_s.get(comm, 0.0))
    for lower_s, upper_s in buckets:
        assert any(lower_s < float(exemplar["value"]) <= upper_s for exemplar in exemplars), (lower_s, upper_s)
    for comm, waits_s in SLOW_S.items():
        assert longest_s[comm] >= waits_s[-1]


def check_span(jaeger: Jaeger, readers: dict[int, SlowReader], exemplar: dict[str, Any]) -> tuple[bytes, float]:
    """The exemplar's trace is in Jaeger, and its span says who let it wait, where, and for how long."""
    labels = exemplar["labels"]
    eventually(lambda: jaeger.span(labels["trace_id"]))
    span = jaeger.span(labels["trace_id"])
    assert span and span["name"] == "tcp receive"
    assert span["spanId"] == labels["span_id"]
    said = span["attributes"]
    reader = readers[said["process.pid"]]
    assert said["thread.id"] == reader.pid
    assert said["thread.name"] == reader.comm.decode(errors="replace")
    assert (said["network.local.address"], said["network.local.port"]) == ("127.0.0.1", reader.port)
    assert (said["network.peer.address"], said["network.peer.port"]) == ("127.0.0.1", reader.sender_port)
    assert (said["tcppktlat.segments"], said["tcppktlat.bytes"]) == (1, LENGTH)
    length_ns = int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])
    assert length_ns == round(float(exemplar["value"]) * 1e9)
    return reader.comm, length_ns / 1e9


def test_pid_thread_and_name_are_on_the_exemplar_where_a_route_keeps_any(told: Told, route: str, kind: str) -> None:
    it = told.chains[route, kind]
    eventually(lambda: sum(it.buckets().values()) == SENT)
    eventually(lambda: len(it.exemplars(told.since_unix_s)) >= len(it.buckets()))
    seen = set()
    for exemplar in it.exemplars(told.since_unix_s):
        kept = {name.replace(".", "_"): value for name, value in exemplar["labels"].items()}
        if route == "scrape":  # the Collector's Prometheus exporter writes ids only
            assert set(kept) == {"trace_id", "span_id"}
            continue
        reader = told.readers[int(kept["process_pid"])]
        assert kept["thread_id"] == str(reader.pid)
        assert kept["thread_name"] == reader.comm.decode(errors="replace")
        seen.add(reader.comm)
    assert route == "scrape" or seen == set(SLOW_S)
