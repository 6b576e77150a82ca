"""Writes no file from now on: Landlock (Documentation/userspace-api/landlock.rst) where the kernel has it."""

from __future__ import annotations

import ctypes as ct
import os

NEEDED_ABI = 3  # Linux 6.2; what is older does not restrict truncate(2)
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same on all machines
_CREATE_RULESET_VERSION = 1
# LANDLOCK_ACCESS_FS_*: by ABI, the rights to be had from then on that change files, or start one as a program.
_EXECUTE, _WRITE_FILE, _REFER, _TRUNCATE = 1 << 0, 1 << 1, 1 << 13, 1 << 14
_REMOVE_AND_MAKE = 0b1111_1111 << 4 | 1 << 12
_RIGHTS = {1: _EXECUTE | _WRITE_FILE | _REMOVE_AND_MAKE, 2: _REFER, 3: _TRUNCATE}

_syscall = ct.CDLL(None, use_errno=True).syscall


class _RulesetAttributes(ct.Structure):
    """The first member of struct landlock_ruleset_attr: the kernel takes it as the whole."""

    _fields_ = [("handled_access_fs", ct.c_uint64)]


def forbid_writing() -> int:
    """Neither the calling thread nor those that it starts may open a file to write, make, remove or execute one.

    What is open stays open. It takes no_new_privs. Returns the kernel's Landlock ABI, which was made use of; 0 if there
    is none, or if it is forbidden.
    """
    abi = max(0, _syscall(_CREATE_RULESET, None, ct.c_size_t(0), _CREATE_RULESET_VERSION))
    if not abi:
        return 0
    attributes = _RulesetAttributes(sum(rights for since, rights in _RIGHTS.items() if since <= abi))
    ruleset = _syscall(_CREATE_RULESET, ct.byref(attributes), ct.c_size_t(ct.sizeof(attributes)), 0)
    if ruleset < 0:
        return 0
    try:
        return 0 if _syscall(_RESTRICT_SELF, ruleset, 0) else abi
    finally:
        os.close(ruleset)
