"""What the machine lacks is said in one line that names it and how to get it; exit status 1."""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence

import pytest

from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON
from otel_tcppktlat.probe.loader import START
from support.agent import REPOSITORY, Agent, Pair
from support.kernels import flavours
from telemetry import told

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


def test_typed_programs_that_the_kernel_refuses(tmp_path: pathlib.Path) -> None:
    """They call what is no kfunc; then the raw ones do it, and one line says so. Elsewhere the raw ones are all."""
    main = "from otel_tcppktlat.probe.loader.__main__ import main"
    no_kfunc = (
        "from otel_tcppktlat.probe.loader.program import Kfuncs; Kfuncs.of = classmethod(lambda cls, _: cls(1, 1))"
    )
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nshift 3\nexec {DISTRIBUTION_PYTHON} -I -c "{START.replace(main, f"{no_kfunc}; {main}")}" "$@"\n'
    )
    python.chmod(0o755)
    customized = f"import otel_tcppktlat.probe.launch as launch\nlaunch.DISTRIBUTION_PYTHON = {str(python)!r}\n"
    (tmp_path / "sitecustomize.py").write_text(customized)
    variables = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    with Receiver() as receiver, Pair() as pair:
        arguments = ["-v", "--otlp", receiver.grpc_endpoint, "-l", str(pair.port)]
        with Agent(tmp_path, arguments, variables) as agent:
            agent.wait_for_stderr("otel-tcppktlat: attached")
            pair.wait(0.002)
            told.settle(receiver)
            assert told.check_balance(receiver) == {"received": 1, "observed": 1, "queued": 0}
            assert agent.stop() == 0
        assert "flavour raw" in agent.stderr
        refused = [line for line in agent.stderr.splitlines() if "the kernel refused program" in line]
        assert len(refused) == len(flavours()) - 1
        assert all("goes on with the raw flavour" in line and "16384 sockets" in line for line in refused)
