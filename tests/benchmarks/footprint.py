"""What the agent itself takes: memory while it exports, and time of a CPU."""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from otel_tcppktlat.demo.receiver import Receiver
from support.memory import resident_bytes

from .kernel import Kernel
from .machine import Cores, cpu_s
from .pingpong import PingPong
from .report import Goal, Report
from .subjects import Process, start_agent, stop, wait_until_attached, wait_until_quiet

SETTLE_S = 0.5  # after attaching: the exporters start
RSS_LIMIT_MB, CPU_LIMIT = 60, 0.01
INTERVAL_S = 10.0  # a sixth of the default: what an export costs weighs more than it does by default
EXPORTS = 2
PROTOCOLS = {"gRPC": "grpc", "HTTP": "http/protobuf"}


@dataclass(frozen=True)
class Usage:
    """Of one agent. CPU is a share of one core, in user space and in system calls."""

    rss_mb: float
    cpu_busy: float
    cpu_idle: float


def _cpu_share(pid: int, work: Callable[[], object]) -> float:
    began_s, before_s = time.monotonic(), cpu_s(pid)
    work()
    return (cpu_s(pid) - before_s) / (time.monotonic() - began_s)


def _exports(receiver: Receiver, protocol: str) -> int:
    return sum(each.accepted and (each.signal, each.protocol) == ("metrics", protocol) for each in receiver.requests)


def _use(agent: Process, receiver: Receiver, protocol: str, pingpong: PingPong, seconds: float) -> Usage:
    busy = _cpu_share(agent.pid, lambda: pingpong.round_trips(seconds))
    idle = _cpu_share(agent.pid, lambda: time.sleep(seconds))
    receiver.wait_for(lambda seen: _exports(seen, protocol) >= EXPORTS, 3 * INTERVAL_S)
    return Usage(resident_bytes(agent.pid) / 1e6, busy, idle)


def measure(pingpong: PingPong, kernel: Kernel, rounds: int, seconds: float) -> dict[str, list[Usage]]:
    """Interleaved rounds, by protocol."""
    found: dict[str, list[Usage]] = defaultdict(list)
    for _ in range(rounds):
        for name, protocol in PROTOCOLS.items():
            wait_until_quiet(kernel)
            with Receiver() as receiver:
                endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
                settings = {
                    "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
                    "OTEL_METRIC_EXPORT_INTERVAL": f"{INTERVAL_S * 1e3:g}",
                }
                agent = start_agent("auto", endpoint, settings, stderr=subprocess.DEVNULL)
                try:
                    wait_until_attached(agent, kernel)
                    time.sleep(SETTLE_S)
                    found[name].append(_use(agent, receiver, protocol, pingpong, seconds))
                finally:
                    stop(agent)
    return found


def run(kernel: Kernel, folder: pathlib.Path, cores: Cores, rounds: int, seconds: float) -> Report:
    """The whole part. A window of CPU time is an export interval, or `seconds` if that is longer."""
    window_s = max(seconds, INTERVAL_S)
    with cores.kept_apart():
        found = measure(PingPong(folder, cores), kernel, rounds, window_s)
    rows, goals = [], []
    for name, usages in found.items():
        rss_mb, busy, idle = (
            statistics.median(values)
            for values in zip(*((usage.rss_mb, usage.cpu_busy, usage.cpu_idle) for usage in usages), strict=True)
        )
        rows.append([name, f"{rss_mb:.1f}", f"{busy:.2%}", f"{idle:.2%}"])
        goals += [
            Goal(f"{name}: {rss_mb:.1f} MB of RSS while exporting (at most {RSS_LIMIT_MB})", rss_mb <= RSS_LIMIT_MB),
            Goal(f"{name}: {busy:.2%} of a core under load (below {CPU_LIMIT:.0%})", busy < CPU_LIMIT),
        ]
    return Report(
        "The agent",
        ["exporting over", "RSS, MB", "CPU, ping-pong", "CPU, idle"],
        rows,
        goals,
        [
            f"Medians of {rounds} interleaved rounds of {window_s:g} s. CPU: user space and system calls, of one core, "
            f"with an export every {INTERVAL_S:g} s. The kernel programs' time is in the other table."
        ],
        {name: [vars(usage) for usage in usages] for name, usages in found.items()},
    )
