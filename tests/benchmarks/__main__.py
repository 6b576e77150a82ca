"""python -m tests.benchmarks [PART...] [--rounds N] [--seconds S] [--json FILE], as root from the repository's root."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # as pytest has it

from support.installed import open_folder  # noqa: E402

from . import flood, footprint, idle, instrumentation, maps, pingpong, series, servers, sockets, start  # noqa: E402
from .kernel import Kernel  # noqa: E402
from .machine import Cores  # noqa: E402
from .report import BenchmarkError, Report  # noqa: E402
from .workloads import WORKLOADS  # noqa: E402


@dataclass(frozen=True)
class Place:
    """Where a part is measured, in a folder of its own, and what its servers are."""

    kernel: Kernel
    cores: Cores
    folder: pathlib.Path
    servers: Sequence[str]


@dataclass(frozen=True)
class Part:
    """`run` gets the rounds and the seconds of each measurement; the first two are its defaults.

    0 s where they cannot be chosen.
    """

    rounds: int
    seconds: float
    run: Callable[[Place, int, float], Report]


PARTS: Mapping[str, Part] = {
    "pingpong": Part(60, 0.15, lambda at, rounds, s: pingpong.run(at.kernel, at.folder, at.cores, rounds, s)),
    "maps": Part(20, 0.1, lambda at, rounds, s: maps.run(at.kernel, at.folder, at.cores, rounds, s)),
    "agent": Part(3, 0.15, lambda at, rounds, s: footprint.run(at.kernel, at.folder, at.cores, rounds, s)),
    "idle": Part(1, 60, lambda at, _rounds, s: idle.run(at.kernel, s)),
    "series": Part(4, 0, lambda at, rounds, _s: series.run(at.kernel, rounds)),
    "sockets": Part(1, 0, lambda at, _rounds, _s: sockets.run(at.kernel)),
    "start": Part(5, 0, lambda at, rounds, _s: start.run(at.kernel, rounds)),
    "instrumentation": Part(20, 0.5, lambda at, rounds, s: instrumentation.run(at.folder, at.cores, rounds, s)),
    "servers": Part(
        16, 1, lambda at, rounds, s: servers.run(at.kernel, at.folder, at.cores, at.servers, rounds, round(s))
    ),
    "flood": Part(16, 1, lambda at, rounds, s: flood.run(at.kernel, at.folder, at.cores, rounds, round(s))),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="What tracing costs.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, help=f"interleaved (default: {_defaults(lambda part: part.rounds)})")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of each measurement, if it can be chosen ({_defaults(lambda part: part.seconds)})",
    )
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


def _defaults(of: Callable[[Part], float]) -> str:
    return ", ".join(f"{name} {of(part):g}" for name, part in PARTS.items() if of(part))


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
        with open_folder() as scratch:  # servers run as other users
            for name, part in PARTS.items():
                if name in (arguments.parts or PARTS):
                    folder = scratch / name
                    folder.mkdir()
                    place = Place(kernel, cores, folder, arguments.servers)
                    reports[name] = part.run(place, arguments.rounds or part.rounds, arguments.seconds or part.seconds)
                    print(reports[name].markdown(), flush=True)
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
