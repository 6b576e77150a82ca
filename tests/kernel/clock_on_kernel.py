"""The clock is set by an hour while the agent exports. For a guest alone: test_other_kernels.py runs it there."""

from __future__ import annotations

import pathlib
import socket
import time

from otel_tcppktlat.demo.receiver import Point, Receiver
from telemetry import told
from telemetry.told import DURATION, RECEIVED, SETTLED, Scene, deliver

HOUR_S = 3600
FAILS = "Failed to export metrics"  # the SDK, with -v
INTERVAL_S = 3  # long enough for five segments and a step in the middle
LEAST_S = 0.002  # an interval takes 5 ms to end; at half speed


def step(seconds: float) -> None:
    assert socket.gethostname() == "guest"
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


def wait_for_observed(receiver: Receiver, segments: int) -> None:
    """Until the receiver has so many: the stack may get more, as a slow guest's TCP sends some again."""
    receiver.wait_for(lambda seen: told.number(seen, SETTLED, tcppktlat_outcome="observed") >= segments, 120)


def check_books(receiver: Receiver, segments: int) -> None:
    """They balance, each segment has been observed, and only those."""
    books = told.check_balance(receiver)
    assert books["observed"] == segments == books["received"] - books.get("duplicate", 0), books


def deliver_some(scene: Scene, total: int) -> None:
    """Five segments, and some intervals afterwards."""
    sender, reader = scene.listener.connect()
    for _ in range(5):
        deliver(sender, reader, 0.02)
    wait_for_observed(scene.receiver, total)
    before = len(scene.receiver.points(RECEIVED))
    scene.receiver.wait_for(lambda seen: len(seen.points(RECEIVED)) >= before + 5, 120)


def test_there_and_back(tmp_path: pathlib.Path) -> None:
    with told.scene(tmp_path, "0") as scene:
        for count, seconds in enumerate((0, HOUR_S, -HOUR_S, -HOUR_S, HOUR_S), 1):
            step(seconds)
            deliver_some(scene, 5 * count)
        assert scene.agent.stop() == 0
        receiver = scene.receiver
    check_books(receiver, 25)
    for name in (RECEIVED, DURATION):
        points = receiver.points(name)
        times = [point.time_unix_ns for point in points]
        assert all(later - earlier > LEAST_S * 1e9 for earlier, later in zip(times, times[1:], strict=False)), name
        (began,) = {point.start_unix_ns for point in points}
        assert began < times[0]
    check_waits(receiver, 25)


def check_waits(receiver: Receiver, segments: int) -> None:
    """No wait is an hour longer or shorter for it, as an exemplar or as a span.

    gRPC's deadlines go by the clock: what was under way when it was set may have come twice.
    """
    assert all(0.02 <= (exemplar.value or 0) < 10 for _, exemplar in told.exemplars(receiver))
    lengths_s = [told.length_ns(span) / 1e9 for span in told.spans_by_id(receiver).values()]
    assert len(lengths_s) == segments and all(0.02 <= length_s < 10 for length_s in lengths_s)


def check_times(points: list[Point]) -> None:
    """Deltas one after the other: each begins when the one before has ended, and ends later."""
    assert {point.temporality for point in points} == {"delta"}
    assert all(point.start_unix_ns < point.time_unix_ns for point in points)
    ends = [point.time_unix_ns for point in points]
    assert [point.start_unix_ns for point in points[1:]] == ends[:-1]


def deliver_across(scene: Scene, seconds: float, away: bool) -> None:
    """Five segments right after an interval has begun, the clock set after the second; `away`: its export fails."""
    receiver, before, complaints = scene.receiver, len(scene.receiver.points(RECEIVED)), scene.agent.stderr.count(FAILS)
    receiver.wait_for(lambda seen: len(seen.points(RECEIVED)) > before, 120)
    if away:
        receiver.stop()
    sender, reader = scene.listener.connect()
    for number in range(5):
        if number == 2:
            step(seconds)
        deliver(sender, reader, 0.02)
    if away:
        told.eventually(lambda: scene.agent.stderr.count(FAILS) > complaints, 120, FAILS)
        receiver.start()


def test_in_the_middle_of_an_interval(tmp_path: pathlib.Path) -> None:
    """Deltas: what came before the step and after it is in one point, whether or not its first export fails."""
    environment = {
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_METRIC_EXPORT_INTERVAL": str(INTERVAL_S * 1000),
        "OTEL_EXPORTER_OTLP_TIMEOUT": "5",
    }
    steps = [(HOUR_S, False), (-HOUR_S, True), (-HOUR_S, False), (HOUR_S, True)]
    segments = 5 * len(steps)
    with told.scene(tmp_path, "0", environment=environment) as scene:
        receiver = scene.receiver
        for seconds, away in steps:
            deliver_across(scene, seconds, away)
        wait_for_observed(receiver, segments)
        assert scene.agent.stop() == 0
    check_books(receiver, segments)
    durations = receiver.points(DURATION)
    assert [point.count for point in durations] == [5] * len(steps)
    for points in (durations, receiver.points(RECEIVED)):
        check_times(points)
    for point in durations:
        assert all(point.start_unix_ns < one.time_unix_ns <= point.time_unix_ns for one in point.exemplars)
    check_waits(receiver, segments)
