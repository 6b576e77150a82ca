"""Giving up privilege: another user, no capabilities, and no way to get any back."""

from __future__ import annotations

import ctypes as ct
import os
import pathlib
import pwd

CAP_SYS_RESOURCE, CAP_PERFMON, CAP_BPF = 24, 38, 39
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 38, 47, 2

_libc = ct.CDLL(None, use_errno=True)


class _Header(ct.Structure):
    _fields_ = [("version", ct.c_uint32), ("pid", ct.c_int)]


class _Data(ct.Structure):
    _fields_ = [("effective", ct.c_uint32), ("permitted", ct.c_uint32), ("inheritable", ct.c_uint32)]


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ct.get_errno(), f"{what}: {os.strerror(ct.get_errno())}")


def set_capabilities(*capabilities: int) -> None:
    """Keeps only these capabilities (numbers of include/uapi/linux/capability.h) of the calling thread."""
    data = (_Data * 2)()
    for capability in capabilities:
        word, bit = divmod(capability, 32)
        data[word].permitted |= 1 << bit
        data[word].effective |= 1 << bit
    _check(_libc.capset(ct.byref(_Header(_CAPABILITY_VERSION_3, 0)), data), "capset")


def hand_down() -> None:
    """Lets programs that this thread starts have what loading takes, where it comes from this one's file."""
    data = (_Data * 2)()
    _check(_libc.capget(ct.byref(_Header(_CAPABILITY_VERSION_3, 0)), data), "capget")
    for capability in (CAP_SYS_RESOURCE, CAP_PERFMON, CAP_BPF):
        word, bit = divmod(capability, 32)
        data[word].inheritable |= data[word].permitted & 1 << bit
    _check(_libc.capset(ct.byref(_Header(_CAPABILITY_VERSION_3, 0)), data), "capset")
    for capability in (CAP_SYS_RESOURCE, CAP_PERFMON, CAP_BPF):
        word, bit = divmod(capability, 32)
        if data[word].inheritable & data[word].permitted & 1 << bit:
            _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0), "prctl")


def account(user: str) -> pwd.struct_passwd:
    """The account by name or number; LookupError if there is none."""
    try:
        return pwd.getpwuid(int(user)) if user.isascii() and user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise LookupError(f"there is no user {user!r}") from None


def no_new_privileges() -> None:
    """No program that this one may ever start can gain any privilege."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def needs_cap_bpf() -> bool:
    """Does reading a map take CAP_BPF here? Before Linux 5.19 it does where unprivileged BPF is off."""
    major, minor = (int("".join(c for c in part if c.isdigit())) for part in os.uname().release.split(".")[:2])
    if (major, minor) >= (5, 19):
        return False
    try:
        return pathlib.Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text().strip() != "0"
    except OSError:
        return True


def drop(user: pwd.struct_passwd) -> bool:
    """Becomes `user` (if it is root) without capabilities; returns whether it had to keep CAP_BPF. Raises OSError."""
    keep = needs_cap_bpf()
    if os.geteuid() == 0:
        if keep:
            _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")
        try:
            os.setgroups([])
            os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
            os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)  # glibc does so in every thread
        except PermissionError:
            raise OSError(f"root without CAP_SETUID and CAP_SETGID cannot become {user.pw_name}: grant both") from None
        if keep:
            _check(_libc.prctl(_PR_SET_KEEPCAPS, 0, 0, 0, 0), "prctl")
    set_capabilities(*([CAP_BPF] if keep else []))
    return keep
