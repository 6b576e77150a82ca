"""Compiles the programs with bcc, loads them in one of the two flavours, and attaches them.

bcc (the distribution's package) compiles, makes the maps and loads raw tracepoints. It knows no BTF-typed tracepoints:
as those, libbpf loads the same bytecode.
"""

from __future__ import annotations

import ctypes as ct
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import Any, Optional

from .btf import Btf

SOURCES = ("kernel.h", "maps.h", "queue.h", "gap.h", "series.h", "pickup.h", "tcppktlat.bpf.c")


@dataclass(frozen=True)
class Hook:
    """One program: its function, its tracepoint, its place in a table of tail calls, if any, and its flavour."""

    function: str
    tracepoint: str
    tail: Optional[tuple[str, int]] = None
    typed_only: bool = False


HOOKS = (
    Hook("probe_slow", "tcp_probe", ("probe_tails", 0)),
    Hook("reconnect", "tcp_probe", ("probe_tails", 1)),
    Hook("adjust_slow", "tcp_rcv_space_adjust", ("adjust_tails", 0)),
    Hook("drain", "tcp_rcv_space_adjust", ("adjust_tails", 1)),
    Hook("emit_events", "tcp_rcv_space_adjust", ("adjust_tails", 2)),
    Hook("renew", "tcp_rcv_space_adjust", ("adjust_tails", 3)),
    Hook("drain_elsewhere", "tcp_rcv_space_adjust", ("adjust_tails", 4), typed_only=True),
    Hook("destroy", "tcp_destroy_sock", ("destroy_tails", 0)),
    Hook("probe", "tcp_probe"),
    Hook("adjust", "tcp_rcv_space_adjust"),
    Hook("process_exec", "sched_process_exec"),
    Hook("process_exit", "sched_process_exit"),
)
ATTACHED = ("process_exec", "process_exit", "destroy", "adjust", "probe")  # arrivals last: nothing is half seen

PROG_TYPE_TRACING, ATTACH_TRACE_RAW_TP = 26, 23
OPCODE_CALL, PSEUDO_KFUNC_CALL = 0x85, 2
RDONLY_CAST = 0x7FFF0000  # a helper that no kernel has: bcc cannot call kfuncs, but it can call this


class LoadError(Exception):
    """The kernel or the compiler refused; the message says what."""


class _LoadOptions(ct.Structure):
    """struct bpf_prog_load_opts of libbpf 1.x."""

    _fields_ = [
        ("sz", ct.c_size_t), ("attempts", ct.c_int), ("expected_attach_type", ct.c_int), ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32), ("prog_ifindex", ct.c_uint32), ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32), ("attach_prog_fd", ct.c_uint32), ("attach_btf_obj_fd", ct.c_uint32),
        ("fd_array", ct.c_void_p), ("func_info", ct.c_void_p), ("func_info_cnt", ct.c_uint32),
        ("func_info_rec_size", ct.c_uint32), ("line_info", ct.c_void_p), ("line_info_cnt", ct.c_uint32),
        ("line_info_rec_size", ct.c_uint32), ("log_level", ct.c_uint32), ("log_size", ct.c_uint32),
        ("log_buf", ct.c_void_p),
    ]  # fmt: skip


def read_source(folder: pathlib.Path) -> str:
    """The programs as one text: bcc rewrites map accesses in a main file only."""
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in SOURCES)


@dataclass(frozen=True)
class Kfuncs:
    """BTF ids of the kernel's functions that the programs call (Documentation/bpf/kfuncs.rst), and of what they take.

    Looked up once: libbpf searches all of the kernel's types for each.
    """

    rdonly_cast: int
    tcp_sock: int

    @classmethod
    def of(cls, btf: Btf) -> Optional[Kfuncs]:
        """This kernel's, if it has them."""
        function, struct_type = btf.function_id("bpf_rdonly_cast"), btf.struct_id("tcp_sock")
        return cls(function, struct_type) if function is not None and struct_type is not None else None

    def flags(self) -> list[str]:
        """The compiler's."""
        return [f"-DRDONLY_CAST={RDONLY_CAST}", f"-DTCP_SOCK_ID={self.tcp_sock}"]

    def called(self, code: bytes) -> bytes:
        """Bytecode whose calls of RDONLY_CAST are calls of the kfunc."""
        changed = bytearray(code)
        for at in range(0, len(code), 8):  # struct bpf_insn: opcode, registers, offset, immediate
            if code[at] == OPCODE_CALL and code[at + 4 : at + 8] == RDONLY_CAST.to_bytes(4, "little"):
                changed[at : at + 8] = struct.pack("<BBhI", OPCODE_CALL, PSEUDO_KFUNC_CALL << 4, 0, self.rdonly_cast)
        return bytes(changed)


class Programs:
    """The loaded programs of one flavour."""

    def __init__(
        self, bpf: Any, raw_tracepoint: int, libbpf: ct.CDLL, btf: Optional[Btf], kfuncs: Optional[Kfuncs]
    ) -> None:
        """`bpf` is bcc's compiled object; with `btf` the flavour is typed, without it raw. `kfuncs`: it was told of."""
        self._bpf, self._raw_tracepoint, self._lib, self._btf = bpf, raw_tracepoint, libbpf, btf
        self._kfuncs = kfuncs
        libbpf.bpf_prog_load.argtypes = [ct.c_int, ct.c_char_p, ct.c_char_p, ct.c_char_p, ct.c_size_t, ct.c_void_p]
        libbpf.bpf_raw_tracepoint_open.argtypes = [ct.c_char_p, ct.c_int]
        self.descriptors: dict[str, int] = {}

    def load(self) -> None:
        """Loads every program and fills the tables of tail calls. Raises LoadError with the verifier's last lines."""
        for hook in HOOKS:
            if hook.typed_only and not self._btf:
                continue
            fd = self._load_typed(hook, self._btf) if self._btf else self._load_raw(hook)
            self.descriptors[hook.function] = fd
            if hook.tail:
                table, place = hook.tail
                self._bpf[table][ct.c_int(place)] = ct.c_int(fd)

    def attach(self) -> dict[str, int]:
        """Attaches, and returns the descriptors that keep each program attached."""
        tracepoints = {hook.function: hook.tracepoint for hook in HOOKS}
        links: dict[str, int] = {}
        for function in ATTACHED:
            name = tracepoints[function]
            fd = self._lib.bpf_raw_tracepoint_open(None if self._btf else name.encode(), self.descriptors[function])
            if fd < 0:
                raise LoadError(f"cannot attach to tracepoint {name}: {os.strerror(-fd)}")
            links[function] = fd
        return links

    def _load_raw(self, hook: Hook) -> int:
        try:
            return int(self._bpf.load_func(hook.function, self._raw_tracepoint).fd)
        except Exception as error:  # bcc raises a bare Exception
            raise LoadError(f"the kernel refused program {hook.function}: {error}") from error

    def _load_typed(self, hook: Hook, btf: Btf) -> int:
        code: bytes = self._bpf.dump_func(hook.function)
        if self._kfuncs:
            code = self._kfuncs.called(code)
        options = _LoadOptions(
            sz=ct.sizeof(_LoadOptions),
            expected_attach_type=ATTACH_TRACE_RAW_TP,
            attach_btf_id=btf.tracepoint_id(hook.tracepoint),
        )

        def load() -> int:
            return int(
                self._lib.bpf_prog_load(
                    PROG_TYPE_TRACING, hook.function.encode(), b"GPL", code, len(code) // 8, ct.byref(options)
                )
            )

        fd = load()
        if fd < 0:
            reason, log = os.strerror(-fd), ct.create_string_buffer(1 << 24)
            options.log_level, options.log_size, options.log_buf = 1, len(log), ct.addressof(log)
            fd = load()
            if fd < 0:
                raise LoadError(f"the kernel refused program {hook.function}: {reason}\n{log.value.decode()[-2000:]}")
        return fd
