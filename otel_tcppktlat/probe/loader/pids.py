"""Process and thread ids as the programs see them: the host's, whatever pid namespace this process is in.

Elsewhere than in the host's, a program runs once, in this process: it goes from an open folder of /proc to the kernel's
record of the id (struct pid), which has its number on each level.
"""

from __future__ import annotations

import ctypes as ct
import os
from typing import Any, Callable

from .btf import Btf, Field, as_flags

_HOST_INODE = 0xEFFFFFFC  # PROC_PID_INIT_INO (include/linux/proc_ns.h), of the host's pid namespace
_FIELDS: tuple[Field, ...] = (
    ("task_struct", "files"), ("files_struct", "fdt"), ("fdtable", "fd"), ("file", "f_inode"),
    ("proc_inode", "pid"), ("proc_inode", "vfs_inode"), ("pid", "numbers"), ("upid", "nr"),
)  # fmt: skip
_SOURCE = """
static inline void *pointer(void *base, long offset) {
  void *value = 0;
  bpf_probe_read_kernel(&value, sizeof(value), (char *)base + offset);
  return value;
}

int host_id(u64 *ctx) { /* (a descriptor) */
  void *files = pointer((void *)bpf_get_current_task(), OFF_task_struct_files);
  void *open = pointer(pointer(files, OFF_files_struct_fdt), OFF_fdtable_fd);
  void *inode = pointer(pointer(open, ctx[0] * sizeof(void *)), OFF_file_f_inode);
  void *pid = pointer(inode, OFF_proc_inode_pid - OFF_proc_inode_vfs_inode);
  u32 number = 0;
  bpf_probe_read_kernel(&number, sizeof(number), (char *)pid + OFF_pid_numbers + OFF_upid_nr);
  return number;
}
"""


class _RunOptions(ct.Structure):
    """struct bpf_test_run_opts of libbpf 1.x."""

    _fields_ = [
        ("sz", ct.c_size_t), ("data_in", ct.c_void_p), ("data_out", ct.c_void_p), ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32), ("ctx_in", ct.c_void_p), ("ctx_out", ct.c_void_p), ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32), ("retval", ct.c_uint32), ("repeat", ct.c_int), ("duration", ct.c_uint32),
        ("flags", ct.c_uint32), ("cpu", ct.c_uint32), ("batch_size", ct.c_uint32),
    ]  # fmt: skip


def in_host_namespace() -> bool:
    """Are the ids that this process sees the host's?"""
    return os.stat("/proc/self/ns/pid").st_ino == _HOST_INODE


class HostIds:
    """Translates. It takes BTF, as no header declares /proc's inodes."""

    def __init__(
        self, compile_program: Callable[[str, "list[str]"], Any], raw_tracepoint: int, libbpf: ct.CDLL, btf: Btf
    ):
        """Raises MissingField."""
        self._program = compile_program(_SOURCE, as_flags({field: btf.offset(*field) for field in _FIELDS}))
        self._fd = int(self._program.load_func("host_id", raw_tracepoint).fd)
        self._run = libbpf.bpf_prog_test_run_opts
        self._run.argtypes = [ct.c_int, ct.c_void_p]

    def of(self, number: int) -> int:
        """The host's id of the process or thread that /proc shows under this one. Raises OSError if there is none."""
        folder = os.open(f"/proc/{number}", os.O_PATH | os.O_DIRECTORY)
        try:
            context = ct.c_uint64(folder)
            options = _RunOptions(
                sz=ct.sizeof(_RunOptions), ctx_in=ct.addressof(context), ctx_size_in=ct.sizeof(context)
            )
            result = self._run(self._fd, ct.byref(options))
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            return int(options.retval)
        finally:
            os.close(folder)
