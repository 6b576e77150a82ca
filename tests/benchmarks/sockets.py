"""What sockets cost, from 100 to 100,000 of them, each with data that waits; are all of them tracked and counted?"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import time
from dataclasses import dataclass

from otel_tcppktlat.demo.receiver import Receiver
from support.memory import resident_bytes
from support.objects import kernel_bytes
from telemetry import told

from .crowd import Crowd, crowd
from .kernel import Kernel
from .machine import cpu_s
from .report import Goal, Report
from .subjects import Process, start_agent, stop, wait_until_attached, wait_until_quiet

SIZES = (("typed", 100), ("typed", 10_000), ("typed", 100_000), ("raw", 100_000))
RAW_LIMIT = 16_384
INTERVAL_S = 5.0


@dataclass(frozen=True)
class Usage:
    """Of one agent. waiting: segments that it said were queued; observed, untracked: what became of them."""

    cpu_s: float
    rss_mb: float
    maps_mb: float
    storage_mb: float
    waiting: int
    observed: int
    untracked: int


def _slab_bytes() -> int:
    """Of all kernel objects in use: socket storage is none of the maps' own memory."""
    lines = pathlib.Path("/proc/slabinfo").read_text().splitlines()[2:]
    return sum(int(line.split()[1]) * int(line.split()[3]) for line in lines)


def _exported(receiver: Receiver) -> None:
    """Waits until an interval that begins from now on has been exported."""
    now_ns = time.time_ns()
    receiver.wait_for(
        lambda seen: len({point.time_unix_ns for point in seen.points(told.QUEUED) if point.time_unix_ns > now_ns}) > 1,
        6 * INTERVAL_S,
    )


def _observed(receiver: Receiver, ports: set[int]) -> int:
    """What the histograms of these servers say in all."""
    servers = (
        waits.count
        for key, waits in told.waits_by_attributes(receiver).items()
        if (attributes := dict(key)).get("server.port") in ports and attributes["tcppktlat.role"] == "server"
    )
    return sum(servers)


def _use(agent: Process, receiver: Receiver, many: Crowd) -> Usage:
    slab_bytes, queued = _slab_bytes(), told.number(receiver, told.QUEUED)
    spent_s = [cpu_s(agent.pid)]
    many.do("send")
    _exported(receiver)
    waiting = told.number(receiver, told.QUEUED) - queued
    spent_s.append(cpu_s(agent.pid))
    many.do("read")
    _exported(receiver)
    spent_s.append(cpu_s(agent.pid))
    return Usage(
        cpu_s=statistics.mean(later - earlier for earlier, later in zip(spent_s, spent_s[1:], strict=False)),
        rss_mb=resident_bytes(agent.pid) / 1e6,
        maps_mb=kernel_bytes(agent.pid) / 1e6,
        storage_mb=(_slab_bytes() - slab_bytes) / 1e6,
        waiting=waiting,
        observed=_observed(receiver, set(many.ports)),
        untracked=told.number(receiver, told.SETTLED, tcppktlat_outcome="untracked"),
    )


def _measure(kernel: Kernel, flavour: str, size: int) -> Usage:
    wait_until_quiet(kernel)
    settings = {"OTEL_METRIC_EXPORT_INTERVAL": f"{INTERVAL_S * 1e3:g}"}
    with Receiver() as receiver, crowd(size, a_port_each=False) as many:
        agent = start_agent(flavour, receiver.grpc_endpoint, settings, stderr=subprocess.DEVNULL)
        try:
            wait_until_attached(agent, kernel)
            _exported(receiver)
            return _use(agent, receiver, many)
        finally:
            stop(agent)


def _goal(flavour: str, size: int, usage: Usage) -> Goal:
    tracked = size if flavour == "typed" else RAW_LIMIT
    return Goal(
        f"{size:,} sockets, {flavour}: {usage.observed:,} observed, {usage.untracked:,} untracked "
        f"(at least {tracked:,}, and each one in one of them)",
        usage.observed >= 0.99 * tracked and usage.observed + usage.untracked >= size,
    )


def run(kernel: Kernel) -> Report:
    """The whole part: each size once."""
    found = {(flavour, size): _measure(kernel, flavour, size) for flavour, size in SIZES}
    return Report(
        "Sockets, on each of which a segment waits",
        ["sockets", "waiting", "observed", "untracked", "CPU, s", "RSS, MB", "maps, MB", "kernel objects, MB"],
        [
            [
                f"{size:,}, {flavour}",
                *(f"{count:,}" for count in (usage.waiting, usage.observed, usage.untracked)),
                f"{usage.cpu_s:.2f}",
                *(f"{mb:.1f}" for mb in (usage.rss_mb, usage.maps_mb, usage.storage_mb)),
            ]
            for (flavour, size), usage in found.items()
        ],
        [_goal(flavour, size, usage) for (flavour, size), usage in found.items()],
        [
            f"Over gRPC, every {INTERVAL_S:g} s; CPU: of the agent, from the segments' sending or reading to the "
            "export. Kernel objects: by how much all of them grew from before the first segment to after the last "
            "read, socket storage above all."
        ],
        {f"{size} {flavour}": [vars(usage)] for (flavour, size), usage in found.items()},
    )
