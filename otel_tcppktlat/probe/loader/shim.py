"""A kernel source tree of a few tiny files: all that bcc needs to compile a program that reads fields by offset."""

from __future__ import annotations

import pathlib

FILES = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "include/linux/types.h": """#pragma once
typedef unsigned char __u8, u8; typedef signed char __s8, s8;
typedef unsigned short __u16, u16, __be16, __le16, __sum16; typedef short __s16, s16;
typedef unsigned int __u32, u32, __be32, __le32, __wsum; typedef int __s32, s32, pid_t;
typedef unsigned long long __u64, u64, __be64, __le64; typedef long long __s64, s64;
typedef __u64 __aligned_u64 __attribute__((aligned(8)));
typedef unsigned long size_t, uintptr_t; typedef long ssize_t; typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
""",
    "include/linux/version.h": "#define LINUX_VERSION_CODE 0\n#define KERNEL_VERSION(a,b,c) (((a)<<16)+((b)<<8)+(c))\n",
    "include/linux/log2.h": "",
    "include/linux/bpf_common.h": "",
    "include/asm/page.h": "#define PAGE_SIZE 4096\n",
    "include/uapi/linux/bpf.h": "",
    "include/uapi/linux/if_packet.h": "",
    "include/uapi/linux/if_ether.h": "",
    "include/uapi/linux/ptrace.h": "#pragma once\nstruct pt_regs { unsigned long r[21]; };\n",
}


def write_tree(root: pathlib.Path) -> None:
    """Writes the tree below `root`, which BCC_KERNEL_SOURCE then names."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
