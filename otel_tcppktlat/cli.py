"""The command line: tcppktlat's options, and those of the export."""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import __version__
from .agent import run
from .probe.errors import ProbeError
from .series import ATTRIBUTES, DEFAULT_ATTRIBUTES, DEFAULT_LIMIT
from .settings import (
    DEFAULT_SPAN_RATE,
    Settings,
    SettingsError,
    check_endpoint,
    check_variables,
    choose_buckets,
    drop_empty_variables,
    exporter_configured,
    parse_attributes,
    parse_boundaries,
    sdk_disabled,
)

PROGRAM = "otel-tcppktlat"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {PROGRAM} --help)")


class _Usage(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.print_usage(sys.stdout)
        parser.exit()


def _whole(lowest: int, highest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} to {highest}")
        return int(text)

    return whole


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1
    if not 0 <= rate <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of spans a second from 0 to 1000000")
    return rate


def _path(text: str) -> pathlib.Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a path")
    return pathlib.Path(text).absolute()


def _descriptors(text: str) -> tuple[int, int]:
    listener, pipe = map(int, text.split(","))
    return listener, pipe


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        add_help=False,
        description="Trace latency between TCP received pkt and picked up by userspace thread, "
        "and export it to OpenTelemetry.",
        epilog="With OTEL_EXPORTER_OTLP_ENDPOINT (or another standard variable, or --otlp) it exports; "
        "else it prints a table.",
    )
    pid, port = _whole(1, 2**22), _whole(1, 65535)
    add = parser.add_argument
    add(
        "min_us",
        nargs="?",
        type=_whole(0, 10**12),
        metavar="MIN_US",
        help="rows: only pickups that waited so many us; spans: all of them",
    )
    add("-p", "--pid", type=pid, metavar="PID", help="process to trace")
    add("-t", "--tid", type=pid, metavar="TID", help="thread to trace")
    add("-l", "--lport", type=port, metavar="LPORT", help="filter for local port")
    add("-r", "--rport", type=port, metavar="RPORT", help="filter for remote port")
    add("-T", "--timestamp", action="store_true", help="include timestamp on output")
    add("-w", "--wide", action="store_true", help="wide columns (fit IPv6 addresses), and the thread's id")
    add("-v", "--verbose", action="store_true", help="debug output on stderr")
    add("-?", "--help", action="help", help="give this help list")
    add("-h", action="help", help=argparse.SUPPRESS)  # tcppktlat takes it, too
    add("--usage", action=_Usage, nargs=0, help="give a short usage message")
    add("-V", "--version", action="version", version=f"{PROGRAM} {__version__}", help="print program version")
    group = parser.add_argument_group("export")
    add = group.add_argument
    add("--otlp", metavar="URL", help="a collector's address, short for OTEL_EXPORTER_OTLP_ENDPOINT")
    add("--table", action="store_true", help="print the table as well")
    add("--attributes", metavar="NAME,...", default=",".join(DEFAULT_ATTRIBUTES),
        help=f"the metric's attributes, of {', '.join(ATTRIBUTES)} (default %(default)s)")  # fmt: skip
    add(
        "--boundaries",
        metavar="S,...",
        help="the histogram's bucket boundaries in seconds (default 1-2-5 from 1 us to 10 s)",
    )
    add("--series-limit", type=_whole(1, 100_000), metavar="N", default=DEFAULT_LIMIT,
        help="sets of attributes; more go to the overflow series (default %(default)s)")  # fmt: skip
    add(
        "--span-rate",
        type=_rate,
        metavar="N",
        default=DEFAULT_SPAN_RATE,
        help="spans a second at most (default %(default)g)",
    )
    add(
        "--flavour",
        choices=("auto", "typed", "raw"),
        default="auto",
        help="of the BPF programs (default: what the kernel has)",
    )
    add(
        "--serve",
        type=_path,
        metavar="PATH",
        help="a Unix socket where applications get their own measurements",
    )
    add("--serve-application", type=_descriptors, metavar="SOCKET,PIPE", help=argparse.SUPPRESS)  # by the plugin
    add("--user", metavar="USER", default="nobody", help="who to run as after attaching (default %(default)s)")
    return parser


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from the command line and the standard variables. Raises SettingsError."""
    parsed = _parser().parse_args(arguments)
    drop_empty_variables()
    if parsed.otlp is not None:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = check_endpoint(parsed.otlp)
    export = not sdk_disabled() and exporter_configured()
    if export:
        check_variables()
    serves = parsed.serve is not None or parsed.serve_application is not None
    boundaries_s = parse_boundaries(parsed.boundaries) if parsed.boundaries is not None else None
    return Settings(
        pid=parsed.pid,
        tid=parsed.tid,
        lport=parsed.lport,
        rport=parsed.rport,
        min_us=parsed.min_us,
        timestamp=parsed.timestamp,
        wide=parsed.wide,
        verbose=parsed.verbose,
        export=export,
        table=parsed.table or not (export or serves),
        attributes=parse_attributes(parsed.attributes),
        buckets=choose_buckets(boundaries_s),
        series_limit=parsed.series_limit,
        span_rate=parsed.span_rate,
        flavour=parsed.flavour,
        user=parsed.user,
        serve=parsed.serve,
        serve_application=parsed.serve_application,
    )


class _OneLine(logging.Formatter):
    """One line a record: an exception is named, not traced."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += f": {record.exc_info[1]}"
        return f"{PROGRAM}: " + " ".join(text.split())


def _log_to_stderr(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("otel_tcppktlat").setLevel(logging.DEBUG if verbose else logging.WARNING)


def main() -> NoReturn:
    """Runs the command and exits: 0 when told to stop, 2 for bad input, 1 for what the machine lacks."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a standard stream was closed: no other file may get its number
    os.close(fd)
    status = _main(sys.argv[1:])
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        pass  # the reader has seen enough
    except OSError as error:
        status = status or _complain(OSError(f"standard output: {error.strerror}"), 1)
    os._exit(status)  # exporters' threads that hang on a collector must not keep the process


def _main(arguments: Sequence[str]) -> int:
    try:
        settings = parse(arguments)
        _log_to_stderr(settings.verbose)
        if settings.serve_application and os.fork():
            return 0  # no child of the application's, which may wait for all that it has
        run(settings)
    except SystemExit as done:  # --help, --usage, --version
        return int(done.code or 0)
    except SettingsError as error:
        return _complain(error, 2)
    except ProbeError as error:
        return _complain(error, 1)
    except BrokenPipeError:
        return 0  # the reader of the table has seen enough
    except OSError as error:
        return _complain(error, 1)
    return 0


def _complain(error: Exception, status: int) -> int:
    if sys.stderr:
        print(f"{PROGRAM}:", " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
