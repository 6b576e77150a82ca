"""What it takes to load eBPF programs."""

from __future__ import annotations

CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39  # include/uapi/linux/capability.h


def may_load() -> bool:
    """Has this process the capabilities, in effect? Raises OSError without a /proc."""
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    return bool(effective >> CAP_SYS_ADMIN & 1 or effective >> CAP_BPF & effective >> CAP_PERFMON & 1)
