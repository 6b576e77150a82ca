"""What the plugin costs an application: requests of gunicorn with and without it, driven by wrk."""

from __future__ import annotations

import itertools
import mmap
import pathlib
import re
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import requests

from instrumentation.programs import Gunicorn, environment
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import serving_agent

from .machine import Cores, ahead_of_others, cpu_s
from .report import BenchmarkError, Goal, Report

LEAST = 0.99
CONNECTIONS = 4
SETTLES_S = 0.5  # after a switch: by then a flood has used up the spans that were saved up
WORKERS = {"sync": (), "gthread": ("--threads", "4", "--keep-alive", "60")}
APPLICATIONS = {  # of applications/switched.py
    "plain WSGI": "plain",
    "plain WSGI, with a span for each request": "traced",
    "Flask, instrumented": "with_flask",
}
BEFORE, WITH, AFTER = "before", "with", "after"  # without it, with it, without it again
PATHS = {BEFORE: "/off", WITH: "/on", AFTER: "/off"}


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    requests_per_s: float
    requests_per_cpu_s: float


@dataclass(frozen=True)
class Share:
    """Of a figure with the plugin to that without, and how much the latter differs from itself."""

    median: float
    standard_error: float
    of_itself: float

    def __str__(self) -> str:
        return f"{self.median:.1%} ± {self.standard_error:.1%}"


class Driven:
    """An application that is asked all the time; a context manager."""

    def __init__(self, application: Gunicorn, counter: mmap.mmap) -> None:
        found = re.search(r"Booting worker with pid: (\d+)", application.said)
        assert found, application.said
        self._pid, self._counter, self._port = int(found.group(1)), counter, application.port

    def __enter__(self) -> Driven:
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", "-d1h", f"http://127.0.0.1:{self._port}/"]
        self._wrk = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        self._wrk.terminate()
        self._wrk.wait()

    def measure(self, path: str, seconds: float) -> Sample:
        """Switches, and counts for so long."""
        assert requests.get(f"http://127.0.0.1:{self._port}{path}", timeout=30).ok
        time.sleep(SETTLES_S)
        before = self._answered(), time.monotonic(), cpu_s(self._pid)
        time.sleep(seconds)
        after = self._answered(), time.monotonic(), cpu_s(self._pid)
        answered, took_s, spent_s = (late - early for early, late in zip(before, after, strict=True))
        if self._wrk.poll() is not None or not answered:
            raise BenchmarkError("wrk could not drive the application")
        return Sample(answered / took_s, answered / spent_s)

    def _answered(self) -> int:
        return int.from_bytes(self._counter[:8], "little")


def _rounds(driven: Driven, rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """One process all the time, with and without the plugin in turn: two processes differ by more than it costs."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for _ in range(rounds):
        for which, path in PATHS.items():
            found[which].append(driven.measure(path, seconds))
    return found


def _share(found: dict[str, list[Sample]], figure: str) -> Share:
    """Each measurement is compared with those right before and after it, so that what changes slowly cancels out."""
    before, with_it, after = ([getattr(sample, figure) for sample in found[which]] for which in PATHS)
    shares = [2 * one / (early + late) for early, one, late in zip(before, with_it, after, strict=True)]
    of_itself = statistics.median(late / early for early, late in zip(before, after, strict=True))
    error = 1.25 * statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0  # of a median
    return Share(statistics.median(shares), error, of_itself)


@contextmanager
def _counter(path: pathlib.Path) -> Iterator[mmap.mmap]:
    """What the application counts its answers in."""
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as counter:
        yield counter


def run(folder: pathlib.Path, cores: Cores, rounds: int, seconds: float) -> Report:
    """The application has a core of its own, wrk and the agent, which runs all the time, the others.

    Spans are made and not exported, and metrics rarely: what the plugin adds is compared with little else.
    """
    for tool in ("wrk", "taskset"):
        if not shutil.which(tool):
            raise BenchmarkError(f"{tool} is missing: install it (make bench-tools)")
    all_found: dict[str, dict[str, list[Sample]]] = {}
    counting = _counter(folder / "answered")
    with cores.kept_apart(), Receiver() as receiver, serving_agent() as (_, path), counting as counter:
        variables = environment(
            path,
            receiver.http_endpoint,
            OTEL_METRIC_EXPORT_INTERVAL="60000",
            OTEL_TRACES_EXPORTER="none",
            OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="tcppktlat",
            ANSWERED=str(folder / "answered"),
        )
        for (title, application), (worker, options) in itertools.product(APPLICATIONS.items(), WORKERS.items()):
            its, pinned = folder / f"{application}-{worker}", ("taskset", "-c", str(cores.measured))
            its.mkdir()
            with (
                ahead_of_others(),
                Gunicorn(its, f"switched:{application}", worker, variables, *options, prefix=pinned) as gunicorn,
            ):
                gunicorn.wait_until_ready()
                with Driven(gunicorn, counter) as driven:
                    driven.measure(PATHS[WITH], 1.0)  # warm
                    all_found[f"{title}, {worker}"] = _rounds(driven, rounds, seconds)
    return _report(all_found, rounds, seconds)


def _report(all_found: dict[str, dict[str, list[Sample]]], rounds: int, seconds: float) -> Report:
    rows, goals = [], []
    for name, found in all_found.items():
        without = statistics.median(sample.requests_per_s for sample in [*found[BEFORE], *found[AFTER]])
        share, cpu_share = _share(found, "requests_per_s"), _share(found, "requests_per_cpu_s")
        rows.append([name, f"{without:,.0f}", f"{share}", f"{cpu_share}", f"{cpu_share.of_itself:.1%}"])
        text = f"{name}: {cpu_share} of the requests that a second of CPU makes without it (at least {LEAST:.0%})"
        goals.append(Goal(text, cpu_share.median >= LEAST))
    return Report(
        "gunicorn under opentelemetry-instrument, driven by wrk",
        ["application, worker", "requests/s without the plugin", "share with it", "per CPU time", "without, once more"],
        rows,
        goals,
        [
            f"Medians of {rounds} rounds, ± their standard errors, in one process. A round is {seconds} s without the "
            "plugin, with it, and without it once more, which the last column compares with the first, per CPU time. "
            "The agent runs all the time."
        ],
        {
            name: {which: [asdict(sample) for sample in samples] for which, samples in found.items()}
            for name, found in all_found.items()
        },
    )
