"""What the kernel says of BPF programs: who has attached what, and how long it ran."""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Sequence
from dataclasses import dataclass

from otel_tcppktlat.probe.libbpf import Libbpf
from support.objects import held

RECEIVE_HOOKS = ("tcp_probe", "tcp_rcv_space_adjust")
_LINK_RAW_TRACEPOINT = 1


class _LinkInfo(ct.Structure):
    """struct bpf_link_info of a raw tracepoint; BTF-typed ones are of that kind, too."""

    _fields_ = [
        ("type", ct.c_uint32), ("id", ct.c_uint32), ("prog_id", ct.c_uint32), ("unused", ct.c_uint32),
        ("tp_name", ct.c_uint64), ("tp_name_len", ct.c_uint32), ("more", ct.c_uint8 * 64),
    ]  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A program on a tracepoint."""

    link_id: int
    program_id: int
    tracepoint: str


@dataclass(frozen=True)
class RunTime:
    """ns that a program has taken, and its runs."""

    ns: int
    runs: int


class Kernel:
    """Needs root."""

    def __init__(self, alone: bool) -> None:
        """`alone`: whether it matters that nobody else traces."""
        self._alone = alone
        self._libbpf = Libbpf()
        self._lib = self._libbpf.lib

    def links(self, receive_only: bool = True) -> list[Link]:
        """Every program on a tracepoint (of the receive path), whoever attached it, oldest first."""
        found: list[Link] = []
        link_id = ct.c_uint32(0)
        while self._lib.bpf_link_get_next_id(link_id, ct.byref(link_id)) == 0:
            fd = self._lib.bpf_link_get_fd_by_id(link_id)
            if fd < 0:
                continue  # gone meanwhile
            name = ct.create_string_buffer(64)
            info = _LinkInfo(tp_name=ct.addressof(name), tp_name_len=len(name))
            size = ct.c_uint32(ct.sizeof(info))
            known = self._lib.bpf_obj_get_info_by_fd(fd, ct.byref(info), ct.byref(size)) == 0
            os.close(fd)
            if known and info.type == _LINK_RAW_TRACEPOINT:
                found.append(Link(info.id, info.prog_id, name.value.decode()))
        return [link for link in found if not receive_only or link.tracepoint in RECEIVE_HOOKS]

    def links_of(self, pid: int, receive_only: bool = True) -> list[Link]:
        """Those of them that a process holds."""
        its = held(pid, "link")
        return [link for link in self.links(receive_only) if link.link_id in its]

    def attach(self, link: Link, typed: bool) -> int:
        """Attaches a program that is loaded as `link` once did; it stays so until the descriptor is closed."""
        program = self._open_program(link.program_id)
        try:
            fd = int(self._lib.bpf_raw_tracepoint_open(None if typed else link.tracepoint.encode(), program))
        finally:
            os.close(program)
        if fd < 0:
            raise OSError(-fd, f"tracepoint {link.tracepoint}: {os.strerror(-fd)}")
        return fd

    def _open_program(self, program_id: int) -> int:
        fd = int(self._lib.bpf_prog_get_fd_by_id(program_id))
        if fd < 0:
            raise OSError(-fd, f"program {program_id}: {os.strerror(-fd)}")
        return fd

    def disturbed(self, ours: Sequence[Link] = ()) -> bool:
        """Does somebody else trace the receive path, so that round trips mean nothing?"""
        known = {link.link_id for link in ours}
        return self._alone and any(link.link_id not in known for link in self.links())

    def run_time(self, program_id: int) -> RunTime:
        """What a program has run under counting_run_time()."""
        fd = self._open_program(program_id)
        try:
            ns, runs, _ = self._libbpf.program_statistics(fd)
        finally:
            os.close(fd)
        return RunTime(ns, runs)
