"""A flood: every pickup is long enough to want a span. What that costs, and whether everything is accounted for."""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass

from backends.servers import free_port
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.settings import DEFAULT_SPAN_RATE
from support.memory import resident_bytes
from telemetry import told

from .kernel import Kernel
from .machine import Cores, ahead_of_others, cpu_s
from .pingpong import PingPong
from .report import Goal, Report
from .servers import (
    AGAIN,
    EXPORT_EVERY_S,
    LEAST,
    Slices,
    measure,
    median,
    noise,
    p99_ms,
    ratios,
    stopped_subjects,
    throughput,
)
from .subjects import EMPTY, FLAVOURS, FLOODED, NOTHING, OURS, start_agent, stop, wait_until_attached, wait_until_quiet
from .workloads import WORKLOADS, make

APPLICATION = "redis"
PICKUPS = 1_000_000
RSS_LIMIT_MB = 60


@dataclass(frozen=True)
class Flood:
    """What an agent told of PICKUPS pickups; and what it took meanwhile: memory, and a share of a core."""

    observed: int
    books: dict[str, int]
    spans: int
    suppressed: int
    lost: int
    dropped: int
    seconds: float
    most_spans: int
    rss_mb: float
    cpu_share: float


def flood(kernel: Kernel, pingpong: PingPong) -> Flood:
    """As many round trips, of which the agent sees the server's end, and nothing else."""
    port = free_port()
    with Receiver() as receiver:
        began_s = time.monotonic()
        agent = start_agent(
            FLAVOURS[0],
            receiver.grpc_endpoint,
            {"OTEL_METRIC_EXPORT_INTERVAL": f"{EXPORT_EVERY_S * 1e3:g}"},
            arguments=["-l", str(port), "1"],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until_attached(agent, kernel)
            sent_s, before_s = time.monotonic(), cpu_s(agent.pid)
            pingpong.exactly(port, PICKUPS)
            seconds = time.monotonic() - sent_s
            cpu_share, rss_mb = (cpu_s(agent.pid) - before_s) / seconds, resident_bytes(agent.pid) / 1e6
        finally:
            stop(agent)
        return Flood(
            observed=told.waits(receiver).count,
            books=told.books(receiver),
            spans=len(receiver.spans()),
            suppressed=told.number(receiver, told.SUPPRESSED),
            lost=told.number(receiver, "tcppktlat.events.lost"),
            dropped=told.number(receiver, told.DROPPED),
            seconds=seconds,
            most_spans=int(DEFAULT_SPAN_RATE * (time.monotonic() - began_s)),
            rss_mb=rss_mb,
            cpu_share=cpu_share,
        )


def run(kernel: Kernel, folder: pathlib.Path, cores: Cores, rounds: int, seconds: int) -> Report:
    """The whole part. Raises BenchmarkError if a program is missing."""
    (folder / APPLICATION).mkdir()
    workload, pingpong = make(APPLICATION, folder / APPLICATION), PingPong(folder, cores)
    wait_until_quiet(kernel)
    with cores.kept_apart(), ahead_of_others():
        with Receiver() as receiver:
            with stopped_subjects(receiver.grpc_endpoint, kernel, (EMPTY, OURS, FLOODED)) as subjects:
                with workload.running(cores):
                    workload.prepare()
                    slices = measure(workload, subjects, kernel, rounds, seconds, peer=False)
        found = flood(kernel, pingpong)
    return _report(slices, found, rounds, seconds)


def _report(slices: Slices, found: Flood, rounds: int, seconds: int) -> Report:
    rows = []
    for kind in (NOTHING, AGAIN, EMPTY, OURS, FLOODED):
        shares = [f"{statistics.median(ratios(slices, figure, kind, EMPTY)):.1%}" for figure in (throughput, p99_ms)]
        cpu = statistics.mean(one.cpu_share for one in slices[kind].values())
        p99 = median(slices, p99_ms, kind)
        rows.append(
            [kind, f"{median(slices, throughput, kind):,.0f}", shares[0], f"{p99:.2f}", shares[1], f"{cpu:.1%}"]
        )
    share = statistics.median(ratios(slices, throughput, FLOODED, EMPTY))
    told_of = found.spans + found.suppressed + found.lost + found.dropped
    settled = {name: count for name, count in found.books.items() if count}
    return Report(
        f"A flood: {WORKLOADS[APPLICATION].title}, every pickup wants a span",
        ["under", "requests/s", "of empty's", "p99, ms", "of empty's", "the agent's CPU"],
        rows,
        [
            Goal(
                f"{share:.1%} of the throughput under empty programs (at least {LEAST:.0%}; two slices of nothing "
                f"differ by {noise(slices, throughput):.1%})",
                share >= LEAST,
            ),
            Goal(
                f"of {PICKUPS:,} pickups {found.observed:,} are in the histogram, and the books have {settled}",
                found.observed == PICKUPS and settled == {"received": PICKUPS, "observed": PICKUPS},
            ),
            Goal(
                f"spans {found.spans:,} + suppressed {found.suppressed:,} + events lost {found.lost:,} + spans dropped "
                f"{found.dropped:,} = {told_of:,}",
                told_of == PICKUPS,
            ),
            Goal(f"{found.spans:,} spans (budget: {found.most_spans:,})", 0 < found.spans <= found.most_spans),
            Goal(f"{found.rss_mb:.1f} MB of RSS (at most {RSS_LIMIT_MB})", found.rss_mb <= RSS_LIMIT_MB),
        ],
        [
            f"Medians of {rounds} interleaved rounds of {seconds} s. Then {PICKUPS:,} round trips of ping-pong in "
            f"{found.seconds:.1f} s, of which the agent sees the server's end: it took {found.cpu_share:.1%} of a core "
            "meanwhile."
        ],
        {
            "slices": {kind: {number: asdict(one) for number, one in its.items()} for kind, its in slices.items()},
            "flood": asdict(found),
        },
    )
