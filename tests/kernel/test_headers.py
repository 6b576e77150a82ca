"""Offsets from kernel headers are those of the same kernel's BTF.

The headers are Debian's for 6.1, found by bcc where it always looks, in a mount namespace; the BTF is its kernel's own.
`run_on_kernel.py --no-btf --headers 6.1 -- ... on_kernel.py raw` runs the programs with them, in minutes.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON
from support.agent import REPOSITORY
from support.run_on_kernel import prepare

INSTALL = """
mount -t tmpfs none /lib/modules && mkdir /lib/modules/"$(uname -r)"
cp -P {folder}/lib/modules/{folder.name}/build {folder}/lib/modules/{folder.name}/source /lib/modules/"$(uname -r)"
mkdir -p /usr/src && mount --bind {folder}/usr/src /usr/src && exec "$@"
"""
COMPARE = """
import ctypes, os, subprocess, sys
sys.path.append(sys.argv[1])
import bcc
from otel_tcppktlat.probe.loader.btf import FIELDS, OPTIONAL, Btf, offsets_from_btf, offsets_from_headers
libbpf = ctypes.CDLL("libbpf.so.1")
libbpf.btf__parse.restype, libbpf.btf__parse.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]
btf = Btf(libbpf)
btf._btf = libbpf.btf__parse(sys.argv[2].encode(), None)
assert btf._btf
expected = offsets_from_btf(btf)
found = offsets_from_headers(lambda text, flags: bcc.BPF(text=text, cflags=flags))
assert found == expected, {field: (found.get(field), expected.get(field)) for field in FIELDS + OPTIONAL}
print(len(found))
"""


MODULES = pathlib.Path("/lib/modules")  # a machine without modules has no such folder to mount on


@pytest.fixture
def modules() -> Iterator[None]:
    made = not MODULES.exists()
    if made:
        MODULES.mkdir()
    yield
    if made:
        MODULES.rmdir()


@pytest.mark.usefixtures("modules")
def test_headers_say_what_btf_says() -> None:
    folder = prepare("6.1", headers=True)
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", INSTALL.format(folder=folder), "sh"]
        + [DISTRIBUTION_PYTHON, "-I", "-c", COMPARE, str(REPOSITORY), str(folder / "vmlinux")],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "BCC_KERNEL_SOURCE"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 28
