"""The clock is set by an hour while the agent exports. For a guest alone: test_other_kernels.py runs it there."""

from __future__ import annotations

import pathlib
import socket
import time

import pytest

from telemetry import told
from telemetry.told import DURATION, RECEIVED, Scene, deliver

HOUR_S = 3600
LEAST_S = 0.002  # an interval takes 5 ms to end; at half speed


def step(seconds: float) -> None:
    assert socket.gethostname() == "guest"
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


def deliver_some(scene: Scene, total: int) -> None:
    """Five segments, and some intervals afterwards."""
    sender, reader = scene.listener.connect()
    for _ in range(5):
        deliver(sender, reader, 0.02)
    scene.receiver.wait_for(lambda seen: told.number(seen, RECEIVED) == total, 120)
    before = len(scene.receiver.points(RECEIVED))
    scene.receiver.wait_for(lambda seen: len(seen.points(RECEIVED)) >= before + 5, 120)


@pytest.mark.parametrize("temporality", ["cumulative", "delta"])
def test_there_and_back(tmp_path: pathlib.Path, temporality: str) -> None:
    environment = {"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": temporality}
    with told.scene(tmp_path, "0", environment=environment) as scene:
        for count, seconds in enumerate((0, HOUR_S, -HOUR_S, -HOUR_S, HOUR_S), 1):
            step(seconds)
            deliver_some(scene, 5 * count)
        assert scene.agent.stop() == 0
        receiver = scene.receiver
    assert told.check_balance(receiver) == {"received": 25, "observed": 25, "queued": 0}
    for name in (RECEIVED, DURATION):
        points = receiver.points(name)
        times = [point.time_unix_ns for point in points]
        assert all(later - earlier > LEAST_S * 1e9 for earlier, later in zip(times, times[1:], strict=False)), name
        assert all(point.start_unix_ns < point.time_unix_ns for point in points)
        if points[0].temporality == "delta":
            starts = [point.start_unix_ns for point in points[1:]]
            assert all(start >= earlier for start, earlier in zip(starts, times, strict=False))
        else:
            assert len({point.start_unix_ns for point in points}) == 1
    assert all((exemplar.value or 0) < 10 for _, exemplar in told.exemplars(receiver))
    lengths_s = [told.length_ns(span) / 1e9 for span in receiver.spans()]
    assert len(lengths_s) == 25 and all(0.02 <= length_s < 10 for length_s in lengths_s)
