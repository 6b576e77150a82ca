"""Keeps the memory of a process that runs for months where it is after a minute."""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)
_M_ARENA_MAX = -8  # <malloc.h> of glibc; another C library has no mallopt() and malloc_trim(), or no need for them


def one_heap() -> None:
    """Has all threads share malloc's first arena; call it before there are others.

    Otherwise glibc gives threads arenas of their own, up to eight a CPU. gRPC's and the exporters' come and go, and
    each arena keeps the most that any of them has needed.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def settle() -> None:
    """What is there now is there to stay: from here on tidy() looks at what came later, in a few ms."""
    gc.collect()
    gc.freeze()


def tidy() -> None:
    """Gives back what exports have left: garbage, and free memory between what is in use."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
