"""python -m tests.benchmarks [PART...] [--rounds N] [--seconds S] [--json FILE], as root from the repository's root."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import warnings

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # as pytest has it

from . import flood, footprint, idle, instrumentation, pingpong, series, servers, sockets, start  # noqa: E402
from .kernel import Kernel  # noqa: E402
from .machine import Cores  # noqa: E402
from .report import BenchmarkError, Report  # noqa: E402
from .workloads import WORKLOADS  # noqa: E402

PARTS = ("pingpong", "agent", "idle", "series", "sockets", "start", "instrumentation", "servers", "flood")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="What tracing costs.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="interleaved (pingpong 60, agent 3, series 4, start 5, servers and flood 16, else 12)",
    )
    parser.add_argument("--seconds", type=float, default=0.15, help="of each measurement (default: %(default)s)")
    parser.add_argument(
        "--servers", type=lambda text: text.split(","), default=[], help=f"of {','.join(WORKLOADS)} (default: all)"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="every single figure")
    parser.add_argument("--not-alone", action="store_true", help="do not wait for other tracers to end")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()!r}")
    if unknown := set(arguments.servers) - set(WORKLOADS):
        parser.error(f"there is no server {unknown.pop()!r}")
    return arguments


def main() -> int:
    """Prints a table for each part; returns the exit status, 0 whether or not the goals are reached."""
    arguments = _arguments()
    if os.geteuid() != 0:
        print("benchmarks load eBPF programs: run them as root", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    cores, kernel = Cores(), Kernel(alone=not arguments.not_alone)
    reports: dict[str, Report] = {}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for part in arguments.parts or PARTS:
                if part == "pingpong":
                    report = pingpong.run(kernel, folder, cores, arguments.rounds or 60, arguments.seconds)
                elif part == "agent":
                    report = footprint.run(kernel, folder, cores, arguments.rounds or 3, arguments.seconds)
                elif part == "idle":
                    report = idle.run(kernel)
                elif part == "series":
                    report = series.run(kernel, arguments.rounds or 4)
                elif part == "sockets":
                    report = sockets.run(kernel)
                elif part == "instrumentation":
                    report = instrumentation.run(
                        folder, cores, arguments.rounds or 12, max(2, round(arguments.seconds))
                    )
                elif part == "servers":
                    rounds, seconds = arguments.rounds or 16, max(1, round(arguments.seconds))
                    report = servers.run(kernel, folder, cores, arguments.servers, rounds, seconds)
                elif part == "flood":
                    rounds, seconds = arguments.rounds or 16, max(1, round(arguments.seconds))
                    report = flood.run(kernel, folder, cores, rounds, seconds)
                else:
                    report = start.run(kernel, arguments.rounds or 5)
                reports[part] = report
                print(report.markdown(), flush=True)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        arguments.json.write_text(json.dumps({name: each.as_json() for name, each in reports.items()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
