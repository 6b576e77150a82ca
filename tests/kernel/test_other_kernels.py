"""The oldest and the newest kernel that the programs must run on, in virtual machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON

HERE = Path(__file__).parent
RUN_ON_KERNEL = HERE.parent / "support/run_on_kernel.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kernel", "flavours"), [("5.10", ["raw"]), ("7.x", ["typed", "raw"])])
def test_loads_and_counts_right(kernel: str, flavours: list[str]) -> None:
    command = [sys.executable, str(RUN_ON_KERNEL), "--timeout", "500", kernel, "--"]
    command += [DISTRIBUTION_PYTHON, str(HERE / "on_kernel.py"), *flavours]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    assert sum(" segments " in line for line in done.stdout.splitlines()) == len(flavours)
    assert sum(" user with " in line for line in done.stdout.splitlines()) == (3 if kernel == "5.10" else 1)


@pytest.mark.timeout(600)
def test_a_clock_that_is_set() -> None:
    """By an hour, to and fro: only a guest has a clock of its own."""
    command = [sys.executable, str(RUN_ON_KERNEL), "--timeout", "500", "--memory", "2048", "7.x", "--", sys.executable]
    command += ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=400", str(HERE / "clock_on_kernel.py")]
    done = subprocess.run(command, env={**os.environ, "TEST_PATIENCE": "10"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
