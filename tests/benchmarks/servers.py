"""Real servers under load: throughput and p99 with nothing, empty programs, ours, and tcppktlat.

The server has a core of its own; the client, the agent and its receiver share the others. Over loopback both ends are
traced, and each end's arrivals are handled on the other end's core.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.settings import DEFAULT_SPAN_RATE
from support.objects import counting_run_time

from .kernel import RECEIVE_HOOKS, Kernel, Link
from .machine import Cores, ahead_of_others, cpu_s
from .report import BenchmarkError, Goal, Report
from .subjects import (
    DISTURBED,
    EMPTY,
    FLAVOURS,
    NOTHING,
    OURS,
    PEER,
    Subject,
    loaded_subjects,
    peer_runs,
    tracing_peer,
    wait_until_quiet,
)
from .workloads import WORKLOADS, Outcome, Workload, make

LEAST = 0.97
AGAIN = f"{NOTHING}, again"
ATTEMPTS = 5  # at a slice without another tracer
RARE_ROUNDS = 5  # with tcppktlat, which takes a while to start, and with bpf_stats
EXPORT_EVERY_S = 10.0  # of the time in which the agent is attached
AGENT_SHARE = 0.2  # of the time, about: it is one of four or five


@dataclass(frozen=True)
class Hook:
    """A program under a workload: its runs in an operation, and what one takes."""

    runs: float
    ns: float


Hooks = Mapping[str, Hook]  # by tracepoint


@dataclass(frozen=True)
class Slice:
    """One measurement. `cpu_share`: of a core, that the subject's process took; `hooks` where they were counted."""

    outcome: Outcome
    cpu_share: float = 0.0
    hooks: Hooks | None = None


Slices = Mapping[str, Mapping[int, Slice]]  # by kind of subject, and round


def throughput(one: Slice) -> float | None:
    """In the workload's unit."""
    return one.outcome.per_s


def p99_ms(one: Slice) -> float | None:
    """None of a stream."""
    return one.outcome.p99_ms


Figure = Callable[[Slice], float | None]


@contextlib.contextmanager
def running(subject: Subject, kernel: Kernel) -> Iterator[list[Link]]:
    """Traces, and has the subject's process run: it is stopped while others are measured."""
    with subject.tracing(kernel) as links:
        if subject.process:
            subject.process.send_signal(signal.SIGCONT)
        try:
            yield links
        finally:
            if subject.process:
                subject.process.send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def stopped_subjects(endpoint: str, kernel: Kernel, kinds: Sequence[str] = (EMPTY, OURS)) -> Iterator[list[Subject]]:
    """Nothing, and these; their processes are stopped, so that no other subject pays for them.

    An agent exports every EXPORT_EVERY_S of the time in which it runs, and has the budget of so much time for spans.
    """
    environment = {"OTEL_METRIC_EXPORT_INTERVAL": f"{EXPORT_EVERY_S / AGENT_SHARE * 1e3:.0f}"}
    arguments = ["--span-rate", f"{DEFAULT_SPAN_RATE * AGENT_SHARE:g}"]
    with loaded_subjects(endpoint, kernel, FLAVOURS[:1], kinds, environment, arguments) as subjects:
        processes = [subject.process for subject in subjects if subject.process]
        try:
            for process in processes:
                process.send_signal(signal.SIGSTOP)
            yield subjects
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)


def measure(
    workload: Workload, subjects: Sequence[Subject], kernel: Kernel, rounds: int, seconds: int, peer: bool
) -> Slices:
    """Interleaved rounds of all subjects; nothing comes first and last. Every now and then tcppktlat, and bpf_stats."""
    found: dict[str, dict[int, Slice]] = defaultdict(dict)
    order = [*((subject.kind, subject) for subject in subjects), (AGAIN, subjects[0])]
    for number in range(rounds):
        for kind, subject in reversed(order) if number % 2 else order:
            found[kind][number] = _undisturbed(workload, subject, kernel, seconds)
        if number % max(1, rounds // RARE_ROUNDS) == 0:
            if peer:
                with tracing_peer(kernel) as links:
                    found[PEER][number] = _slice(workload, links, kernel, seconds, 0, False)
            for subject in subjects[1:]:
                found[f"{subject.kind}, counted"][number] = _undisturbed(workload, subject, kernel, seconds, True)
    return found


def _undisturbed(workload: Workload, subject: Subject, kernel: Kernel, seconds: int, counting: bool = False) -> Slice:
    for _ in range(ATTEMPTS):
        with running(subject, kernel) as links:
            pid = subject.process.pid if subject.process else 0
            found = _slice(workload, links, kernel, seconds, pid, counting)
            if not kernel.disturbed(links):
                return found
        wait_until_quiet(kernel)
    raise BenchmarkError(DISTURBED)


def _slice(workload: Workload, links: Sequence[Link], kernel: Kernel, seconds: int, pid: int, counting: bool) -> Slice:
    if counting:
        with counting_run_time():
            before = [kernel.run_time(link.program_id) for link in links]
            outcome = workload.drive(seconds)
            after = [kernel.run_time(link.program_id) for link in links]
        hooks = {
            link.tracepoint: Hook(
                (later.runs - earlier.runs) / outcome.operations, (later.ns - earlier.ns) / (later.runs - earlier.runs)
            )
            for link, earlier, later in zip(links, before, after, strict=True)
        }
        return Slice(outcome, hooks=hooks)
    began_s, before_s = time.monotonic(), cpu_s(pid) if pid else 0.0
    outcome = workload.drive(seconds)
    share = (cpu_s(pid) - before_s) / (time.monotonic() - began_s) if pid else 0.0
    return Slice(outcome, share)


def ratios(slices: Slices, figure: Figure, kind: str, base: str) -> list[float]:
    """Of one subject's figure to another's, round by round."""
    pairs = [(figure(one), figure(slices[base][number])) for number, one in slices.get(kind, {}).items()]
    return [one / other for one, other in pairs if one and other]


def noise(slices: Slices, figure: Figure) -> float:
    """By how much two slices of nothing in one round usually differ: the median."""
    return statistics.median(abs(ratio - 1) for ratio in ratios(slices, figure, AGAIN, NOTHING))


def median(slices: Slices, figure: Figure, kind: str) -> float:
    return statistics.median(value for one in slices[kind].values() if (value := figure(one)) is not None)


def _hook(slices: Slices, kind: str, tracepoint: str) -> Hook:
    hooks = [one.hooks[tracepoint] for one in slices[f"{kind}, counted"].values() if one.hooks]
    return Hook(statistics.median(hook.runs for hook in hooks), statistics.median(hook.ns for hook in hooks))


def _explain(title: str, slices: Slices) -> str:
    parts = []
    for tracepoint in RECEIVE_HOOKS:
        ours, empty = _hook(slices, OURS, tracepoint), _hook(slices, EMPTY, tracepoint)
        parts.append(f"{ours.runs:,.2f} {tracepoint} of {ours.ns:.0f} ns, {ours.ns - empty.ns:.0f} over empty's")
    share = statistics.mean(one.cpu_share for one in slices[OURS].values())
    return f"- {title}: an operation is {'; '.join(parts)}. The agent takes {share:.2%} of a core."


def report(found: Mapping[str, Slices], rounds: int, seconds: int) -> Report:
    """The table and the goals; `found` by the workloads' names."""
    rows, goals, explained = [], [], []
    for name, slices in found.items():
        kind = WORKLOADS[name]
        share = statistics.median(ratios(slices, throughput, OURS, EMPTY))
        goals.append(
            Goal(
                f"{kind.title}: {share:.1%} of the throughput under empty programs (at least {LEAST:.0%}; two slices "
                f"of nothing differ by {noise(slices, throughput):.1%})",
                share >= LEAST,
            )
        )
        cells = [f"{kind.title}, {kind.unit}", f"{median(slices, throughput, NOTHING):,.{kind.digits}f}"]
        cells += _shares(slices, throughput)
        if kind.latency:
            slower, usual = statistics.median(ratios(slices, p99_ms, OURS, EMPTY)) - 1, noise(slices, p99_ms)
            text = f"{kind.title}: p99 {slower:+.1%} to that under empty programs (two slices of nothing: {usual:.1%})"
            goals.append(Goal(text, slower <= usual))
            cells += [f"{median(slices, p99_ms, NOTHING):.2f}", *_shares(slices, p99_ms)]
        else:
            cells += ["-"] * 5
        rows.append(cells)
        explained.append(_explain(kind.title, slices))
    shares = ("noise", "empty", "ours", "tcppktlat")
    return Report(
        "Real servers",
        ["", "under nothing", *shares, "p99, ms", *shares],
        rows,
        goals,
        [
            f"Medians of {rounds} interleaved rounds of {seconds} s; shares are medians of each round's: of empty "
            "programs to nothing, of the others to empty programs. Noise: by how much two slices of nothing in a round "
            "differ. The server has a core; its client, the agent and its receiver have the others. The agent exports "
            f"every {EXPORT_EVERY_S:g} s of the time in which it is attached.",
            "",
            *explained,
        ],
        {
            name: {kind: {number: asdict(one) for number, one in its.items()} for kind, its in slices.items()}
            for name, slices in found.items()
        },
    )


def _shares(slices: Slices, figure: Figure) -> list[str]:
    compared = ((EMPTY, NOTHING), (OURS, EMPTY), (PEER, EMPTY))
    shares = [ratios(slices, figure, kind, base) for kind, base in compared]
    return [f"{noise(slices, figure):.1%}", *(f"{statistics.median(each):.1%}" if each else "-" for each in shares)]


def run(kernel: Kernel, folder: pathlib.Path, cores: Cores, names: Sequence[str], rounds: int, seconds: int) -> Report:
    """The whole part, or these workloads. Raises BenchmarkError if a program is missing."""
    peer = peer_runs()
    if not peer:
        print("tcppktlat could not be downloaded: its columns are missing", file=sys.stderr)
    workloads: dict[str, Workload] = {}
    for name in names or WORKLOADS:
        (folder / name).mkdir()
        workloads[name] = make(name, folder / name)
    found: dict[str, Slices] = {}
    wait_until_quiet(kernel)
    with cores.kept_apart(), ahead_of_others(), Receiver() as receiver:
        with stopped_subjects(receiver.grpc_endpoint, kernel) as subjects:
            for name, workload in workloads.items():
                with workload.running(cores):
                    workload.prepare()
                    found[name] = measure(workload, subjects, kernel, rounds, seconds, peer)
    return report(found, rounds, seconds)
