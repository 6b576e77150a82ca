"""Ping-pong on one core: round trips under each subject, and the kernel time of its programs."""

from __future__ import annotations

import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from otel_tcppktlat.demo.receiver import Receiver
from support.objects import counting_run_time

from .kernel import RECEIVE_HOOKS, Kernel, Link
from .machine import Cores
from .report import BenchmarkError, Goal, Report
from .subjects import (
    CLOCKS,
    DISTURBED,
    EMPTY,
    FLAVOURS,
    NOTHING,
    OURS,
    PEER,
    PROTOTYPE,
    label,
    loaded_subjects,
    peer_runs,
    tracing_peer,
    wait_until_quiet,
)

COST_LIMIT, TRIPS_LIMIT = 0.8, 0.95
ATTEMPTS = 5  # at a window without another tracer
PEER_ROUNDS = 5


class PingPong:
    """The compiled program; `folder` gets it."""

    def __init__(self, folder: pathlib.Path, cores: Cores, core: int | None = None) -> None:
        """`core`: another one than the measured. Raises BenchmarkError without a C compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            raise BenchmarkError("no C compiler for the ping-pong: install one (gcc on Debian and Ubuntu)")
        self.cores, self._program = cores, folder / "pingpong"
        self._core = cores.measured if core is None else core
        source = pathlib.Path(__file__).with_suffix(".c")
        if subprocess.run([compiler, "-O2", "-Wall", "-o", self._program, source]).returncode:
            raise BenchmarkError("the C compiler cannot make the ping-pong: install its headers (libc6-dev on Debian)")

    def round_trips(self, seconds: float) -> float:
        """Round trips per second: the median of short slices, so that what interrupts it does not count."""
        return statistics.median(map(float, self._run(f"{seconds:g}").split()))

    def exactly(self, port: int, trips: int) -> None:
        """So many round trips, with the server on this port."""
        self._run(str(port), str(trips))

    def _run(self, *arguments: str) -> str:
        command = [str(self._program), str(self._core), *arguments]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            raise BenchmarkError(f"the ping-pong ended with status {process.returncode}")
        return process.stdout


@dataclass(frozen=True)
class Sample:
    """One subject in one round. `others`: what other processes used meanwhile, in cores."""

    round_trips: float
    hook_ns: dict[str, float]
    others: float

    @property
    def both_ns(self) -> float:
        """Time of a run of each hook."""
        return sum(self.hook_ns.values())


Samples = dict[int, Sample]  # by round


def measure(pingpong: PingPong, kernel: Kernel, endpoint: str, rounds: int, seconds: float) -> dict[str, Samples]:
    """Interleaved rounds of all subjects, by label."""
    peer = peer_runs()
    if not peer:
        print("tcppktlat could not be downloaded: its row is missing", file=sys.stderr)
    found: dict[str, Samples] = defaultdict(dict)
    wait_until_quiet(kernel)
    with loaded_subjects(endpoint, kernel) as subjects:
        for number in range(rounds):
            _progress(f"round {number + 1} of {rounds}")
            for subject in reversed(subjects) if number % 2 else subjects:  # neighbours remain, drift cancels out
                with subject.tracing(kernel) as links:
                    found[subject.label][number] = _sample(pingpong, kernel, links, seconds)
            if peer and number % max(1, rounds // PEER_ROUNDS) == 0:
                with tracing_peer(kernel) as links:
                    found[PEER][number] = _sample(pingpong, kernel, links, seconds)
    _progress("")
    return found


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _sample(pingpong: PingPong, kernel: Kernel, links: Sequence[Link], seconds: float) -> Sample:
    for _ in range(ATTEMPTS):
        began_s, busy_s = time.monotonic(), pingpong.cores.busy_s()
        round_trips = pingpong.round_trips(seconds)
        with counting_run_time():
            before = [kernel.run_time(link.program_id) for link in links]
            pingpong.round_trips(seconds)
            after = [kernel.run_time(link.program_id) for link in links]
        others = (pingpong.cores.busy_s() - busy_s) / (time.monotonic() - began_s)
        if not kernel.disturbed(links):
            break
        wait_until_quiet(kernel, links)
    else:
        raise BenchmarkError(DISTURBED)
    hook_ns = {
        link.tracepoint: (later.ns - earlier.ns) / (later.runs - earlier.runs)
        for link, earlier, later in zip(links, before, after, strict=True)
    }
    return Sample(round_trips, hook_ns, others)


def _share(samples: Samples, base: Samples) -> float:
    """Round trips as a share of those of `base`, compared round by round."""
    return statistics.median(sample.round_trips / base[number].round_trips for number, sample in samples.items())


def _over(samples: Samples, base: Samples) -> float:
    """ns of both hooks above `base`, compared round by round."""
    return statistics.median(sample.both_ns - base[number].both_ns for number, sample in samples.items())


def _round_trips(samples: Samples) -> float:
    return statistics.median(sample.round_trips for sample in samples.values())


def report(found: dict[str, Samples]) -> Report:
    """The table and the goals."""
    rows: list[list[str]] = []
    for name, samples in found.items():
        kind, _, flavour = name.partition(", ")
        base = found[label(EMPTY, flavour or FLAVOURS[0])]
        hooks = [
            statistics.median(sample.hook_ns.get(hook, 0) for sample in samples.values()) for hook in RECEIVE_HOOKS
        ]
        compared = kind not in (NOTHING, EMPTY)
        rows.append(
            [
                name,
                *(f"{ns:,.0f}" if kind != NOTHING else "-" for ns in hooks),
                f"{_over(samples, base):,.0f}" if compared else "-",
                f"{_round_trips(samples):,.0f}",
                f"{_share(samples, base):.1%}" if compared else "-",
            ]
        )
    goals = []
    for flavour in FLAVOURS:
        ours, prototype, empty = (found[label(kind, flavour)] for kind in (OURS, PROTOTYPE, EMPTY))
        cost, reference = _over(ours, empty), _over(prototype, empty)
        clocks = _over(found[label(CLOCKS, flavour)], empty)
        share, trip_ns = _share(ours, empty), 1e9 / _round_trips(empty)
        goals += [
            Goal(
                f"{flavour}: {cost:.0f} ns over the empty programs, {cost / reference:.2f} times the prototype's "
                f"{reference:.0f} (at most {COST_LIMIT:g}; the clock alone makes {clocks / reference:.2f})",
                cost <= COST_LIMIT * reference,
            ),
            Goal(
                f"{flavour}: {share:.1%} of the round trips that the empty programs leave (at least {TRIPS_LIMIT:.0%}; "
                f"kernel time alone makes {trip_ns / (trip_ns + 2 * cost):.1%})",
                share >= TRIPS_LIMIT,
            ),
        ]
    rounds = len(found[NOTHING])
    others = statistics.mean(
        sample.others for name, samples in found.items() if name != PEER for sample in samples.values()
    )
    return Report(
        "64-byte ping-pong over loopback, both ends on one core",
        ["under", *(f"{hook}, ns" for hook in RECEIVE_HOOKS), "both over empty, ns", "round trips/s", "of empty's"],
        rows,
        goals,
        [
            f"Medians of {rounds} interleaved rounds. ns: a run of the program as bpf_stats counts it, clock included. "
            f"The other cores were busy {others:.0%} of the time."
        ],
        {name: {number: asdict(sample) for number, sample in samples.items()} for name, samples in found.items()},
    )


def run(kernel: Kernel, folder: pathlib.Path, cores: Cores, rounds: int, seconds: float) -> Report:
    """The whole part."""
    pingpong = PingPong(folder, cores)
    with cores.kept_apart(), Receiver() as receiver:
        return report(measure(pingpong, kernel, receiver.grpc_endpoint, rounds, seconds))
