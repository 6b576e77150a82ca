"""What a kernel can run. Standard library only."""

from __future__ import annotations

import os
import re


def kernel_version() -> tuple[int, ...]:
    """Major and minor."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def flavours() -> list[str]:
    """The flavours of the programs that this kernel can run: the typed one takes BTF and Linux 5.11."""
    return ["typed", "raw"] if kernel_version() >= (5, 11) and os.path.exists("/sys/kernel/btf/vmlinux") else ["raw"]
