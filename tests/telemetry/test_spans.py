"""How many spans there are, and what an exemplar carries that has none."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from otel_tcppktlat.demo.receiver import ExemplarRecord, Receiver
from telemetry import told
from telemetry.told import DURATION, SUPPRESSED, Scene, deliver


def pick_up(scene: Scene, count: int, wait_s: float = 0.0) -> None:
    """So many pickups on a connection of their own."""
    sender, reader = scene.listener.connect()
    for _ in range(count):
        deliver(sender, reader, wait_s)


def suppressed(receiver: Receiver) -> int:
    return told.number(receiver, SUPPRESSED)


def all_exemplars(receiver: Receiver) -> list[ExemplarRecord]:
    return [exemplar for _, exemplar in told.exemplars(receiver)]


@contextmanager
def scene_of(folder: pathlib.Path, *arguments: str, interval_ms: str = "200", **environment: str) -> Iterator[Scene]:
    """A scene, with an interval that may be longer than a test: its only export comes with SIGTERM."""
    environment = {"OTEL_METRIC_EXPORT_INTERVAL": interval_ms, **environment}
    with told.scene(folder, *arguments, environment=environment) as it:
        yield it


def test_no_budget(tmp_path: pathlib.Path) -> None:
    """Every pickup is counted as suppressed; exemplars stay, without ids."""
    with scene_of(tmp_path, "--span-rate", "0", "0") as scene:
        pick_up(scene, 30)
        scene.settle()
        assert scene.receiver.spans() == []
        found = all_exemplars(scene.receiver)
        assert found and {(exemplar.trace_id, exemplar.span_id) for exemplar in found} == {("", "")}
        assert told.waits(scene.receiver).count == suppressed(scene.receiver) == 30


def test_each_pickup_has_a_span_within_the_budget(tmp_path: pathlib.Path) -> None:
    """MIN_US, and the default rate: 100 a second are the interval's as a whole."""
    with scene_of(tmp_path, "0", interval_ms="60000") as scene:
        began_s = time.monotonic()
        pick_up(scene, 300)
        time.sleep(max(0.0, began_s + 3.5 - time.monotonic()))
        assert scene.agent.stop() == 0
        assert len(scene.receiver.spans()) == told.waits(scene.receiver).count == 300
        assert suppressed(scene.receiver) == 0


def test_the_slowest_win(tmp_path: pathlib.Path) -> None:
    """Two a second: whatever came first or last."""
    with scene_of(tmp_path, "--span-rate", "2", "0", interval_ms="60000") as scene:
        time.sleep(2)
        pick_up(scene, 100)
        pick_up(scene, 3, wait_s=0.2)
        pick_up(scene, 100)
        assert scene.agent.stop() == 0
        spans = scene.receiver.spans()
        assert 4 <= len(spans) < 60
        assert sum(told.length_ns(span) >= 200_000_000 for span in spans) == 3
        assert told.waits(scene.receiver).count == len(spans) + suppressed(scene.receiver) == 203
        shortest_s = min(told.length_ns(span) for span in spans) / 1e9
        for exemplar in all_exemplars(scene.receiver):
            assert exemplar.value is not None
            if exemplar.span_id:
                assert (exemplar.trace_id, exemplar.span_id) in told.spans_by_id(scene.receiver)
            else:
                assert exemplar.value <= shortest_s


def test_the_slowest_win_in_a_flood(tmp_path: pathlib.Path) -> None:
    """Whether the kernel or the agent leaves the others out: 120 in an interval, of which the kernel soon hears."""
    with scene_of(tmp_path, "--span-rate", "2", "0", interval_ms="60000") as scene:
        pick_up(scene, 300)
        time.sleep(2)  # agent.POLL_S, and a bit
        pick_up(scene, 300)
        pick_up(scene, 3, wait_s=0.2)
        pick_up(scene, 300)
        assert scene.agent.stop() == 0
        spans = scene.receiver.spans()
        assert 3 <= len(spans) <= 120
        assert sum(told.length_ns(span) >= 200_000_000 for span in spans) == 3
        assert told.waits(scene.receiver).count == len(spans) + suppressed(scene.receiver) == 903


def test_after_a_flood_the_next_interval_has_all(tmp_path: pathlib.Path) -> None:
    """What the budget of one interval had no room for, 6 in 2 s, that of the next one has."""
    with scene_of(tmp_path, "--span-rate", "3", "0", interval_ms="2000") as scene:
        pick_up(scene, 200, wait_s=0.01)
        scene.settle()
        sender, reader = scene.listener.connect()
        for _ in range(3):
            deliver(sender, reader)
        port = sender.getsockname()[1]
        scene.receiver.wait_for(
            lambda seen: [span.attributes["network.peer.port"] for span in seen.spans()].count(port) == 3, 10
        )
        assert scene.agent.stop() == 0
        assert told.waits(scene.receiver).count == len(scene.receiver.spans()) + suppressed(scene.receiver) == 203


def test_the_budget_is_the_intervals_own(tmp_path: pathlib.Path) -> None:
    """Intervals with nothing to tell leave nothing to the next: 10 a second are 2 in 200 ms."""
    with scene_of(tmp_path, "--span-rate", "10", "0") as scene:
        time.sleep(4)
        for _ in range(4):
            pick_up(scene, 100)
        scene.settle()
        intervals = {point.time_unix_ns for point in scene.receiver.points(DURATION) if point.exemplars}
        longest_s = 0.2 + 0.8  # a noisy machine may be late
        assert len(scene.receiver.spans()) <= 10 * longest_s * len(intervals)
        assert told.waits(scene.receiver).count == len(scene.receiver.spans()) + suppressed(scene.receiver) == 400


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_SAMPLER": "always_off"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"},
    ],
    ids=["sampler", "exporter", "ratio"],
)
def test_exemplars_without_spans(environment: dict[str, str], tmp_path: pathlib.Path) -> None:
    with scene_of(tmp_path, "0", **environment) as scene:
        pick_up(scene, 20)
        scene.settle()
        assert scene.receiver.spans() == []
        found = all_exemplars(scene.receiver)
        assert found and {(exemplar.trace_id, exemplar.span_id) for exemplar in found} == {("", "")}
        assert all(request.signal == "metrics" for request in scene.receiver.requests)
        assert suppressed(scene.receiver) == 0


def test_sampled_by_ratio(tmp_path: pathlib.Path) -> None:
    """Half of the traces: an exemplar has ids exactly if its span was exported. And limits of spans hold."""
    with scene_of(
        tmp_path,
        "0",
        OTEL_TRACES_SAMPLER="traceidratio",
        OTEL_TRACES_SAMPLER_ARG="0.5",
        OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="5",
        OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT="3",
        OTEL_METRICS_EXEMPLAR_FILTER="always_on",
    ) as scene:
        for _ in range(8):
            pick_up(scene, 25)
            time.sleep(0.3)
        scene.settle()
        spans = told.spans_by_id(scene.receiver)
        assert 40 < len(spans) < 160  # of 200
        assert {len(span.attributes) for span in spans.values()} == {5}
        texts = [value for span in spans.values() for value in span.attributes.values() if isinstance(value, str)]
        assert texts and max(map(len, texts)) == 3
        found = all_exemplars(scene.receiver)
        assert found
        for exemplar in found:
            assert not exemplar.span_id or (exemplar.trace_id, exemplar.span_id) in spans


def test_exemplar_filter(tmp_path: pathlib.Path) -> None:
    """always_off: none at all; the spans of pickups stay."""
    with scene_of(tmp_path, "0", OTEL_METRICS_EXEMPLAR_FILTER="always_off") as scene:
        pick_up(scene, 5)
        scene.settle()
        assert all_exemplars(scene.receiver) == []
        assert len(scene.receiver.spans()) == told.waits(scene.receiver).count == 5


def test_trace_based_exemplar_filter(tmp_path: pathlib.Path) -> None:
    """Only exemplars with a span."""
    arguments = ("--span-rate", "0.1", "0")
    with scene_of(tmp_path, *arguments, interval_ms="60000", OTEL_METRICS_EXEMPLAR_FILTER="trace_based") as scene:
        pick_up(scene, 1, wait_s=0.3)
        pick_up(scene, 50)
        assert scene.agent.stop() == 0
        (exemplar,) = all_exemplars(scene.receiver)
        ((ids, span),) = told.spans_by_id(scene.receiver).items()
        assert (exemplar.trace_id, exemplar.span_id) == ids and told.length_ns(span) >= 300_000_000


def test_a_small_queue(tmp_path: pathlib.Path) -> None:
    """Ids are those of spans that were exported, and what found no room was counted."""
    with scene_of(
        tmp_path, "--span-rate", "100000", "0", OTEL_BSP_MAX_QUEUE_SIZE="7", OTEL_BSP_SCHEDULE_DELAY="2000"
    ) as scene:
        for _ in range(6):
            pick_up(scene, 50)
            time.sleep(0.3)
        assert scene.agent.stop() == 0
        assert "Queue full" not in scene.agent.stderr
        spans = told.spans_by_id(scene.receiver)
        assert 7 <= len(spans) < 300
        without_room = told.dropped(scene.receiver, "queue_full")
        assert len(spans) + without_room == told.waits(scene.receiver).count == 300
        assert suppressed(scene.receiver) == 0
        with_ids = {(one.trace_id, one.span_id) for one in all_exemplars(scene.receiver) if one.span_id}
        assert with_ids and with_ids <= set(spans)


def test_a_minimum(tmp_path: pathlib.Path) -> None:
    """MIN_US limits spans of pickups, never the histogram; exemplars have theirs all the same."""
    with scene_of(tmp_path, "100000", interval_ms="60000") as scene:
        pick_up(scene, 50)
        pick_up(scene, 3, wait_s=0.11)
        assert scene.agent.stop() == 0
        assert told.waits(scene.receiver).count == 53
        slow = [span for span in scene.receiver.spans() if told.length_ns(span) >= 100_000_000]
        quick = [span for span in scene.receiver.spans() if told.length_ns(span) < 100_000_000]
        ids = {(exemplar.trace_id, exemplar.span_id) for exemplar in all_exemplars(scene.receiver)}
        assert len(slow) == 3
        assert quick and {(span.trace_id, span.span_id) for span in quick} <= ids


def test_one_pickup_of_many_segments(tmp_path: pathlib.Path) -> None:
    """A span for its longest wait, and one for the exemplar of each bucket that it filled."""
    with scene_of(tmp_path, "0", interval_ms="60000") as scene:
        sender, reader = scene.listener.connect()
        for count in range(1, 6):
            sender.sendall(b"z" * 10)
            told.queued_for(reader, 10 * count)
            time.sleep(0.03)
        assert len(reader.recv(1000)) == 50
        assert scene.agent.stop() == 0
        (point,) = scene.receiver.points(DURATION)
        assert point.count == 5
        spans = told.spans_by_id(scene.receiver)
        waiting = {(one.attributes["tcppktlat.segments"], one.attributes["tcppktlat.bytes"]) for one in spans.values()}
        assert waiting == {(5, 50)}
        longest_ns = max(told.length_ns(span) for span in spans.values())
        assert longest_ns >= 150_000_000
        values_s = [float(exemplar.value or 0) for exemplar in point.exemplars]
        assert max(values_s) == longest_ns / 1e9
        assert {told.bucket_of(point, value_s) for value_s in values_s} == set(told.bucket_counts(point))
        assert {(exemplar.trace_id, exemplar.span_id) for exemplar in point.exemplars} == set(spans)
