"""What a process holds, as the kernel says."""

from __future__ import annotations

import pathlib


def resident_bytes(pid: int) -> int:
    """VmRSS of /proc/PID/status."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def kernel_bytes(pid: int) -> int:
    """Of its BPF maps and programs: memlock of /proc/PID/fdinfo."""
    lines = [line for info in pathlib.Path(f"/proc/{pid}/fdinfo").iterdir() for line in info.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("memlock:"))
