"""What the plugin costs an application: requests of gunicorn with and without it, driven by wrk."""

from __future__ import annotations

import itertools
import pathlib
import re
import shutil
import statistics
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass

import requests

from instrumentation.programs import Gunicorn, environment
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import Agent

from .machine import Cores, cpu_s
from .report import BenchmarkError, Goal, Report

LEAST = 0.99
CONNECTIONS = 4
WARM_UP_S = 3
WORKERS = {"sync": (), "gthread": ("--threads", "4", "--keep-alive", "60")}
APPLICATIONS = {  # of applications/switched.py
    "plain WSGI": "plain",
    "plain WSGI, with a span for each request": "traced",
    "Flask, instrumented": "with_flask",
}
WITHOUT, WITH = "/off", "/on"


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    requests_per_s: float
    requests_per_cpu_s: float


def _worker_pid(application: Gunicorn) -> int:
    found = re.search(r"Booting worker with pid: (\d+)", application.said)
    assert found, application.said
    return int(found.group(1))


def _measure(application: Gunicorn, seconds: int) -> Sample:
    """Drives it for so long. Raises BenchmarkError if a request failed."""
    pid = _worker_pid(application)
    before_s = cpu_s(pid)
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", f"http://127.0.0.1:{application.port}/"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent_s = cpu_s(pid) - before_s
    rate, total = re.search(r"Requests/sec:\s+([0-9.]+)", said), re.search(r"(\d+) requests in", said)
    if not rate or not total or "Non-2xx" in said:
        raise BenchmarkError(f"wrk could not drive the application: {' '.join(said.split())}")
    return Sample(float(rate.group(1)), int(total.group(1)) / spent_s)


def _switch(application: Gunicorn, path: str) -> None:
    assert requests.get(f"http://127.0.0.1:{application.port}{path}", timeout=30).ok


def _rounds(application: Gunicorn, rounds: int, seconds: int) -> dict[str, list[Sample]]:
    """One process all the time, with and without the plugin in turn: two processes differ by more than it costs."""
    found: dict[str, list[Sample]] = defaultdict(list)
    _measure(application, WARM_UP_S)
    for number in range(rounds):
        for which in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
            if which == WITH:
                _switch(application, WITH)
            found[which].append(_measure(application, seconds))
            if which == WITH:
                _switch(application, WITHOUT)
    return found


def _share(found: dict[str, list[Sample]], figure: str) -> float:
    """Of a figure, with the plugin to without it, compared round by round."""
    pairs = zip(found[WITH], found[WITHOUT], strict=True)
    return float(statistics.median(getattr(one, figure) / getattr(other, figure) for one, other in pairs))


def run(folder: pathlib.Path, cores: Cores, rounds: int, seconds: int) -> Report:
    """The application has a core of its own, wrk and the agent the others.

    Spans are made and not exported, and metrics rarely: what the plugin adds is compared with little else.
    """
    for tool in ("wrk", "taskset"):
        if not shutil.which(tool):
            raise BenchmarkError(f"{tool} is missing: install it (make bench-tools)")
    all_found: dict[str, dict[str, list[Sample]]] = {}
    with tempfile.TemporaryDirectory(prefix="tcppktlat-") as name, cores.kept_apart(), Receiver() as receiver:
        path = pathlib.Path(name) / "agent.sock"
        variables = environment(
            path,
            receiver.http_endpoint,
            OTEL_METRIC_EXPORT_INTERVAL="60000",
            OTEL_TRACES_EXPORTER="none",
            OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="tcppktlat",
        )
        with Agent(pathlib.Path(name), ["-v", "--serve", str(path)]) as agent:
            agent.wait_for_stderr("otel-tcppktlat: attached")
            for (title, application), (worker, options) in itertools.product(APPLICATIONS.items(), WORKERS.items()):
                its, pinned = folder / f"{application}-{worker}", ("taskset", "-c", str(cores.measured))
                its.mkdir()
                with Gunicorn(its, f"switched:{application}", worker, variables, *options, prefix=pinned) as gunicorn:
                    gunicorn.wait_until_ready()
                    all_found[f"{title}, {worker}"] = _rounds(gunicorn, rounds, seconds)
    return _report(all_found, rounds, seconds)


def _report(all_found: dict[str, dict[str, list[Sample]]], rounds: int, seconds: int) -> Report:
    rows, goals = [], []
    for name, found in all_found.items():
        rates = [statistics.median(sample.requests_per_s for sample in found[which]) for which in (WITHOUT, WITH)]
        share, cpu_share = _share(found, "requests_per_s"), _share(found, "requests_per_cpu_s")
        rows.append([name, *(f"{rate:,.0f}" for rate in rates), f"{share:.1%}", f"{cpu_share:.1%}"])
        text = f"{name}: {cpu_share:.1%} of the requests that a second of CPU makes without it (at least {LEAST:.0%})"
        goals.append(Goal(text, cpu_share >= LEAST))
    return Report(
        "gunicorn under opentelemetry-instrument, driven by wrk",
        ["application, worker", "requests/s without the plugin", "with it", "share", "per CPU time"],
        rows,
        goals,
        [
            f"Medians of {rounds} rounds of {seconds} s each, in one process; shares are medians of each round's. "
            "What else the machine does changes requests/s, and requests per CPU time less so."
        ],
        {
            name: {which: [asdict(sample) for sample in samples] for which, samples in found.items()}
            for name, found in all_found.items()
        },
    )
