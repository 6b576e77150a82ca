"""What the machine lacks is said in one line that names it and how to get it; exit status 1."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence

import pytest

from support.agent import REPOSITORY

NO_BCC = "mount -t tmpfs none /usr/lib/python3/dist-packages"
NO_BTF = "mount -t tmpfs none /sys/kernel/btf"
NO_HEADERS = "if [ -d /lib/modules ]; then mount -t tmpfs none /lib/modules; fi"


def refused(before: Sequence[str], *arguments: str, prefix: Sequence[str] = ()) -> str:
    """Runs the agent in a mount namespace changed by `before`; returns its only line."""
    command = [*prefix, sys.executable, "-m", "otel_tcppktlat", *arguments]
    script = " && ".join([*before, 'exec "$@"'])
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command],
        env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
    )
    assert done.stdout == "" and done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("otel-tcppktlat: ")
    return line


def test_no_bcc() -> None:
    assert "python3-bpfcc" in refused([NO_BCC])


@pytest.mark.parametrize("flavour", ["auto", "raw"])
def test_neither_btf_nor_headers(flavour: str) -> None:
    line = refused([NO_BTF, NO_HEADERS], "--flavour", flavour)
    assert "/sys/kernel/btf/vmlinux" in line and f"linux-headers-{platform.release()}" in line


def test_no_btf_for_the_typed_flavour() -> None:
    line = refused([NO_BTF, NO_HEADERS], "--flavour", "typed")
    assert "--flavour typed" in line and "--flavour raw" in line


def test_a_kernel_that_is_too_old() -> None:
    """The kernel itself tells this process that it is a Linux 2.6 (personality UNAME26)."""
    line = refused([], prefix=["setarch", platform.machine(), "--uname-2.6"])
    assert "2.6." in line and "5.10" in line


def test_no_privilege() -> None:
    """Root without its capabilities is nobody to the kernel."""
    line = refused([], prefix=["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"])
    assert "CAP_BPF" in line and "sudo" in line
