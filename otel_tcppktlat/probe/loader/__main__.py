"""Entry point of the loader process: one request over a socket, one answer with descriptors, and out.

The request is JSON: {"bpf": folder, "flavour": "auto"|"typed"|"raw", "defines": {name: number or null},
"bounds_ns": [...], "limits": {"series": n, "chunks": n}}. The answer is JSON, too, with the descriptors as ancillary
data: {"flavour", "refused", "offsets", "ids", "descriptors": [name...], "seconds": {...}} or {"error": line}.
"""

from __future__ import annotations

import ctypes as ct
import json
import os
import pathlib
import resource
import socket
import struct
import sys
import time
from typing import Any, Optional

from . import START
from .btf import Btf, MissingField, as_flags, offsets_from_btf, offsets_from_headers
from .capabilities import may_load
from .pids import HostIds, in_host_namespace
from .program import Kfuncs, LoadError, Programs, read_source

MAPS = (
    "books", "processes", "series", "free_series", "identities", "histograms", "interval", "barrier",
    "free_chunks", "chunks", "epochs",
    "probe_tails", "adjust_tails", "destroy_tails",  # the kernel empties a table whose last descriptor is closed
)  # fmt: skip
OLDEST_KERNEL = (5, 10)
MAP_TYPE_RINGBUF = 27
BOUNDS = 256  # struct bounds
NEVER_NS = 2**63 - 1
_BEGAN_S = time.monotonic()


class Refusal(Exception):
    """What the user has to hear, in one line."""


def _bcc() -> Any:
    """The module, or None."""
    try:
        import bcc
    except ImportError:
        return None
    return bcc if hasattr(bcc, "BPF") else None  # PyPI's bcc is another project


def _load_libbpf() -> ct.CDLL:
    try:
        return ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise Refusal(
            "libbpf.so.1 is missing: install your distribution's package (libbpf1 on Debian and Ubuntu)"
        ) from None


def _open_btf(libbpf: ct.CDLL) -> Optional[Btf]:
    try:
        return Btf(libbpf)
    except OSError:
        return None


def _kernel_version() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def _check_kernel() -> None:
    if _kernel_version() < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        raise Refusal(f"Linux {os.uname().release} is too old: it takes {oldest} or later")


def _flavours(asked: str, btf: Optional[Btf]) -> list[str]:
    """Those to try, the best first. `typed` needs BTF and socket storage in tracing programs, which came with 5.11."""
    possible = btf is not None and _kernel_version() >= (5, 11)
    if asked == "typed" and not possible:
        raise Refusal(
            "this kernel cannot have --flavour typed, which takes BTF (/sys/kernel/btf/vmlinux) and Linux 5.11: "
            "use --flavour raw"
        )
    if asked != "auto":
        return [asked]
    return ["typed", "raw"] if possible else ["raw"]


def _headers_installed() -> bool:
    build = f"/lib/modules/{os.uname().release}/build"
    return os.path.exists(f"{build}/include/linux") or os.path.exists(
        f"/lib/modules/{os.uname().release}/source/include/linux"
    )


def _memory_advice() -> str:
    """What may be the matter when there are no maps to be had: before 5.11 they count as locked memory."""
    limit_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if _kernel_version() >= (5, 11) or limit_bytes == resource.RLIM_INFINITY:
        return ""
    return (
        f"; before Linux 5.11 they count as locked memory, of which {limit_bytes} bytes are allowed: raise that limit "
        "(ulimit -l unlimited, systemd's LimitMEMLOCK=infinity), or grant CAP_SYS_RESOURCE as well"
    )


def _create_ring_buffer(libbpf: ct.CDLL, size_bytes: int) -> int:
    libbpf.bpf_map_create.argtypes = [ct.c_int, ct.c_char_p, ct.c_uint32, ct.c_uint32, ct.c_uint32, ct.c_void_p]
    fd = int(libbpf.bpf_map_create(MAP_TYPE_RINGBUF, b"events", 0, 0, size_bytes, None))
    if fd < 0:
        raise LoadError(f"cannot make the ring buffer: {os.strerror(-fd)}{_memory_advice()}")
    return fd


def _fill(libbpf: ct.CDLL, fd: int, key: Optional[bytes], value: bytes) -> None:
    result = libbpf.bpf_map_update_elem(fd, key, value, ct.c_uint64(0))
    if result < 0:
        raise LoadError(f"cannot fill a map: {os.strerror(-result)}")


def _with_host_ids(defines: dict[str, Any], host_ids: Optional[HostIds]) -> dict[str, Any]:
    """The definitions with the ids that the programs see."""
    found = dict(defines)
    for name, option in (("OWN_TGID", None), ("FILTER_PID", "-p"), ("FILTER_TID", "-t")):
        if not (number := defines.get(name)):
            continue
        if host_ids:
            try:
                found[name] = host_ids.of(number)
            except FileNotFoundError:
                raise Refusal(f"{option}: this pid namespace has no process or thread {number}") from None
        elif option:
            raise Refusal(f"without BTF (/sys/kernel/btf/vmlinux), {option} works in the host's pid namespace only")
        else:
            found[name] = 0  # nobody's
    return found


def _build(
    bcc: Any, libbpf: ct.CDLL, text: str, flags: list[str], typed_btf: Optional[Btf]
) -> tuple[Any, Programs, float]:
    """One flavour, loaded: the typed one with BTF, the raw one without. And when it was compiled.

    Raises LoadError or MissingField; the other one may do.
    """
    kfuncs = Kfuncs.of(typed_btf) if typed_btf else None
    its_flags = [f"-DTYPED={int(typed_btf is not None)}", *(kfuncs.flags() if kfuncs else [])]
    try:
        bpf = bcc.BPF(text=text, cflags=flags + its_flags)
    except Exception as error:  # bcc raises a bare Exception
        what = f"bcc could not compile the programs or make their maps: {error}{_memory_advice()}"
        raise LoadError(what) from error
    compiled = time.monotonic()
    programs = Programs(bpf, bcc.BPF.RAW_TRACEPOINT, libbpf, typed_btf, kfuncs)
    programs.load()
    return bpf, programs, compiled


def load(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Does what the request asks; raises Refusal, MissingField or LoadError."""
    _check_kernel()
    libbpf = _load_libbpf()
    if not may_load():
        raise Refusal("loading eBPF programs needs root, or CAP_BPF and CAP_PERFMON: run it with sudo")
    bcc = _bcc()
    if bcc is None:
        raise Refusal(
            "bcc is missing: install your distribution's package "
            "(python3-bpfcc on Debian and Ubuntu, python3-bcc on Fedora and RHEL)"
        )
    imported = time.monotonic()
    btf = _open_btf(libbpf)
    flavours = _flavours(request["flavour"], btf)

    def compile_program(text: str, flags: list[str]) -> Any:
        return bcc.BPF(text=text, cflags=flags)

    if btf:
        source, offsets = "BTF", offsets_from_btf(btf)
    elif _headers_installed():
        source, offsets = "kernel headers", offsets_from_headers(compile_program)
    else:
        raise Refusal(
            "this kernel has neither BTF (/sys/kernel/btf/vmlinux) nor headers "
            f"(/lib/modules/{os.uname().release}/build): install linux-headers-{os.uname().release}"
        )
    # A kernel source tree of a few tiny files: all that bcc needs to compile a program that reads fields by offset.
    os.environ["BCC_KERNEL_SOURCE"] = os.path.join(request["bpf"], "shim")
    defines, ids = request["defines"], "same"
    if not in_host_namespace():
        ids = "translated" if btf else "unknown"
        host_ids = HostIds(compile_program, bcc.BPF.RAW_TRACEPOINT, libbpf, btf) if btf else None
        defines = _with_host_ids(defines, host_ids)
    flags = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in defines.items()]
    flags += [f"-DSELF_INTERRUPTING={int(_kernel_version() < (6, 1))}", *as_flags(offsets)]
    events_fd = _create_ring_buffer(libbpf, defines["RING_BYTES"])
    flags.append(f"-DEVENTS_FD={events_fd}")
    text = read_source(pathlib.Path(request["bpf"]))
    refused = ""
    for flavour in flavours:
        try:
            bpf, programs, compiled = _build(bcc, libbpf, text, flags, btf if flavour == "typed" else None)
            break
        except (LoadError, MissingField) as error:
            if flavour == flavours[-1]:
                raise
            refused = f"the {flavour} flavour cannot be had here ({str(error).splitlines()[0]})"
    names = (*MAPS, "served") if request["defines"]["SERVE"] else MAPS
    maps = {"events": events_fd, **{name: int(bpf[name].map_fd) for name in names}}
    bounds_ns = request["bounds_ns"] + [NEVER_NS] * (BOUNDS - len(request["bounds_ns"]))
    libbpf.bpf_map_update_elem.argtypes = [ct.c_int, ct.c_char_p, ct.c_char_p, ct.c_uint64]
    _fill(libbpf, bpf["bounds"].map_fd, bytes(4), struct.pack(f"<{BOUNDS}Q", *bounds_ns))
    copies, cpus = request["defines"]["COPIES"], libbpf.libbpf_num_possible_cpus()
    per_cpu = ((cpu % copies).to_bytes(request["books_bytes"], "little") for cpu in range(cpus))  # its first field
    _fill(libbpf, maps["books"], bytes(4), b"".join(per_cpu))
    for number in range(request["first_series"], request["limits"]["series"]):
        _fill(libbpf, maps["free_series"], None, struct.pack("<I", number))
    for number in range(request["limits"]["chunks"]):
        _fill(libbpf, maps["free_chunks"], None, struct.pack("<I", number))
    links = programs.attach()
    attached = time.monotonic()
    descriptors = {
        **{f"map:{name}": fd for name, fd in maps.items()},
        **{f"program:{name}": fd for name, fd in programs.descriptors.items()},
        **{f"link:{name}": fd for name, fd in links.items()},
    }
    answer = {
        "flavour": flavour,
        "refused": refused,
        "offsets": source,
        "ids": ids,
        "descriptors": list(descriptors),
        "seconds": {"import": imported - _BEGAN_S, "compile": compiled - imported, "load": attached - compiled},
    }
    return answer, list(descriptors.values())


def main() -> None:
    """Serves the one request of the socket whose descriptor is the second argument.

    An interpreter without bcc becomes the next one that is named. The agent could not start another: by now it may be
    forbidden to.
    """
    package_parent, descriptor, *others = sys.argv[1:]
    if others and _bcc() is None:
        os.execv(others[0], [others[0], "-I", "-c", START, package_parent, descriptor, *others[1:]])
    channel = socket.socket(fileno=int(descriptor))
    with channel, channel.makefile("r") as lines:
        request = json.loads(lines.readline())
        try:
            answer, descriptors = load(request)
        except (Refusal, LoadError) as error:
            answer, descriptors = {"error": str(error)}, []
        except MissingField as missing:
            what = f"this kernel lacks {missing}, which otel-tcppktlat reads"
            answer, descriptors = {"error": f"{what}: please report it with your kernel's version"}, []
        socket.send_fds(channel, [json.dumps(answer).encode() + b"\n"], descriptors)
    os._exit(0)  # nothing of LLVM is worth an orderly end


if __name__ == "__main__":
    main()
