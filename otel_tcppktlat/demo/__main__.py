"""`make run`: the real agent, two readers, and what arrives over OTLP, in about ten seconds."""

from __future__ import annotations

import bisect
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

from .readers import PROMPT, STALL_S, STALLING, Readers
from .receiver import ExemplarRecord, Point, Receiver, SpanRecord

METRIC = "tcppktlat.receive_queue.duration"
ATTRIBUTES = "process.executable.name,server.port,network.type,tcppktlat.role,tcppktlat.process.comm"
SECONDS = 8.0
SLOW_S = 0.05
BAR = 40


def _agent(endpoint: str) -> subprocess.Popen[bytes]:
    settings = {"OTEL_METRIC_EXPORT_INTERVAL": "1000", "OTEL_BSP_SCHEDULE_DELAY": "500"}
    unset = [name for name in os.environ if name.startswith("OTEL_")]
    environment = {name: value for name, value in os.environ.items() if name not in unset} | settings
    return subprocess.Popen(
        [sys.executable, "-m", "otel_tcppktlat", "--otlp", endpoint, "--attributes", ATTRIBUTES],
        env=environment,
        start_new_session=True,  # Ctrl-C is the demo's: the agent is then told to stop
    )


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:g} {unit}"
    return f"{seconds * 1e6:g} us"


def _show_histogram(point: Point) -> None:
    used = [index for index, count in enumerate(point.bucket_counts) if count]
    most = max(point.bucket_counts)
    for index in range(used[0], used[-1] + 1):
        count = point.bucket_counts[index]
        bar = "#" * max(round(count / most * BAR), bool(count))
        upper = (
            f"<= {_duration(point.bounds[index])}" if index < len(point.bounds) else f"> {_duration(point.bounds[-1])}"
        )
        print(f"  {upper:>10} {count:>7}  {bar}".rstrip())


def _show_exemplar(exemplar: ExemplarRecord, span: SpanRecord) -> None:
    who = span.attributes
    wait_s = round(float(exemplar.value or 0), 6)
    print(f"  exemplar {_duration(wait_s)}: trace {exemplar.trace_id}, span {exemplar.span_id}")
    print(
        f"    span '{span.name}' of {_duration(round((span.end_unix_ns - span.start_unix_ns) / 1e9, 6))}: "
        f"pid {who['process.pid']}, {who['thread.name']}, "
        f"{who['network.peer.address']}:{who['network.peer.port']} -> "
        f"{who['network.local.address']}:{who['network.local.port']}, "
        f"segments: {who['tcppktlat.segments']}, bytes: {who['tcppktlat.bytes']}"
    )


def _slowest_by_bucket(points: Iterable[Point]) -> list[ExemplarRecord]:
    slowest: dict[int, tuple[float, ExemplarRecord]] = {}
    for point in points:
        for exemplar in point.exemplars:
            wait_s = float(exemplar.value or 0)
            bucket = bisect.bisect_left(point.bounds, wait_s)
            if wait_s >= SLOW_S and (bucket not in slowest or wait_s > slowest[bucket][0]):
                slowest[bucket] = wait_s, exemplar
    return [slowest[bucket][1] for bucket in sorted(slowest)]


def _show(receiver: Receiver) -> None:
    spans = {(span.trace_id, span.span_id): span for span in receiver.spans()}
    for name in (PROMPT, STALLING):
        points = [point for point in receiver.points(METRIC) if point.attributes.get("tcppktlat.process.comm") == name]
        if not points:
            continue
        last = points[-1]
        port = last.attributes["server.port"]
        print(f"\n{name} (server.port {port}): {METRIC}, {last.count} segments, {last.sum:.3f} s in all")
        _show_histogram(last)
        for exemplar in _slowest_by_bucket(points):
            span = spans.get((exemplar.trace_id, exemplar.span_id))
            if span:
                _show_exemplar(exemplar, span)


def main() -> int:
    """Runs the demo; returns the exit status."""
    with Readers() as readers, Receiver() as receiver:  # the processes first: gRPC has threads
        agent = _agent(receiver.grpc_endpoint)
        try:
            print("Loading the eBPF programs...", flush=True)
            while not receiver.points("tcppktlat.segments.received"):
                try:
                    receiver.wait_for(lambda seen: bool(seen.points("tcppktlat.segments.received")), 0.5)
                except TimeoutError:
                    if agent.poll() is not None:
                        return agent.returncode or 1
            print(
                f"Sending to a prompt reader, and to one that stalls {_duration(STALL_S)} every 40 messages...",
                flush=True,
            )
            readers.send_for(SECONDS)
        except KeyboardInterrupt:
            print()
        finally:
            agent.send_signal(signal.SIGTERM)
            status = agent.wait()
        _show(receiver)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
