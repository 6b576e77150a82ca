"""Chains: an agent, a Collector with the files of collector-config/, and Prometheus and Jaeger behind it."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from backends.servers import Collector, Prometheus, TraceStore
from support.agent import Agent
from telemetry.told import eventually

AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
KINDS = {"explicit": "explicit_bucket_histogram", "exponential": "base2_exponential_bucket_histogram"}
STRAIGHT = "straight"
ROUTES = ("scrape", "remote-write", "otlp", STRAIGHT)  # files of collector-config/prometheus/, and without a Collector
HISTOGRAM = "tcppktlat_receive_queue_duration_seconds"
SERVER = '{tcppktlat_role="server"}'


class Chain:
    """All that stands behind an agent, and the agent itself once start_agent() was called."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        folder: pathlib.Path,
        route: str,
        kind: str,
        store: TraceStore,
        *spans: str,
    ) -> None:
        """`stack` ends it. `route` is one of ROUTES, `kind` one of KINDS, `spans` files of spans."""
        self.route, self.kind = route, kind
        self._stack, self._folder, self._runs = stack, folder, 0
        self.prometheus = Prometheus(folder, scrapes=route == "scrape")
        self._variables = {AGGREGATION: KINDS[kind], "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
        self.collector: Collector | None = None
        if route == STRAIGHT:
            self._variables |= {
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{self.prometheus.url}/api/v1/otlp/v1/metrics",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{store.otlp}",
            }
        else:
            environment = {
                "TCPPKTLAT_SCRAPE": self.prometheus.scrape,
                "PROMETHEUS_URL": self.prometheus.url,
                "PROMETHEUS_WRITE_URL": f"{self.prometheus.url}/api/v1/write",
                "JAEGER_OTLP": store.otlp,
                "TEMPO_OTLP": store.otlp,
                "TCPPKTLAT_QUEUE": str(folder / "queue"),
            }
            files = (f"prometheus/{route}.yaml", *spans)
            self.collector = stack.enter_context(Collector(folder, *files, environment=environment))
            self._variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://{self.collector.otlp}"
        stack.enter_context(self.prometheus)

    def start_agent(self, port: int, variables: Mapping[str, str] | None = None) -> Agent:
        """Starts an agent that sees one port; it may not yet be attached. `variables` are set beside the chain's."""
        self._runs += 1
        folder = self._folder / f"agent-{self._runs}"
        folder.mkdir()
        return self._stack.enter_context(
            Agent(folder, ["-v", "-l", str(port)], {**self._variables, **(variables or {})})
        )

    def count(self) -> float:
        """Observations of the servers' histogram, as Prometheus has them now."""
        if self.kind == "explicit":
            return self.prometheus.value(f"sum({HISTOGRAM}_count{SERVER})") or 0.0
        return self.prometheus.value(f"sum(histogram_count({HISTOGRAM}{SERVER}))") or 0.0

    def buckets(self, series: str = SERVER) -> dict[tuple[float, float], float]:
        """Counts of the servers' histogram by (lower, upper) bound in seconds; empty while it is not there."""
        if self.kind == "exponential":
            result = self.prometheus.query(f"sum({HISTOGRAM}{series})")
            return {
                (float(lower), float(upper)): float(count)
                for one in result
                for _, lower, upper, count in one["histogram"][1].get("buckets", [])
            }
        result = self.prometheus.query(f"sum by (le) ({HISTOGRAM}_bucket{series})")
        cumulative = sorted((float(one["metric"]["le"]), float(one["value"][1])) for one in result)
        found, lower_s, before = {}, 0.0, 0.0
        for upper_s, count in cumulative:
            if count > before:
                found[lower_s, upper_s] = count - before
            lower_s, before = upper_s, count
        return found

    def exemplars(self, since_unix_s: float) -> list[dict[str, Any]]:
        """The histogram's exemplars from a time until now."""
        suffix = "_bucket" if self.kind == "explicit" else ""
        return self.prometheus.exemplars(f"{HISTOGRAM}{suffix}{SERVER}", since_unix_s)


@contextlib.contextmanager
def chains(
    root: pathlib.Path, which: Iterable[tuple[str, str]], store: TraceStore
) -> Iterator[dict[tuple[str, str], Chain]]:
    """A chain for each pair of a route and a kind of histogram, its spans by each of the store's files in turn.

    No agent runs yet.
    """
    spans = itertools.cycle(store.files)
    with contextlib.ExitStack() as stack:
        yield {
            (route, kind): Chain(stack, root / f"{route}-{kind}", route, kind, store, next(spans))
            for route, kind in which
        }


def start_agents(those: Sequence[Chain], port: int, variables: Mapping[str, str] | None = None) -> list[Agent]:
    """Starts an agent in each, all at once, and returns when they count, and when who shall scrape does."""
    agents = [one.start_agent(port, variables) for one in those]
    for agent in agents:
        agent.wait_for_stderr("otel-tcppktlat: attached")
    for one in those:  # a Prometheus finds its targets within 5 s; exemplars that were shown before would be missing
        eventually(lambda one=one: one.route != "scrape" or one.prometheus.value("up") == 1)  # type: ignore[misc]
    return agents
