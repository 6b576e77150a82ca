"""What series cost, from ten to 10,000: memory of the agent and of the kernel, and CPU time of each export."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass

from otel_tcppktlat.demo.receiver import Receiver
from support.memory import resident_bytes
from support.objects import kernel_bytes

from .crowd import Crowd, crowd
from .kernel import Kernel
from .machine import cpu_s
from .report import Goal, Report
from .subjects import Process, start_agent, stop, wait_until_attached, wait_until_quiet

EXPLICIT, EXPONENTIAL = "explicit_bucket_histogram", "base2_exponential_bucket_histogram"
CASES = ((10, EXPLICIT), (100, EXPLICIT), (1_000, EXPLICIT), (10_000, EXPLICIT), (10_000, EXPONENTIAL))
AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
INTERVAL_S = 5.0
SPARE_SERIES = 1_000  # for what else runs on the machine
CPU_LIMIT_S, REQUEST_LIMIT_BYTES = 1.0, 4 << 20
RSS_LIMIT_MB = {1_000: 60, 10_000: 100}
DURATION, LOST, OVERFLOW = "tcppktlat.receive_queue.duration", "tcppktlat.events.lost", "otel.metric.overflow"


@dataclass(frozen=True)
class Usage:
    """Of one agent: memory after its exports, CPU time of one interval, and what arrived from it."""

    rss_mb: float
    cpu_s: float
    kernel_mb: float
    largest_request_bytes: int
    points: int
    overflowed: bool
    events_lost: float


def _use(agent: Process, receiver: Receiver, many: Crowd, exports: int) -> Usage:
    spent_s = []
    for _ in range(exports):
        before_s = cpu_s(agent.pid)
        many.do("send")
        many.do("read")
        time.sleep(INTERVAL_S)
        spent_s.append(cpu_s(agent.pid) - before_s)
    memory_mb = resident_bytes(agent.pid) / 1e6, kernel_bytes(agent.pid) / 1e6
    stop(agent)
    exports_by_end = defaultdict(list)
    for point in receiver.points(DURATION):
        exports_by_end[point.time_unix_ns].append(point)
    whole = max(exports_by_end.values(), key=len)  # the last may be cut short: an agent that is to end has 5 s
    return Usage(
        rss_mb=memory_mb[0],
        cpu_s=statistics.mean(spent_s),
        kernel_mb=memory_mb[1],
        largest_request_bytes=max(one.bytes for one in receiver.requests),
        points=len(whole),
        overflowed=any(OVERFLOW in point.attributes for point in whole),
        events_lost=max(float(point.value or 0) for point in receiver.points(LOST)),
    )


def _measure(kernel: Kernel, size: int, aggregation: str, exports: int) -> Usage:
    wait_until_quiet(kernel)
    with Receiver() as receiver, crowd(size, a_port_each=True) as many:
        settings = {"OTEL_METRIC_EXPORT_INTERVAL": f"{INTERVAL_S * 1e3:g}", AGGREGATION: aggregation}
        limit = ["--series-limit", str(max(2000, size + SPARE_SERIES))]
        endpoint = receiver.grpc_endpoint
        agent = start_agent("auto", endpoint, settings, arguments=limit, stderr=subprocess.DEVNULL)
        try:
            wait_until_attached(agent, kernel)
            return _use(agent, receiver, many, exports)
        finally:
            stop(agent)


def _name(size: int, aggregation: str) -> str:
    return f"{size:,}{', exponential' if aggregation == EXPONENTIAL else ''}"


def run(kernel: Kernel, exports: int) -> Report:
    """The whole part: each size once, as the figures of one agent are means of `exports` intervals."""
    found = {case: _measure(kernel, *case, exports) for case in CASES}
    goals = []
    for (size, aggregation), usage in found.items():
        name = _name(size, aggregation)
        goals += [
            Goal(f"{name}: {usage.cpu_s:.2f} s of CPU an interval (at most 1)", usage.cpu_s <= CPU_LIMIT_S),
            Goal(
                f"{name}: all exported ({usage.points:,} points), the largest request takes "
                f"{usage.largest_request_bytes / 1e6:.2f} MB (at most 4 MiB)",
                usage.points >= size and not usage.overflowed and usage.largest_request_bytes <= REQUEST_LIMIT_BYTES,
            ),
        ]
        if limit_mb := RSS_LIMIT_MB.get(size):
            goals.append(Goal(f"{name}: {usage.rss_mb:.1f} MB of RSS (at most {limit_mb})", usage.rss_mb <= limit_mb))
    return Report(
        "Series",
        ["series", "CPU an interval, s", "RSS, MB", "kernel, MB", "largest request, MB", "events lost"],
        [
            [
                _name(*case),
                f"{usage.cpu_s:.2f}",
                f"{usage.rss_mb:.1f}",
                f"{usage.kernel_mb:.1f}",
                f"{usage.largest_request_bytes / 1e6:.2f}",
                f"{usage.events_lost:,.0f}",
            ]
            for case, usage in found.items()
        ],
        goals,
        [
            f"gRPC, means of {exports} intervals in each of which every series grew. Kernel: what "
            "/proc/PID/fdinfo says of the agent's maps and programs."
        ],
        {_name(*case): [vars(usage)] for case, usage in found.items()},
    )
