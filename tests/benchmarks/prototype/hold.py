"""Loads one set of programs, attaches it, detaches it when a line comes on stdin: hold.py SET FLAVOUR.

SET is `prototype`, `empty`, `clocks` or `maps:KIND`. FLAVOUR is `typed` (BTF-typed tracepoints, socket storage) or
`raw` (raw tracepoints, a hash). Runs under the distribution's Python, where bcc is: the standard library, bcc, and the
product's loader only.
"""

from __future__ import annotations

import ctypes as ct
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from otel_tcppktlat.probe.loader.btf import Btf

HERE = pathlib.Path(__file__).parent
SERIES = 2048
BOUNDS_NS = [step * 10**power for power in range(3, 10) for step in (1, 2, 5)] + [10**10]
FIELDS = (
    ("sk_buff", "cb"), ("tcp_sock", "rcv_nxt"), ("tcp_sock", "copied_seq"), ("sock_common", "skc_num"),
    ("sock_common", "skc_dport"), ("sock_common", "skc_family"), ("inet_connection_sock", "icsk_bind_hash"),
    ("inet_bind_bucket", "fastreuse"),
)  # fmt: skip
RECEIVE_HOOKS = {"probe": "tcp_probe", "adjust": "tcp_rcv_space_adjust", "destroy": "tcp_destroy_sock"}
PROCESS_HOOKS = {"process_exec": "sched_process_exec", "process_exit": "sched_process_exit"}

Load = Callable[[str, str], int]  # function, tracepoint -> descriptor


class _LoadOptions(ct.Structure):
    """The head of struct bpf_prog_load_opts of libbpf 1.x."""

    _fields_ = [
        ("sz", ct.c_size_t), ("attempts", ct.c_int), ("expected_attach_type", ct.c_int), ("prog_btf_fd", ct.c_uint32),
        ("prog_flags", ct.c_uint32), ("prog_ifindex", ct.c_uint32), ("kern_version", ct.c_uint32),
        ("attach_btf_id", ct.c_uint32), ("attach_prog_fd", ct.c_uint32),
    ]  # fmt: skip


def _bucket_search(low: int, high: int) -> str:
    """C that finds the bucket of `ns` by bisection."""
    if low == high:
        return f"return {low};"
    middle = (low + high) // 2
    lower, upper = _bucket_search(low, middle), _bucket_search(middle + 1, high)
    return f"if (ns <= {BOUNDS_NS[middle]}ULL) {{ {lower} }} else {{ {upper} }}"


def _typed_loader(bpf: Any, libbpf: ct.CDLL, btf: Btf) -> Load:
    """bcc knows no BTF-typed tracepoints: libbpf loads what it compiled."""
    tracing, trace_raw_tp = 26, 23
    libbpf.bpf_prog_load.argtypes = [ct.c_int, ct.c_char_p, ct.c_char_p, ct.c_char_p, ct.c_size_t, ct.c_void_p]

    def load(function: str, tracepoint: str) -> int:
        code: bytes = bpf.dump_func(function)
        options = _LoadOptions(
            sz=ct.sizeof(_LoadOptions), expected_attach_type=trace_raw_tp, attach_btf_id=btf.tracepoint_id(tracepoint)
        )
        return int(libbpf.bpf_prog_load(tracing, function.encode(), b"GPL", code, len(code) // 8, ct.byref(options)))

    return load


def _compile(name: str, typed: bool, btf: Btf) -> Any:
    from bcc import BPF

    file, _, kind = name.partition(":")
    text = (HERE / f"{file}.bpf.c").read_text().replace("BOUNDS", _bucket_search(0, len(BOUNDS_NS)))
    flags = [
        *([f"-DKIND_{kind}=1"] if kind else []),
        f"-DTYPED={int(typed)}",
        *(f"-DOFF_{struct}_{member}={btf.offset(struct, member)}" for struct, member in FIELDS),
    ]
    os.environ["BCC_KERNEL_SOURCE"] = str(HERE.parents[2] / "bpf" / "shim")
    return BPF(text=text, cflags=flags)


def hold(name: str, flavour: str) -> list[int]:
    """Loads and attaches; returns the descriptors that keep the programs attached."""
    libbpf = ct.CDLL("libbpf.so.1", use_errno=True)
    btf, typed = Btf(libbpf), flavour == "typed"
    bpf = _compile(name, typed, btf)

    def load_raw(function: str, _tracepoint: str) -> int:
        return int(bpf.load_func(function, bpf.RAW_TRACEPOINT).fd)

    load = _typed_loader(bpf, libbpf, btf) if typed else load_raw
    if name == "prototype":
        hooks = RECEIVE_HOOKS
        bpf["tails"][ct.c_int(0)] = ct.c_int(load("drain", "tcp_rcv_space_adjust"))
        for index in range(1, SERIES):
            bpf["free_series"].push(ct.c_uint32(index))
    else:
        hooks = {**RECEIVE_HOOKS, **PROCESS_HOOKS}
    links = []
    for function, tracepoint in hooks.items():
        program = load(function, tracepoint)
        links.append(int(libbpf.bpf_raw_tracepoint_open(None if typed else tracepoint.encode(), program)))
        if min(program, links[-1]) < 0:
            sys.exit(f"{function}: {os.strerror(-min(program, links[-1]))}")
    return links


def main() -> None:
    """Keeps them until the standard input ends."""
    links = hold(*sys.argv[1:3])
    if sys.stdin.readline():
        for fd in links:
            os.close(fd)
        sys.stdin.read()
    os._exit(0)  # nothing of LLVM is worth an orderly end


if __name__ == "__main__":
    main()
