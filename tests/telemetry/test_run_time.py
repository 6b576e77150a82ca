"""What the programs take of the kernel's time, told while the kernel counts it (kernel.bpf_stats_enabled)."""

from __future__ import annotations

import pathlib

from otel_tcppktlat.demo.receiver import Receiver
from support.objects import counting_run_time
from telemetry import told
from telemetry.told import deliver

PICKUPS = 30


def of_program(receiver: Receiver, metric: str) -> dict[str, float]:
    """The latest total of each program."""
    points = told.latest(receiver.points(metric)).values()
    return {str(point.attributes["tcppktlat.bpf.program"]): point.value or 0 for point in points}


def test_time_in_the_kernel_is_told_while_it_is_counted(tmp_path: pathlib.Path) -> None:
    with told.scene(tmp_path) as scene, counting_run_time():
        sender, reader = scene.listener.connect()
        for _ in range(PICKUPS):
            deliver(sender, reader)
        scene.settle()
        runs = of_program(scene.receiver, "tcppktlat.bpf.runs.timed")
        run_time_s = of_program(scene.receiver, "tcppktlat.bpf.run.time")
    assert runs["probe"] >= PICKUPS and runs["adjust"] >= PICKUPS
    for program in ("probe", "adjust"):
        assert 0 < run_time_s[program] / runs[program] < 1e-3
