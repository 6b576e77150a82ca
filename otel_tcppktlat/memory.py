"""Keeps the memory of a process that runs for months where it is after a minute."""

from __future__ import annotations

import ctypes
import gc

_M_ARENA_MAX = -8  # <malloc.h> of glibc


def one_heap() -> None:
    """Has all threads share malloc's first arena; call it before there are others.

    Otherwise glibc gives threads arenas of their own, up to eight a CPU. gRPC's and the exporters' come and go, and
    each arena keeps the most that any of them has needed. Another C library has no such function, or no need for it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)


def settle() -> None:
    """What is there now is there to stay: from here on gc.collect() looks at what came later, in less than 1 ms."""
    gc.collect()
    gc.freeze()
