"""Which kind of map is best for the histograms of series: the time of an observation, and the memory."""

from __future__ import annotations

import pathlib
import statistics
import threading
from collections import defaultdict

from support.objects import counting_run_time, kernel_bytes

from .kernel import Kernel
from .machine import Cores
from .pingpong import PingPong
from .report import Report
from .subjects import Subject, detached, start_holder, wait_until_quiet

HOOK = "tcp_rcv_space_adjust"
SERIES = 10_240
KINDS = {
    "empty programs": "empty",
    "array, a copy for each CPU up to four (ours)": "maps:array_of_copies",
    "array, shared, atomic additions": "maps:shared_array",
    "per-CPU array": "maps:per_cpu_array",
    "hash, preallocated, atomic additions": "maps:hash",
    "hash, not preallocated": "maps:hash_not_preallocated",
    "per-CPU hash": "maps:per_cpu_hash",
}


def _hook_ns(subject: Subject, kernel: Kernel, pingpongs: list[PingPong], seconds: float) -> float:
    """Of a run of the hook, while all of these play."""
    with subject.tracing(kernel) as links, counting_run_time():
        (program,) = {link.program_id for link in links if link.tracepoint == HOOK}
        before = kernel.run_time(program)
        threads = [threading.Thread(target=each.round_trips, args=(seconds,)) for each in pingpongs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = kernel.run_time(program)
    return (after.ns - before.ns) / (after.runs - before.runs)


def run(kernel: Kernel, folder: pathlib.Path, cores: Cores, rounds: int, seconds: float) -> Report:
    """The whole part: on one core, and on two at once."""
    one = PingPong(folder, cores)
    (other := folder / "other").mkdir()
    two = PingPong(other, cores, cores.other)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    wait_until_quiet(kernel)
    started = (Subject(name, "typed", start_holder(programs, "typed")) for name, programs in KINDS.items())
    with detached(started, kernel) as subjects:
        memory_mb = {each.kind: kernel_bytes(each.process.pid) / 1e6 for each in subjects if each.process}
        for number in range(rounds):
            for subject in reversed(subjects) if number % 2 else subjects:
                found[subject.kind].append(
                    (
                        _hook_ns(subject, kernel, [one], seconds),
                        _hook_ns(subject, kernel, [one, two], seconds),
                    )
                )
    empty = found["empty programs"]
    rows = []
    for name, samples in found.items():
        over = [
            statistics.median(sample[which] - base[which] for sample, base in zip(samples, empty, strict=True))
            for which in (0, 1)
        ]
        rows.append([name, *(f"{ns:.0f}" for ns in over), f"{memory_mb[name]:.1f}"])
    return Report(
        "One observation, by the kind of map",
        ["map", "one core, ns over empty", "two cores, ns", "memory, MB"],
        rows,
        [],
        [
            f"Medians of {rounds} interleaved rounds; {SERIES:,} series of 32 buckets. Per-CPU maps take as much again "
            "for each possible CPU, ours for up to four."
        ],
        {name: [list(sample) for sample in samples] for name, samples in found.items()},
    )
