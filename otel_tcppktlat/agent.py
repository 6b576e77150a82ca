"""The agent: starts the probe, gives up its privileges, and runs until it is told to stop."""

from __future__ import annotations

import logging
import os
import pwd
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import landlock, memory, privileges
from .probe.launch import Loaded
from .probe.layout import Event
from .probe.probe import Probe, ProbeOptions
from .serving import MOST_CLIENTS
from .settings import Settings, SettingsError, spans_exported
from .table import Table

if TYPE_CHECKING:
    from .serving.broker import Broker

TABLE_POLL_S = 0.1
POLL_S = 1.0
TIDY_S = 10.0
LONGEST_INTERVAL_S = 60.0  # the kernel's counts of an interval have 32 bits
LAST_ROWS_S = 0.5
SHUTDOWN_S = 4.0
SERVED_TOGETHER_S = 0.001  # late pickups that come so close are told at once

_log = logging.getLogger(__name__)


def _kernel_series(limit: int) -> int:
    """Series that the kernel's map holds: more than the attribute sets, as several may become one."""
    return max(2048, (limit // 1024 + 1) * 1024)


def _probe_options(settings: Settings) -> ProbeOptions:
    return ProbeOptions(
        bounds_ns=settings.buckets.bounds_ns,
        flavour=settings.flavour,
        pid=settings.pid,
        tid=settings.tid,
        lport=settings.lport,
        rport=settings.rport,
        min_us=settings.min_us,
        rows=settings.table or (settings.min_us is not None and spans_exported()),
        exemplars=settings.export,
        key_address="server.address" in settings.attributes,
        own_tgid=int(os.readlink("/proc/self")),  # of the pid namespace that /proc is of, as are -p and -t
        max_series=_kernel_series(settings.series_limit),
        serve=MOST_CLIENTS if settings.serves else 0,
        only_served=settings.serve_application is not None,
    )


class _StopSignals:
    """SIGTERM, SIGINT and SIGHUP as a descriptor that becomes readable.

    It has no configuration to read again: SIGHUP means that its terminal is gone, unless nohup(1) has it ignored.
    """

    def __init__(self) -> None:
        self.fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)


def run(settings: Settings) -> None:
    """Runs until told to stop. Raises ProbeError, SettingsError or OSError, none of which needs a traceback."""
    memory.one_heap()
    account = _account(settings.user)
    broker = _broker(settings)
    table = _table(settings) if settings.table else None
    listeners: list[Callable[[Event], None]] = [table.row] if table else []

    def on_row(event: Event) -> None:
        for listener in listeners:
            listener(event)

    ends = [_StopSignals().fd]
    if settings.serve_application:
        ends.append(settings.serve_application[1])
    if os.geteuid() != 0:
        privileges.hand_down()  # to the loader
    probe = Probe(
        _probe_options(settings), on_row, broker.on_served if broker else None, broker.on_harvest if broker else None
    )
    try:
        privileges.no_new_privileges()
        landlock_abi = landlock.forbid_writing()  # here, as making the exporters starts threads
        pipeline = None
        if settings.export:
            from . import preload  # noqa: F401
            from .telemetry.pipeline import Pipeline  # while the compiler works

            if os.geteuid() == 0:  # the files are root's to read, and setresuid() reaches every thread
                pipeline = Pipeline(settings)
        if {*ends} & {*select.select([*ends, probe.starting_fd()], [], [])[0]}:
            probe.cancel()
            return
        loaded = probe.open()
    except BaseException:
        probe.cancel()
        raise
    kept_cap_bpf = privileges.drop(account)
    if settings.export:
        if pipeline is None:
            pipeline = Pipeline(settings)
        pipeline.start(probe)
        if settings.min_us is not None:
            listeners.append(pipeline.on_row)
    harvest = pipeline.collector.sweep if pipeline else probe.harvest
    if broker:
        broker.start(probe, harvest)
    memory.settle()
    _describe(settings, loaded, kept_cap_bpf, landlock_abi)
    if table:
        table.header()
    swept_s = tidied_s = time.monotonic()
    wakers: list[int] = [*ends, probe.epoll_fd(), *([broker.fileno()] if broker else [])]
    longest_s = TABLE_POLL_S if table else POLL_S
    try:
        while True:
            ready = select.select(wakers, [], [], broker.timeout_s(longest_s) if broker else longest_s)[0]
            if {*ends} & {*ready}:
                break
            now_s = time.monotonic()
            if broker and probe.epoll_fd() in ready:
                time.sleep(SERVED_TOGETHER_S)
            probe.poll()
            if table:
                table.flush()
            elif pipeline and settings.min_us is not None:
                pipeline.after_rows()
            if broker:
                broker.flush()
                broker.turn()
            if now_s - swept_s >= POLL_S and (probe.gone() or now_s - swept_s >= LONGEST_INTERVAL_S):
                swept_s = now_s
                harvest()
            if now_s - tidied_s >= TIDY_S:
                tidied_s = now_s
                memory.tidy()
        probe.poll()
        if table:
            table.flush(LAST_ROWS_S)
    finally:
        if broker:
            broker.close()
        if pipeline:
            pipeline.shutdown(SHUTDOWN_S)


def _broker(settings: Settings) -> Broker | None:
    """Listens, while the agent may. It may not remove the socket when it ends: whoever serves next does."""
    if not settings.serves:
        return None
    from .serving.broker import Broker  # most agents do without
    from .serving.listening import check_pid_namespace, listen

    check_pid_namespace()
    if settings.serve_application:
        return Broker(socket.socket(fileno=settings.serve_application[0]), settings.buckets)
    assert settings.serve
    return Broker(listen(settings.serve), settings.buckets)


def _table(settings: Settings) -> Table:
    if sys.stdout is None:
        raise OSError("standard output is closed: there is nowhere to print the table")
    return Table(sys.stdout.fileno(), settings.timestamp, settings.wide, sys.stdout.encoding, beside=settings.export)


def _account(user: str) -> pwd.struct_passwd:
    try:
        found = privileges.account(user)
    except LookupError as error:
        raise SettingsError(f"--user: {error}") from None
    if found.pw_uid == 0:
        raise SettingsError("--user: root would keep its privileges: name another user")
    return found


def _describe(settings: Settings, loaded: Loaded, kept_cap_bpf: bool, landlock_abi: int) -> None:
    seconds = ", ".join(f"{name} {spent:.2f} s" for name, spent in loaded.seconds.items())
    _log.debug("flavour %s, offsets from %s; %s", loaded.flavour, loaded.offsets, seconds)
    _log.debug("maps, programs, links: %s", ", ".join(loaded.descriptors))
    _log.debug("running as uid %d with %s", os.getuid(), "CAP_BPF alone" if kept_cap_bpf else "no capability")
    if loaded.refused:
        _log.warning(
            "%s: it goes on with the raw flavour, which takes longer and tracks %d sockets; please report it with your "
            "kernel's version",
            loaded.refused,
            ProbeOptions.max_sockets,
        )
    if loaded.ids != "same":
        _log.warning(
            "in a pid namespace of its own: process and thread ids are shown as the host's, which ps, -p and -t do not "
            "know here%s; in the host's (hostPID) they agree",
            "" if loaded.ids == "translated" else ", and its own connections count as traffic",
        )
    no_typed = settings.flavour == "auto" and loaded.flavour == "raw" and not loaded.refused
    lacks = [
        what
        for lacking, what in (
            (loaded.offsets != "BTF", "BTF"),
            (no_typed, "what the typed flavour takes (BTF, Linux 5.11)"),
            (kept_cap_bpf, "map look-ups without CAP_BPF (Linux 5.19)"),
            (landlock_abi < landlock.NEEDED_ABI, "a Landlock that forbids all writing to files (Linux 6.2)"),
        )
        if lacking
    ]
    if lacks:
        _log.debug("this kernel lacks %s", ", ".join(lacks))
    _log.info("attached")
