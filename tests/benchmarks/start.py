"""From exec to attached: the agent, and what bcc alone needs for the same programs."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from typing import Any
from unittest import mock

from otel_tcppktlat.agent import _probe_options
from otel_tcppktlat.cli import parse
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON, bpf_folder
from otel_tcppktlat.probe.probe import Probe

from .kernel import Kernel
from .report import BenchmarkError, Goal, Report
from .subjects import FLAVOURS, REPOSITORY, START_LIMIT_S, start_agent, stop, wait_until_attached, wait_until_quiet

PHASES = ("import", "compile", "load")  # of the loader
RATIO_LIMIT = 1.2
Seconds = dict[str, float]
_POLL_S = 0.002
_PHASE = re.compile(r"(\w+) ([0-9.]+) s")


def _request(flavour: str, endpoint: str) -> dict[str, Any]:
    """What the agent asks its loader for."""
    with mock.patch.dict(os.environ), mock.patch("otel_tcppktlat.probe.probe.Loader") as loader:
        Probe(_probe_options(parse(["--flavour", flavour, "--otlp", endpoint])))
    return {"bpf": str(bpf_folder()), **loader.call_args.args[0]}


def _time_bcc(request: dict[str, Any]) -> Seconds:
    began_s = time.monotonic()
    done = subprocess.run(
        [DISTRIBUTION_PYTHON, "-m", "tests.benchmarks.bcc_alone"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
    )
    total_s = time.monotonic() - began_s
    if done.returncode:
        raise BenchmarkError(f"bcc could not load the programs: status {done.returncode}")
    phases: Seconds = json.loads(done.stdout)
    return {"interpreters": total_s - sum(phases.values()), **phases, "agent": 0.0, "total": total_s}


def _time_agent(flavour: str, endpoint: str, kernel: Kernel) -> Seconds:
    with tempfile.TemporaryFile() as log:
        began_s = time.monotonic()
        agent = start_agent(flavour, endpoint, verbose=True, stderr=log)
        try:
            wait_until_attached(agent, kernel, _POLL_S)
            attached_s = time.monotonic() - began_s
            text = ""
            while "attached" not in text:
                if agent.poll() is not None or time.monotonic() - began_s > START_LIMIT_S:
                    raise BenchmarkError(f"the agent did not start: {text}")
                time.sleep(_POLL_S)
                log.seek(0)
                text = log.read().decode()
            total_s = time.monotonic() - began_s
        finally:
            stop(agent)
    line = next(line for line in text.splitlines() if "compile" in line)
    phases = {name: float(spent) for name, spent in _PHASE.findall(line) if name in PHASES}
    return {
        "interpreters": attached_s - sum(phases.values()),
        **phases,
        "agent": total_s - attached_s,
        "total": total_s,
    }


def run(kernel: Kernel, rounds: int) -> Report:
    """The whole part."""
    found: dict[str, list[Seconds]] = defaultdict(list)
    with Receiver() as receiver:
        endpoint = receiver.grpc_endpoint
        requests = {flavour: _request(flavour, endpoint) for flavour in FLAVOURS}
        for _ in range(rounds):
            for flavour in FLAVOURS:
                wait_until_quiet(kernel)
                found[f"otel-tcppktlat, {flavour}"].append(_time_agent(flavour, endpoint, kernel))
                wait_until_quiet(kernel)
                found[f"bcc alone, {flavour}"].append(_time_bcc(requests[flavour]))
    columns = ("interpreters", *PHASES, "agent", "total")
    medians = {
        label: {column: statistics.median(each[column] for each in rounds_of) for column in columns}
        for label, rounds_of in found.items()
    }
    goals = []
    for flavour in FLAVOURS:
        ours, alone = medians[f"otel-tcppktlat, {flavour}"]["total"], medians[f"bcc alone, {flavour}"]["total"]
        goals.append(
            Goal(
                f"{flavour}: attached and exporting after {ours:.2f} s, {ours / alone:.2f} times what bcc alone needs "
                f"(at most {RATIO_LIMIT:g})",
                ours <= RATIO_LIMIT * alone,
            )
        )
    return Report(
        "From exec to attached",
        ["seconds", "interpreters", "import bcc", "compile", "load, attach", "agent", "in all"],
        [[label, *(f"{values[column]:.2f}" for column in columns)] for label, values in medians.items()],
        goals,
        [
            f"Medians of {rounds} interleaved rounds. Interpreters: what Python needs until the loader runs. Agent: "
            "from attached to ready, privileges dropped and the exporters started."
        ],
        dict(found),
    )
