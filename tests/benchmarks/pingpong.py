"""Ping-pong on one core: round trips under each subject, and the kernel time of its programs."""

from __future__ import annotations

import pathlib
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from otel_tcppktlat.demo.receiver import Receiver

from .kernel import RECEIVE_HOOKS, Kernel, Link
from .report import BenchmarkError, Goal, Report
from .subjects import (
    DISTURBED,
    EMPTY,
    FLAVOURS,
    NOTHING,
    OURS,
    PROTOTYPE,
    Cores,
    Subject,
    peer_runs,
    subjects,
    tracing,
)

COST_LIMIT, TRIPS_LIMIT = 1.1, 0.95
ATTEMPTS = 5  # at a window without another tracer


class PingPong:
    """The compiled program; `folder` gets it."""

    def __init__(self, folder: pathlib.Path, cores: Cores) -> None:
        """Raises BenchmarkError without a C compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            raise BenchmarkError("no C compiler for the ping-pong: install one (gcc on Debian and Ubuntu)")
        self._core, self._program = cores.measured, folder / "pingpong"
        source = pathlib.Path(__file__).with_suffix(".c")
        if subprocess.run([compiler, "-O2", "-Wall", "-o", self._program, source]).returncode:
            raise BenchmarkError("the C compiler cannot make the ping-pong: install its headers (libc6-dev on Debian)")

    def start(self, seconds: float) -> subprocess.Popen[str]:
        """Starts it; it ends by itself."""
        return subprocess.Popen([self._program, str(self._core), f"{seconds:g}"], stdout=subprocess.PIPE, text=True)

    def round_trips(self, seconds: float) -> float:
        """Round trips per second: the median of short slices, so that what interrupts it does not count."""
        process = self.start(seconds)
        output, _ = process.communicate()
        if process.returncode:
            raise BenchmarkError(f"the ping-pong ended with status {process.returncode}")
        return statistics.median(map(float, output.split()))


@dataclass
class Samples:
    """What the rounds gave for one subject, a value a round."""

    round_trips: list[float] = field(default_factory=list)
    hook_ns: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def ns(self, hook: str) -> float:
        """Time of one run of the program there, as bpf_stats counts it."""
        return statistics.median(self.hook_ns[hook])


def measure(pingpong: PingPong, kernel: Kernel, endpoint: str, rounds: int, seconds: float) -> dict[str, Samples]:
    """Interleaved rounds of all subjects, by label."""
    peer = peer_runs()
    if not peer:
        print("tcppktlat could not be downloaded: its row is missing", file=sys.stderr)
    found: dict[str, Samples] = defaultdict(Samples)
    for number in range(rounds):
        order = subjects(endpoint, peer)
        for subject in order if number % 2 == 0 else reversed(order):  # neighbours stay neighbours, drift cancels out
            _progress(f"round {number + 1} of {rounds}: {subject.label}")
            with tracing(subject, kernel) as links:
                _sample(found[subject.label], pingpong, kernel, links, seconds)
    _progress("")
    return found


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _sample(samples: Samples, pingpong: PingPong, kernel: Kernel, links: Sequence[Link], seconds: float) -> None:
    for _ in range(ATTEMPTS):
        round_trips = pingpong.round_trips(seconds)
        with kernel.counting():
            before = [kernel.run_time(link.program_id) for link in links]
            pingpong.round_trips(seconds)
            after = [kernel.run_time(link.program_id) for link in links]
        if not kernel.disturbed(links):
            break
    else:
        raise BenchmarkError(DISTURBED)
    samples.round_trips.append(round_trips)
    for link, earlier, later in zip(links, before, after, strict=True):
        samples.hook_ns[link.tracepoint].append((later.ns - earlier.ns) / (later.runs - earlier.runs))


def _share(samples: Samples, base: Samples) -> float:
    """Round trips as a share of those of `base`, compared round by round."""
    return statistics.median(each / other for each, other in zip(samples.round_trips, base.round_trips, strict=True))


def _over(samples: Samples, base: Samples) -> float:
    """ns of both hooks above `base`, compared round by round."""
    return statistics.median(sum(each) - sum(other) for each, other in zip(_both(samples), _both(base), strict=True))


def _both(samples: Samples) -> Iterable[tuple[float, ...]]:
    return zip(*(samples.hook_ns[hook] for hook in RECEIVE_HOOKS), strict=True)


def report(found: dict[str, Samples]) -> Report:
    """The table and the goals."""
    rows, figures = [], {}
    for label, samples in found.items():
        kind, _, flavour = label.partition(", ")
        base = found.get(Subject(EMPTY, flavour or FLAVOURS[0]).label)
        assert base is not None
        traced = kind != NOTHING
        trips = statistics.median(samples.round_trips)
        share = _share(samples, base if traced and kind != EMPTY else found[NOTHING])
        over = _over(samples, base) if traced else 0.0
        rows.append(
            [
                label,
                *(f"{samples.ns(hook):,.0f}" if traced else "-" for hook in RECEIVE_HOOKS),
                f"{over:,.0f}" if traced and kind != EMPTY else "-",
                f"{trips:,.0f}",
                f"{share:.1%}" if traced and kind != EMPTY else "-",
            ]
        )
        figures[label] = {
            "round_trips_per_s": samples.round_trips,
            "hook_ns": dict(samples.hook_ns),
            "share_of_empty": share if traced and kind != EMPTY else None,
            "over_empty_ns": over,
        }
    goals = []
    for flavour in FLAVOURS:
        ours, prototype, empty = (found[Subject(kind, flavour).label] for kind in (OURS, PROTOTYPE, EMPTY))
        cost, reference = _over(ours, empty), _over(prototype, empty)
        share = _share(ours, empty)
        goals += [
            Goal(
                f"{flavour}: {cost:.0f} ns over the empty programs, {cost / reference:.2f} times the prototype's "
                f"{reference:.0f} (at most {COST_LIMIT:g})",
                cost <= COST_LIMIT * reference,
            ),
            Goal(
                f"{flavour}: {share:.1%} of the round trips that the empty programs leave (at least {TRIPS_LIMIT:.0%})",
                share >= TRIPS_LIMIT,
            ),
        ]
    rounds = len(found[NOTHING].round_trips)
    return Report(
        "64-byte ping-pong over loopback, both ends on one core",
        ["under", *(f"{hook}, ns" for hook in RECEIVE_HOOKS), "both over empty, ns", "round trips/s", "of empty's"],
        rows,
        goals,
        [f"Medians of {rounds} interleaved rounds. ns: a run of the program as bpf_stats counts it, clock included."],
        figures,
    )


def run(kernel: Kernel, folder: pathlib.Path, cores: Cores, rounds: int, seconds: float) -> Report:
    """The whole part."""
    pingpong = PingPong(folder, cores)
    with cores.kept_apart(), Receiver() as receiver:
        return report(measure(pingpong, kernel, receiver.grpc_endpoint, rounds, seconds))
