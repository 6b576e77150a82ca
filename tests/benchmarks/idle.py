"""An agent that sees no traffic: CPU time and wakeups of its threads, for as long as the default export interval."""

from __future__ import annotations

import pathlib
import subprocess
import time
from dataclasses import dataclass

from otel_tcppktlat.agent import POLL_S
from otel_tcppktlat.demo.receiver import Receiver

from .footprint import PROTOCOLS
from .kernel import Kernel
from .report import Goal, Report
from .subjects import start_agent, stop, wait_until_attached

SETTLE_S = 3.0
CPU_LIMIT = 0.001
EXPORT_WAKEUPS = 40
_SEEN_BY_NOBODY = ["-l", "1"]  # a port that nobody listens on: what else the machine receives is no load


@dataclass(frozen=True)
class Usage:
    """Of one agent in the window: of the threads that are there at its end."""

    cpu: float
    wakeups: int


def _threads(pid: int) -> dict[str, tuple[int, int]]:
    """By thread: how often it went to sleep (proc_pid_status(5)), and the ns that it ran (schedstat)."""
    found = {}
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        ran_ns = int((task / "schedstat").read_text().split()[0])
        found[task.name] = int(status["voluntary_ctxt_switches"]), ran_ns
    return found


def _use(pid: int, window_s: float) -> Usage:
    before = _threads(pid)
    time.sleep(window_s)
    wakeups = ran_ns = 0
    for task, (slept, ns) in _threads(pid).items():
        slept_before, ns_before = before.get(task, (0, 0))
        wakeups += slept - slept_before
        ran_ns += ns - ns_before
    return Usage(ran_ns / 1e9 / window_s, wakeups)


def _measure(kernel: Kernel, protocol: str, window_s: float) -> Usage:
    with Receiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        settings = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        agent = start_agent("auto", endpoint, settings, arguments=_SEEN_BY_NOBODY, stderr=subprocess.DEVNULL)
        try:
            wait_until_attached(agent, kernel)
            time.sleep(SETTLE_S)
            return _use(agent.pid, window_s)
        finally:
            stop(agent)


def run(kernel: Kernel, window_s: float) -> Report:
    """The whole part. A window of the default export interval has one export in it."""
    found = {name: _measure(kernel, protocol, window_s) for name, protocol in PROTOCOLS.items()}
    most = round(window_s / POLL_S) + EXPORT_WAKEUPS
    goals = [
        goal
        for name, usage in found.items()
        for goal in (
            Goal(f"{name}: {usage.cpu:.3%} of a core (at most {CPU_LIMIT:.1%})", usage.cpu <= CPU_LIMIT),
            Goal(
                f"{name}: {usage.wakeups} wakeups (at most {most}: a poll every {POLL_S:g} s, and the export)",
                usage.wakeups <= most,
            ),
        )
    ]
    return Report(
        "Idle",
        ["exporting over", "CPU of a core", "wakeups"],
        [[name, f"{usage.cpu:.3%}", f"{usage.wakeups}"] for name, usage in found.items()],
        goals,
        [f"{window_s:g} s, with one export in them, at the default interval."],
        {name: [vars(usage)] for name, usage in found.items()},
    )
