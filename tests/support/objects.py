"""BPF objects of a process, as the kernel tells: which it holds, and the memory of all that its programs use."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import pathlib
import struct
from collections.abc import Iterator

from otel_tcppktlat.probe.libbpf import Libbpf

_PROG_INFO_BYTES, _MOST_MAPS = 224, 64
_STATS_RUN_TIME = 0
_NR_MAP_IDS = 52  # offset in struct bpf_prog_info (include/uapi/linux/bpf.h); the address of the ids comes next


def held(pid: int, kind: str) -> set[int]:
    """Ids of the BPF links (link), programs (prog) or maps (map) that a process has open."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            lines = pathlib.Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
            found |= {int(line.split()[1]) for line in lines if line.startswith(f"{kind}_id:")}
    return found


@contextlib.contextmanager
def counting_run_time() -> Iterator[None]:
    """kernel.bpf_stats_enabled, for as long as this lasts, even if this process is killed (BPF_ENABLE_STATS)."""
    fd = Libbpf().lib.bpf_enable_stats(_STATS_RUN_TIME)
    if fd < 0:
        raise OSError(-fd, f"bpf_stats: {os.strerror(-fd)}")
    try:
        yield
    finally:
        os.close(fd)


def kernel_bytes(pid: int) -> int:
    """Memory of the programs that a process holds and of every map that they use: memlock of /proc/PID/fdinfo.

    From Linux 6.4 on that is what maps really take, but for what is allocated with sockets.
    """
    lib = Libbpf().lib
    programs = held(pid, "prog")
    maps = held(pid, "map").union(*(_maps_of(lib, program) for program in programs))
    return sum(_memlock_bytes(lib, "prog", each) for each in programs) + sum(
        _memlock_bytes(lib, "map", each) for each in maps
    )


def _maps_of(lib: ct.CDLL, program_id: int) -> set[int]:
    ids = (ct.c_uint32 * _MOST_MAPS)()
    info = ct.create_string_buffer(_PROG_INFO_BYTES)
    struct.pack_into("<IQ", info, _NR_MAP_IDS, len(ids), ct.addressof(ids))
    fd, size = int(lib.bpf_prog_get_fd_by_id(program_id)), ct.c_uint32(_PROG_INFO_BYTES)
    try:
        assert lib.bpf_obj_get_info_by_fd(fd, info, ct.byref(size)) == 0
    finally:
        os.close(fd)
    (count,) = struct.unpack_from("<I", info, _NR_MAP_IDS)
    assert count <= len(ids)
    return set(ids[:count])


def _memlock_bytes(lib: ct.CDLL, kind: str, number: int) -> int:
    fd = int(getattr(lib, f"bpf_{kind}_get_fd_by_id")(number))
    try:
        lines = pathlib.Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return sum(int(line.split()[1]) for line in lines if line.startswith("memlock:"))
