"""Offsets of kernel structures: from BTF where the kernel has it, else from installed kernel headers."""

from __future__ import annotations

import ctypes as ct
import os
from typing import Any, Callable, Iterable, Mapping, Optional

Field = tuple[str, str]
Compile = Callable[[str, "list[str]"], Any]  # source and flags to a bcc.BPF

VMLINUX_BTF = "/sys/kernel/btf/vmlinux"
KIND_STRUCT, KIND_UNION, KIND_TYPEDEF, KIND_FUNC = 4, 5, 8, 12

# The fields that the programs read, as (struct, member); OPTIONAL ones depend on the kernel's configuration.
FIELDS: tuple[Field, ...] = (
    ("sk_buff", "cb"), ("tcp_skb_cb", "seq"), ("tcp_skb_cb", "end_seq"), ("tcp_skb_cb", "tcp_flags"),
    ("tcp_sock", "rcv_nxt"), ("tcp_sock", "copied_seq"), ("tcp_sock", "rcv_ooopack"), ("tcp_sock", "bytes_received"),
    ("sock", "sk_shutdown"), ("inet_sock", "inet_sport"), ("sock_common", "skc_dport"), ("sock_common", "skc_family"),
    ("sock_common", "skc_daddr"), ("sock_common", "skc_rcv_saddr"),
    ("inet_connection_sock", "icsk_bind_hash"), ("inet_bind_bucket", "fastreuse"),
    ("task_struct", "tgid"), ("task_struct", "group_leader"), ("task_struct", "start_time"),
    ("task_struct", "self_exec_id"), ("task_struct", "signal"), ("task_struct", "mm"), ("task_struct", "comm"),
    ("signal_struct", "live"), ("mm_struct", "exe_file"), ("file", "f_path"), ("path", "dentry"),
    ("dentry", "d_name"), ("qstr", "name"),
    ("task_struct", "thread_pid"), ("pid", "level"), ("pid", "numbers"), ("upid", "nr"), ("bpf_array", "value"),
)  # fmt: skip
OPTIONAL: tuple[Field, ...] = (
    ("sock_common", "skc_v6_daddr"),
    ("sock_common", "skc_v6_rcv_saddr"),
    ("tcp_sock", "is_mptcp"),
)

HEADERS = [
    "linux/bpf.h",
    "linux/sched.h",
    "linux/sched/signal.h",
    "linux/mm_types.h",
    "linux/fs.h",
    "linux/dcache.h",
    "linux/path.h",
    "linux/pid.h",
    "linux/skbuff.h",
    "linux/tcp.h",
    "net/sock.h",
    "net/tcp.h",
    "net/inet_connection_sock.h",
    "net/inet_hashtables.h",
]


class MissingField(LookupError):
    """The running kernel has no such structure or member."""


class _Type(ct.Structure):
    _fields_ = [("name_off", ct.c_uint32), ("info", ct.c_uint32), ("size", ct.c_uint32)]


class _Member(ct.Structure):
    _fields_ = [("name_off", ct.c_uint32), ("type", ct.c_uint32), ("offset", ct.c_uint32)]


class Btf:
    """The kernel's own type information (Documentation/bpf/btf.rst), read through libbpf."""

    def __init__(self, libbpf: ct.CDLL) -> None:
        """Raises OSError where the kernel has no BTF that can be read."""
        self._lib = libbpf
        libbpf.btf__load_vmlinux_btf.restype = ct.c_void_p
        libbpf.btf__find_by_name_kind.argtypes = [ct.c_void_p, ct.c_char_p, ct.c_uint32]
        libbpf.btf__type_by_id.argtypes = [ct.c_void_p, ct.c_uint32]
        libbpf.btf__type_by_id.restype = ct.c_void_p
        libbpf.btf__name_by_offset.argtypes = [ct.c_void_p, ct.c_uint32]
        libbpf.btf__name_by_offset.restype = ct.c_char_p
        if not os.path.exists(VMLINUX_BTF):
            raise OSError(f"no {VMLINUX_BTF}")
        self._btf = libbpf.btf__load_vmlinux_btf()
        if not self._btf:
            raise OSError(f"{VMLINUX_BTF} cannot be read")

    def tracepoint_id(self, name: str) -> int:
        """The BTF id that a program of the tracepoint is attached to; MissingField if the kernel has no such one."""
        number = self._id(f"btf_trace_{name}", KIND_TYPEDEF)
        if number is None:
            raise MissingField(f"tracepoint {name}")
        return number

    def struct_id(self, name: str) -> Optional[int]:
        """The BTF id of a structure, or None."""
        return self._id(name, KIND_STRUCT)

    def function_id(self, name: str) -> Optional[int]:
        """The BTF id of a kernel function, or None."""
        return self._id(name, KIND_FUNC)

    def _id(self, name: str, kind: int) -> Optional[int]:
        number = int(self._lib.btf__find_by_name_kind(self._btf, name.encode(), kind))
        return number if number >= 0 else None

    def offset(self, struct: str, member: str) -> int:
        """Byte offset of a member, also of one inside an anonymous struct or union; MissingField if there is none."""
        type_id = self.struct_id(struct)
        bits = self._find(type_id, member.encode(), 0) if type_id is not None else None
        if bits is None:
            raise MissingField(f"struct {struct}.{member}")
        return bits // 8

    def _find(self, type_id: int, member: bytes, base_bits: int) -> Optional[int]:
        address = self._lib.btf__type_by_id(self._btf, type_id)
        head = _Type.from_address(address)
        if (head.info >> 24) & 0x1F not in (KIND_STRUCT, KIND_UNION):
            return None
        packed = bool(head.info >> 31)  # then the offset's upper byte is a bit field's size
        members = (_Member * (head.info & 0xFFFF)).from_address(address + ct.sizeof(_Type))
        for each in members:
            at_bits: int = base_bits + (each.offset & 0xFFFFFF if packed else each.offset)
            name: bytes = self._lib.btf__name_by_offset(self._btf, each.name_off)
            if name == member:
                return at_bits
            if not name:
                found = self._find(each.type, member, at_bits)
                if found is not None:
                    return found
        return None


def offsets_from_btf(btf: Btf) -> dict[Field, int]:
    """Every field's byte offset. Raises MissingField for one that the programs cannot do without."""
    found = {field: btf.offset(*field) for field in FIELDS}
    for field in OPTIONAL:
        try:
            found[field] = btf.offset(*field)
        except MissingField:
            continue
    return found


def offsets_from_headers(compile_program: Compile) -> dict[Field, int]:
    """The same from kernel headers: each offset is the constant that a compiled function returns."""

    def source(fields: Iterable[Field]) -> str:
        functions = (
            f"int offset_{n}(void *ctx) {{ return __builtin_offsetof(struct {struct}, {member}); }}\n"
            for n, (struct, member) in enumerate(fields)
        )
        return "".join(f"#include <{name}>\n" for name in HEADERS) + "".join(functions)

    def compiled(fields: tuple[Field, ...]) -> dict[Field, int]:
        program = compile_program(source(fields), [])
        mov_r0_imm = 0xB7
        values: dict[Field, int] = {}
        for n, field in enumerate(fields):
            code: bytes = program.dump_func(f"offset_{n}")
            if code[0] != mov_r0_imm:
                raise MissingField(f"struct {field[0]}.{field[1]}")
            values[field] = int.from_bytes(code[4:8], "little")
        return values

    try:
        return compiled(FIELDS + OPTIONAL)
    except Exception:  # bcc raises a bare Exception when a program does not compile: not all fields are here
        found = compiled(FIELDS)
    for field in OPTIONAL:
        try:
            found |= compiled((field,))
        except Exception:
            continue
    return found


def as_flags(offsets: Mapping[Field, int]) -> list[str]:
    """The compiler's flags that give the programs these offsets."""
    return [f"-DOFF_{struct}_{member}={offset}" for (struct, member), offset in offsets.items()]
