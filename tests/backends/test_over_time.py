"""Series over time: whatever comes and goes, rate() and quantiles stay right in Prometheus."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import time
from collections.abc import Iterator

import pytest

from backends.chain import HISTOGRAM, SERVER, STRAIGHT, Chain, chains, start_agents
from backends.servers import Jaeger, TraceStore, free_port
from backends.traffic import SlowReader
from telemetry.told import eventually

STORIES = [  # every route, each kind of histogram on two of them
    ("scrape", "exponential"),
    ("remote-write", "explicit"),
    ("otlp", "exponential"),
    (STRAIGHT, "explicit"),
]
FIRST, SECOND = 6, 3  # observations of the agent's first and second run
BACK = 2  # ... and of the process that came back meanwhile
WAIT_S = 0.03
BEFORE, AFTER, OUTAGE_S = (0.03, 0.03), (0.03,), 0.12


@pytest.fixture(scope="module")
def those(store: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Chain]]:
    """Every route, through the same story: the reader is replaced by a second process, then the agent restarts."""
    port = free_port()
    with chains(tmp_path_factory.mktemp("chains"), STORIES, store) as it:
        agents = start_agents(list(it.values()), port)
        sent = 0
        for number in (FIRST - BACK, BACK):  # two processes, one after the other
            with SlowReader(b"reader", port) as reader:
                reader.wait(WAIT_S)  # arrives alone, so that Prometheus has a first point to count from
                sent += 1
                eventually(lambda sent=sent: all(one.count() == sent for one in it.values()))  # type: ignore[misc]
                reader.wait(*[WAIT_S] * (number - 1))
                sent += number - 1
                eventually(lambda sent=sent: all(one.count() == sent for one in it.values()))  # type: ignore[misc]
        for agent in agents:
            assert agent.stop() == 0
        start_agents(list(it.values()), port)
        with SlowReader(b"reader", port) as reader:
            reader.wait(*[WAIT_S] * SECOND)
            eventually(lambda: all(one.count() == SECOND for one in it.values()))
        yield it


def series(kind: str) -> str:
    """The series to count by."""
    return f"{HISTOGRAM}{'_count' if kind == 'explicit' else ''}{SERVER}"


@pytest.mark.parametrize(("route", "kind"), STORIES)
def test_an_agent_that_restarts_is_one_counter_that_was_reset(
    those: dict[tuple[str, str], Chain], route: str, kind: str
) -> None:
    """And a process that comes back is no reset: its totals go on."""
    it = those[route, kind]
    (one,) = it.prometheus.query(f"resets({series(kind)}[5m])")  # one series, whoever runs
    assert float(one["value"][1]) == 1


@pytest.mark.parametrize(("route", "kind"), STORIES)
def test_increase_counts_what_was_observed(those: dict[tuple[str, str], Chain], route: str, kind: str) -> None:
    it = those[route, kind]
    increase = f"increase({series(kind)}[5m])"
    counted = it.prometheus.value(increase if kind == "explicit" else f"histogram_count({increase})")
    # Over OTLP, Prometheus learns when counting began, so that the first point counts, too.
    least = FIRST + SECOND if route in ("otlp", STRAIGHT) else FIRST + SECOND - 1
    assert counted is not None
    # increase() extrapolates to the edges of the range: by 1.1 mean intervals between points at most at each of them.
    samples = it.prometheus.value(f"count_over_time({series(kind)}[5m])")
    assert samples and least - 0.001 <= counted <= (FIRST + SECOND) * (1 + 2.2 / (samples - 1))


@pytest.mark.parametrize(("route", "kind"), STORIES)
def test_the_quantile_is_that_of_the_waits(those: dict[tuple[str, str], Chain], route: str, kind: str) -> None:
    """Of waits that were all at least WAIT_S."""
    it = those[route, kind]
    if kind == "explicit":
        rates = f"sum by (le) (rate({HISTOGRAM}_bucket{SERVER}[5m]))"
        edge_s = 0.02  # of the bucket that WAIT_S is in
    else:
        rates = f"sum (rate({HISTOGRAM}{SERVER}[5m]))"
        edge_s = WAIT_S / 2**0.25
    quantiles = [it.prometheus.value(f"histogram_quantile({quantile}, {rates})") for quantile in (0.01, 0.5, 0.99)]
    assert quantiles == sorted(quantiles, key=lambda value: value or 0)
    assert quantiles[0] is not None and quantiles[0] >= edge_s
    highest_s = max(upper_s for _, upper_s in it.buckets())
    assert quantiles[2] is not None and quantiles[2] <= max(highest_s, 0.5)


def test_a_collector_that_restarts_with_a_persistent_queue_loses_nothing(tmp_path: pathlib.Path) -> None:
    """Back ends away, the Collector restarted meanwhile: the outage's exemplars and spans arrive afterwards."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        jaeger = stack.enter_context(Jaeger(tmp_path / "jaeger"))
        it = Chain(stack, tmp_path / "chain", "otlp", "explicit", jaeger, "jaeger.yaml", "persistent-queue.yaml")
        start_agents([it], port)
        reader = stack.enter_context(SlowReader(b"reader", port))
        since_unix_s = time.time()
        reader.wait(*BEFORE)
        eventually(lambda: it.count() == len(BEFORE))
        it.prometheus.stop()
        jaeger.stop(signal.SIGKILL)
        reader.wait(OUTAGE_S)
        outage_unix_s = time.time()
        assert it.collector
        time.sleep(2.5)  # two more intervals: the wait's has reached the Collector
        it.collector.stop()
        assert (tmp_path / "chain/queue").is_dir()
        it.collector.start()
        it.collector.wait_until_ready()
        for server in (it.prometheus, jaeger):
            server.start()
            server.wait_until_ready()
        reader.wait(*AFTER)
        eventually(lambda: it.count() == len(BEFORE) + 1 + len(AFTER))
        eventually(lambda: [one for one in it.exemplars(since_unix_s) if float(one["value"]) >= OUTAGE_S])
        exemplar = max(it.exemplars(since_unix_s), key=lambda one: float(one["value"]))
        assert float(exemplar["timestamp"]) <= outage_unix_s
        eventually(lambda: jaeger.span(exemplar["labels"]["trace_id"]))
        assert it.prometheus.value(f"sum(resets({HISTOGRAM}_count{SERVER}[5m]))") == 0
