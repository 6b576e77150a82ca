"""What the programs take of the kernel's time, told while the kernel counts it (kernel.bpf_stats_enabled)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.probe.libbpf import Libbpf
from telemetry import told
from telemetry.told import deliver

_STATS_RUN_TIME = 0
PICKUPS = 30


@contextmanager
def counting() -> Iterator[None]:
    """As the sysctl does, but for as long as the descriptor is open (bpf(2), BPF_ENABLE_STATS)."""
    fd = Libbpf().lib.bpf_enable_stats(_STATS_RUN_TIME)
    assert fd >= 0
    try:
        yield
    finally:
        os.close(fd)


def of_program(receiver: Receiver, metric: str) -> dict[str, float]:
    """The latest total of each program."""
    points = told.latest(receiver.points(metric)).values()
    return {str(point.attributes["tcppktlat.bpf.program"]): point.value or 0 for point in points}


def test_time_in_the_kernel_is_told_while_it_is_counted(tmp_path: pathlib.Path) -> None:
    with told.scene(tmp_path) as scene, counting():
        sender, reader = scene.listener.connect()
        for _ in range(PICKUPS):
            deliver(sender, reader)
        scene.settle()
        runs = of_program(scene.receiver, "tcppktlat.bpf.runs.timed")
        run_time_s = of_program(scene.receiver, "tcppktlat.bpf.run.time")
    assert runs["probe"] >= PICKUPS and runs["adjust"] >= PICKUPS
    for program in ("probe", "adjust"):
        assert 0 < run_time_s[program] / runs[program] < 1e-3
