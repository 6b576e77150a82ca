"""python -m tests.soak [--minutes N]: mixed load, short connections and processes, a collector that restarts.

As root, from the repository's root, with PYTHONPATH=tests. The agent's resident memory and that of its maps must not
grow by more than 2 % after the first minute, and the books must balance. Exit status 1 if that does not hold. It prints
what the agent held in each minute: a leak goes on growing, a plateau does not.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from otel_tcppktlat.demo.receiver import Receiver
from support.agent import Agent
from support.memory import resident_bytes
from support.objects import kernel_bytes
from telemetry import told

MOST_GROWTH = 0.02
WARM_S, SAMPLE_S, WINDOW_S = 60, 5, 30
OUTAGE_EVERY_S, OUTAGE_S = 45, 12
KINDS = {"rss": "resident memory", "kernel": "maps and programs"}
VARIABLES = {
    "OTEL_METRIC_EXPORT_INTERVAL": "2000",
    "OTEL_BSP_SCHEDULE_DELAY": "1000",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
}


@dataclass(frozen=True)
class Sample:
    """What the agent holds at a moment since the start: resident memory, and its maps' and programs', in bytes."""

    at_s: float
    rss: int
    kernel: int


def median(samples: list[Sample], name: str) -> float:
    """Of one kind of memory, in MB."""
    return float(statistics.median(getattr(one, name) for one in samples)) / 1e6


def say(when: str, samples: list[Sample]) -> None:
    """Prints what it held."""
    held = ", ".join(f"{what} {median(samples, name):.2f} MB" for name, what in KINDS.items())
    print(f"{when}: {held}", flush=True)


def run(folder: pathlib.Path, seconds: float) -> bool:
    """The whole run; prints figures, and returns whether all holds."""
    load = [sys.executable, str(pathlib.Path(__file__).with_name("load.py"))]
    samples: list[Sample] = []
    with Receiver() as receiver, subprocess.Popen(load, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdin and it.stdout
        variables = {
            **VARIABLES,
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": receiver.grpc_endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.http_endpoint + "/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        }
        with Agent(folder, ["-v", "-l", it.stdout.readline().strip(), "--span-rate", "20"], variables) as agent:
            agent.wait_for_stderr("attached")
            began_s, outages, away, minutes = time.monotonic(), 0, False, 0
            while (elapsed_s := time.monotonic() - began_s) < seconds:
                if away != (elapsed_s % OUTAGE_EVERY_S > OUTAGE_EVERY_S - OUTAGE_S):
                    away = not away
                    outages += away
                    receiver.stop() if away else receiver.start()
                time.sleep(SAMPLE_S)
                samples.append(Sample(time.monotonic() - began_s, resident_bytes(agent.pid), kernel_bytes(agent.pid)))
                if samples[-1].at_s // 60 > minutes:
                    minutes += 1
                    say(f"minute {minutes}", [one for one in samples if one.at_s // 60 == minutes - 1])
            if away:
                receiver.start()
            it.stdin.close()
            it.wait(60)
            told.settle(receiver)
            assert agent.stop() == 0, agent.stderr
        books, described = told.books(receiver), told.waits(receiver).count
        spans = len(receiver.spans())
    outcomes = sum(books.values()) - books["received"]
    balanced = books["received"] == outcomes and books["observed"] == described and not books["queued"]
    early = [one for one in samples if WARM_S <= one.at_s < WARM_S + WINDOW_S]
    late = samples[-len(early) :]
    print(f"{seconds / 60:g} minutes, {outages} outages, {spans} spans; {books}, in the histogram {described}")
    print(f"the books {'balance' if balanced else 'do not balance'}")
    steady = True
    for name, what in KINDS.items():
        before, after = median(early, name), median(late, name)
        growth = after / before - 1
        steady = steady and growth <= MOST_GROWTH
        print(f"{what}: {before:.2f} MB after a minute, {after:.2f} MB at the end, {growth:+.2%}")
    return balanced and steady


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="2 or more (default: %(default)g)")
    minutes = parser.parse_args().minutes
    if minutes * 60 < WARM_S + 2 * WINDOW_S:
        parser.error("the second minute is what it is compared with")
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run(pathlib.Path(folder), minutes * 60) else 1


if __name__ == "__main__":
    sys.exit(main())
