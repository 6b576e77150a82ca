"""python -m tests.kernel [KERNEL...] [--quick]: the kernel tests on other kernels, in virtual machines; one table.

As root, from the repository's root. KERNEL is what tests/support/run_on_kernel.py takes, and may end in `+headers`:
without BTF then, but with the kernel's headers, against which a guest takes minutes to compile: there, and with
`--quick`, each flavour is loaded once and has to count some segments; without BTF the agent runs in a pid namespace of
its own, too. `+systemd`: what runs there is the systemd unit of collector-config/deploy. Elsewhere all of tests/kernel
and tests/agent runs, but for what is above any kernel. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass

from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]
RUN_ON_KERNEL = HERE.parent / "support/run_on_kernel.py"
KERNELS = ("5.10", "5.10+headers", "5.10+systemd", "6.1", "6.1+headers", "6.12", "6.18", "7.x", "7.x+systemd")
TESTS = ("tests/kernel", "tests/agent")
WITHOUT_BTF, UNDER_SYSTEMD = "tests/agent/namespace_without_btf.py", "tests/deploy/systemd_on_kernel.py"
NOT_IN_A_GUEST = (
    *("tests/kernel/test_headers.py", "tests/kernel/test_other_kernels.py"),  # they start guests
    "tests/kernel/test_debian13.py",  # other compilers are there below any kernel
    *("tests/kernel/test_any_content.py", "tests/agent/test_secrets.py"),  # what they test is above any kernel
)
OPTIONS = {"": [], "headers": ["--no-btf", "--headers"], "systemd": ["--systemd"]}
GUESTS, LONGEST_S, LONGEST_TEST_S, LONGEST_START_S = 2, 5400, 900, 600
LACKS = re.compile(r"^otel-tcppktlat: this kernel lacks (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    """One kernel. `passed`: tests by flavour, "" for those that have none. `failed`: lines that say what did."""

    release: str
    passed: Counter[str]
    failed: list[str]
    lacks: str


def _pytest(out: pathlib.Path, *arguments: str) -> str:
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider -o timeout={LONGEST_TEST_S}"
    return f"{command} --junitxml={out}/junit.xml {' '.join(arguments)} >{out}/pytest 2>&1"


def _words(quick: bool, way: str, out: pathlib.Path) -> str:
    """The shell's commands: the tests, then the agent for a moment, which says what it misses."""
    if way == "systemd":
        tests = _pytest(out, UNDER_SYSTEMD)
    elif way == "headers":
        tests = f"{DISTRIBUTION_PYTHON} {HERE / 'on_kernel.py'} >{out}/counted && {_pytest(out, WITHOUT_BTF)}"
    elif quick:
        tests = f"{DISTRIBUTION_PYTHON} {HERE / 'on_kernel.py'} >{out}/counted"
    else:
        tests = _pytest(out, *(f"--ignore {one}" for one in NOT_IN_A_GUEST), "-k 'not mtls'", *TESTS)
    agent = f"timeout {LONGEST_START_S} {sys.executable} -m otel_tcppktlat -v 2>{out}/agent"
    attached = f"while ! grep -q attached {out}/agent && kill -0 $!; do sleep 1; done; kill $!; wait $!"
    return f"uname -r >{out}/release; {tests}; status=$?; {agent} & {attached}; exit $status"


def _install(environment: pathlib.Path) -> pathlib.Path:
    """As the unit of collector-config/deploy says, but elsewhere."""
    subprocess.run([DISTRIBUTION_PYTHON, "-m", "venv", "--clear", environment], check=True)
    pip = environment / "bin/pip"
    subprocess.run([pip, "install", "--quiet", "--disable-pip-version-check", REPOSITORY], check=True)
    return environment


def _flavour(test: str) -> str:
    parameters = re.findall(r"\w+", test.partition("[")[2])
    return next((name for name in ("typed", "raw") if name in parameters), "")


def _run(kernel: str, quick: bool, kept: pathlib.Path) -> Result:
    out = kept / kernel
    name, _, way = kernel.partition("+")
    options = OPTIONS[way]
    environment = {**os.environ, "TEST_PATIENCE": "10"}
    if way == "systemd":
        environment["INSTALLED"] = str(_install(out / "installed"))
    command = [sys.executable, RUN_ON_KERNEL, "--smp", 1, "--memory", 2048, "--timeout", LONGEST_S, "--out", out]
    command += [*options, name, "--", "sh", "-c", _words(quick, way, out)]
    guest = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    passed: Counter[str] = Counter()
    failed: list[str] = []
    if (out / "junit.xml").exists():
        for case in ElementTree.parse(out / "junit.xml").iter("testcase"):
            test = case.get("name", "")
            if any(case.find(bad) is not None for bad in ("failure", "error")):
                failed.append(f"{case.get('classname')}::{test}")
            elif case.find("skipped") is None:
                passed[_flavour(test)] += 1
    if (out / "counted").exists():
        lines = (line.split(":")[0].split()[1] for line in (out / "counted").read_text().splitlines())
        passed.update(word if word in ("typed", "raw") else "" for word in lines)
    if guest.returncode and not failed:
        failed = (guest.stderr.strip() or f"exit status {guest.returncode}").splitlines()[-5:]
    release = (out / "release").read_text().strip() if (out / "release").exists() else "not started"
    agent = (out / "agent").read_text() if (out / "agent").exists() else ""
    if "attached" not in agent:
        failed.append("the agent did not start")
    lacks = LACKS.search(agent)
    return Result(release, passed, failed, lacks[1] if lacks else "nothing")


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"default: {' '.join(KERNELS)}")
    parser.add_argument("--quick", action="store_true", help="load each flavour, and count some segments")
    parser.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="what the guests wrote")
    arguments = parser.parse_args()
    kernels = arguments.kernels or KERNELS
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(GUESTS) as pool:
        kept = arguments.keep or pathlib.Path(scratch)
        the_longest_first = sorted(kernels, key=lambda kernel: "+" in kernel)
        guests = {kernel: pool.submit(_run, kernel, arguments.quick, kept) for kernel in the_longest_first}
        print("| kernel | release | passed, typed | raw | neither's | failed | it lacks |")
        print("|:--|:--|--:|--:|--:|--:|:--|", flush=True)
        for kernel in kernels:
            one = guests[kernel].result()
            counts = " | ".join(str(one.passed[flavour] or "-") for flavour in ("typed", "raw", ""))
            label = kernel.replace("+headers", ", no BTF, headers").replace("+", ", ")
            print(f"| {label} | {one.release} | {counts} | {len(one.failed)} | {one.lacks} |", flush=True)
    results = {kernel: guest.result() for kernel, guest in guests.items()}
    for kernel in kernels:
        for line in results[kernel].failed:
            print(f"{kernel}: {line}")
    return int(any(one.failed for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
