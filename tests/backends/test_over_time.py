"""Series over time: whatever comes and goes, rate() and quantiles stay right in Prometheus."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import pathlib
import signal
import time
from collections.abc import Iterable, Iterator

import pytest

from backends.chain import HISTOGRAM, KINDS, ROUTES, SERVER, STRAIGHT, Chain, chains, start_agents
from backends.servers import Jaeger, TraceStore, free_port
from backends.traffic import SlowReader
from support.agent import Agent
from telemetry.told import DEFAULT_BOUNDS_S, eventually

FIRST, SECOND, THIRD = 6, 3, 5  # observations of the agent's three runs
BACK = 2  # ... of those of the first run by the process that came back meanwhile
WAIT_S = 0.03
ONCE_MS = "3600000"  # interval of the third run: it exports when it ends, at once more than the second run's total
BEFORE, AFTER, OUTAGE_S = (0.03, 0.03), (0.03,), 0.12
# What collector-config/README.md says of the routes. To see every restart is to see also the third run's, whose total
# has overtaken the second run's before Prometheus sees it.
COUNTS_THE_FIRST_POINT = {"scrape", "otlp", STRAIGHT}
SEES_EVERY_RESTART = {"otlp", STRAIGHT}


@pytest.fixture(scope="module")
def those(store: TraceStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Chain]]:
    """Every route, one story: the reader is replaced by a second process, then the agent restarts twice."""
    port = free_port()
    with chains(tmp_path_factory.mktemp("chains"), itertools.product(ROUTES, KINDS), store) as it:
        all_of_them = list(it.values())

        def arrived(count: int) -> None:
            eventually(lambda: all(one.count() == count for one in all_of_them))

        agents = start_agents(all_of_them, port)
        for number, before in ((FIRST - BACK, 0), (BACK, FIRST - BACK)):  # two processes, one after the other
            with SlowReader(b"reader", port) as reader:
                reader.wait(WAIT_S)  # arrives alone, so that Prometheus has a first point to count from
                arrived(before + 1)
                reader.wait(*[WAIT_S] * (number - 1))
                arrived(before + number)
        stop(agents)
        agents = start_agents(all_of_them, port)
        with SlowReader(b"reader", port) as reader:
            reader.wait(*[WAIT_S] * SECOND)
            arrived(SECOND)
        stop(agents)
        agents = start_agents(all_of_them, port, {"OTEL_METRIC_EXPORT_INTERVAL": ONCE_MS})
        with SlowReader(b"reader", port) as reader:
            reader.wait(*[WAIT_S] * THIRD)
        stop(agents)
        arrived(THIRD)
        yield it


def stop(agents: Iterable[Agent]) -> None:
    """Ends them, all at once; each exports a last time."""
    for agent in agents:
        agent.process.terminate()
    for agent in agents:
        assert agent.process.wait(60) == 0


def series(kind: str) -> str:
    """The series to count by."""
    return f"{HISTOGRAM}{'_count' if kind == 'explicit' else ''}{SERVER}"


def totals(it: Chain) -> list[int]:
    """The totals that Prometheus has, in their order, each as often as it was reached."""
    (one,) = it.prometheus.query(f"{series(it.kind)}[10m]")  # one series, whoever runs
    values = [value for _, value in one["values"]] if "values" in one else [of["count"] for _, of in one["histograms"]]
    return [int(value) for value, _ in itertools.groupby(values)]


def check_counted(it: Chain, expected: int) -> None:
    """increase() and rate() say so many, but for what they extrapolate.

    That is to the edges of the range, by 1.1 mean intervals between points at most at each of them.
    """
    increase, rate = (f"{function}({series(it.kind)}[5m])" for function in ("increase", "rate"))
    if it.kind == "exponential":
        increase, rate = f"histogram_count({increase})", f"histogram_count({rate})"
    samples = it.prometheus.value(f"count_over_time({series(it.kind)}[5m])")
    assert samples
    most = expected * (1 + 2.2 / (samples - 1))
    for counted in (it.prometheus.value(increase), it.prometheus.value(f"{rate} * 300")):
        assert counted is not None and expected - 0.001 <= counted <= most


def bucket_s(kind: str, value_s: float) -> tuple[float, float]:
    """The edges of the bucket that a value is in."""
    if kind == "explicit":
        index = bisect.bisect_left(DEFAULT_BOUNDS_S, value_s)
        return DEFAULT_BOUNDS_S[index - 1], DEFAULT_BOUNDS_S[index]
    upper_s = 2 ** (math.ceil(math.log2(value_s) * 4) / 4)
    return upper_s / 2**0.25, upper_s


def quantile_s(it: Chain, quantile: float) -> float:
    """histogram_quantile() of the last minutes."""
    if it.kind == "explicit":
        rates = f"sum by (le) (rate({HISTOGRAM}_bucket{SERVER}[5m]))"
    else:
        rates = f"sum (rate({HISTOGRAM}{SERVER}[5m]))"
    value = it.prometheus.value(f"histogram_quantile({quantile}, {rates})")
    assert value is not None
    return value


def longest_s(it: Chain) -> float:
    """The longest wait that was measured, or one in its bucket: each bucket that grew has an exemplar."""
    return max(float(one["value"]) for one in it.exemplars(time.time() - 300))


def test_a_restart_is_a_reset_of_one_counter(those: dict[tuple[str, str], Chain], route: str, kind: str) -> None:
    """And a process that comes back is none: its totals go on."""
    seen = totals(those[route, kind])
    assert seen[:2] == ([0, 1] if route in COUNTS_THE_FIRST_POINT else [1, seen[1]])
    end_of_first = seen.index(FIRST)
    assert seen[: end_of_first + 1] == sorted(seen[: end_of_first + 1])
    after = seen[end_of_first + 1 :]
    assert after[-1] == THIRD and SECOND in after
    assert (after[0] == 0) == (route in SEES_EVERY_RESTART)
    (resets,) = those[route, kind].prometheus.query(f"resets({series(kind)}[5m])")
    assert float(resets["value"][1]) == (2 if route in SEES_EVERY_RESTART else 1)


def test_increase_and_rate_count_what_was_observed(those: dict[tuple[str, str], Chain], route: str, kind: str) -> None:
    """But for the first point, and for what the second run had counted when the third overtook it unseen."""
    unseen = (route not in COUNTS_THE_FIRST_POINT) + SECOND * (route not in SEES_EVERY_RESTART)
    check_counted(those[route, kind], FIRST + SECOND + THIRD - unseen)


def test_the_quantile_is_that_of_the_waits(those: dict[tuple[str, str], Chain], route: str, kind: str) -> None:
    """Of waits that were all at least WAIT_S."""
    it = those[route, kind]
    quantiles = [quantile_s(it, quantile) for quantile in (0.01, 0.5, 0.99)]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] >= bucket_s(kind, WAIT_S)[0]
    assert quantiles[2] <= bucket_s(kind, longest_s(it))[1]


def test_a_collector_that_restarts_with_a_persistent_queue_loses_nothing(tmp_path: pathlib.Path) -> None:
    """Back ends away, the Collector ended or killed meanwhile: the outage's exemplars and spans arrive afterwards."""
    port = free_port()
    ends = {"explicit": signal.SIGTERM, "exponential": signal.SIGKILL}
    with contextlib.ExitStack() as stack:
        jaeger = stack.enter_context(Jaeger(tmp_path / "jaeger"))
        spans = ("jaeger.yaml", "persistent-queue.yaml")
        those = [Chain(stack, tmp_path / kind, "otlp", kind, jaeger, *spans) for kind in ends]
        start_agents(those, port)
        reader = stack.enter_context(SlowReader(b"reader", port))
        since_unix_s = time.time()
        reader.wait(*BEFORE)
        eventually(lambda: all(it.count() == len(BEFORE) for it in those))
        for it in those:
            it.prometheus.stop()
        jaeger.stop(signal.SIGKILL)
        reader.wait(OUTAGE_S)
        outage_unix_s = time.time()
        time.sleep(2.5)  # two more intervals: the wait's has reached the Collectors
        for it in those:
            assert it.collector
            it.collector.stop(ends[it.kind])
            assert (tmp_path / it.kind / "queue").is_dir()
            it.collector.start()
        for server in (jaeger, *(it.prometheus for it in those)):
            server.start()
        for server in (jaeger, *(it.prometheus for it in those), *(it.collector for it in those if it.collector)):
            server.wait_until_ready()
        reader.wait(*AFTER)
        sent = len(BEFORE) + 1 + len(AFTER)
        for it in those:
            check_the_outage(it, jaeger, sent, since_unix_s, outage_unix_s)


def check_the_outage(it: Chain, jaeger: Jaeger, sent: int, since_unix_s: float, outage_unix_s: float) -> None:
    """Its wait has a span and counts."""
    eventually(lambda: it.count() == sent)
    eventually(lambda: [one for one in it.exemplars(since_unix_s) if float(one["value"]) >= OUTAGE_S])
    exemplar = max(it.exemplars(since_unix_s), key=lambda one: float(one["value"]))
    assert float(exemplar["timestamp"]) <= outage_unix_s
    eventually(lambda: jaeger.span(exemplar["labels"]["trace_id"]))
    assert it.prometheus.value(f"sum(resets({series(it.kind)}[5m]))") == 0
    check_counted(it, sent)
    assert quantile_s(it, 0.01) >= bucket_s(it.kind, min(BEFORE))[0]
    assert bucket_s(it.kind, OUTAGE_S)[0] <= quantile_s(it, 0.99) <= bucket_s(it.kind, float(exemplar["value"]))[1]
