"""The machine's cores: one for the ping-pong or a server, the others for all else; and how much is going on there."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_TICKS = os.sysconf("SC_CLK_TCK")
_AUTOGROUP = pathlib.Path("/proc/self/autogroup")
_IDLE, _IOWAIT = 3, 4  # of a line of /proc/stat


class Cores:
    """`measured` is the ping-pong's, or a server's; `other` is one of the others, if there are any."""

    def __init__(self) -> None:
        self._all = sorted(os.sched_getaffinity(0))
        self.measured, self.other = self._all[0], self._all[-1]

    @contextmanager
    def kept_apart(self) -> Iterator[None]:
        """This process and all that it starts leave the measured core alone, if there is another one."""
        with _only_on(self._all[1:] or self._all):
            yield

    @contextmanager
    def measured_alone(self) -> Iterator[None]:
        """The opposite: what is started meanwhile has the measured core, and no other."""
        with _only_on([self.measured]):
            yield

    def busy_s(self) -> float:
        """CPU time that the other cores have spent: with hyper-threads, it slows the measured one down."""
        ticks = 0
        for line in pathlib.Path("/proc/stat").read_text().splitlines():
            name, *counts = line.split()
            if name.removeprefix("cpu") in map(str, self._all[1:]):
                ticks += sum(int(count) for at, count in enumerate(counts[:8]) if at not in (_IDLE, _IOWAIT))
        return ticks / _TICKS


@contextmanager
def ahead_of_others() -> Iterator[None]:
    """This thread and all that it starts come before what else the machine does, and share it as ever.

    The session too: with autogroups, a nice value counts within a session only (sched(7)).
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    autogroup_before = _AUTOGROUP.read_text().split()[-1] if _AUTOGROUP.exists() else ""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        if autogroup_before:
            _AUTOGROUP.write_text("-20")
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
        if autogroup_before:
            _AUTOGROUP.write_text(autogroup_before)


@contextmanager
def _only_on(cores: Sequence[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pid: int) -> float:
    """CPU time of a process in user space and in system calls, as its clock says: clock_getcpuclockid(3)."""
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e9  # CPUCLOCK_SCHED, include/linux/posix-timers.h
