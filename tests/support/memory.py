"""What a process holds, as the kernel says."""

from __future__ import annotations

import pathlib


def resident_bytes(pid: int) -> int:
    """VmRSS of /proc/PID/status."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
