"""The systemd unit under systemd. For a guest alone: `python -m tests.kernel` runs it there.

INSTALLED names a virtual environment, made with the distribution's Python, that the package is installed in.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from deploy.test_deploy import UNIT, unit
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.privileges import CAP_BPF
from support.agent import LONG_S, Pair
from support.kernels import kernel_version
from telemetry import told

SERVICE, ATTACHED = "otel-tcppktlat", "otel-tcppktlat: attached"
OPT, SETTINGS = pathlib.Path("/opt/otel-tcppktlat"), pathlib.Path("/etc/otel-tcppktlat.env")


def systemctl(*words: str) -> str:
    """What it prints."""
    return subprocess.run(["systemctl", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def shown(name: str) -> str:
    """A property of the service."""
    return systemctl("show", "--value", f"--property={name}", SERVICE).strip()


def journal() -> str:
    """What the service has said since it was started last."""
    command = ["journalctl", "--no-pager", "--output=cat", f"_SYSTEMD_INVOCATION_ID={shown('InvocationID')}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def eventually(condition: Callable[[], object]) -> None:
    """Waits for what must come. Asked once a second: a guest takes half as long to ask."""
    end_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end_s, systemctl("status", SERVICE) + journal()
        time.sleep(1)


def start(arguments: str, **variables: str) -> None:
    """Starts the service with these options, and returns at once."""
    SETTINGS.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    folder = pathlib.Path(f"/run/systemd/system/{SERVICE}.service.d")
    folder.mkdir(exist_ok=True)
    (program,) = unit()["ExecStart"]
    (folder / "arguments.conf").write_text(f"[Service]\nExecStart=\nExecStart={program} {arguments}\n")
    systemctl("daemon-reload")
    systemctl("start", "--no-block", SERVICE)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """As the unit says, but for pip, which has been here before."""
    assert socket.gethostname() == "guest" and pathlib.Path("/proc/1/comm").read_text() == "systemd\n"
    shutil.copytree(os.environ["INSTALLED"], OPT, symlinks=True)
    script = OPT / "bin/otel-tcppktlat"
    script.write_text(re.sub(r"#!.*", f"#!{OPT}/bin/python3", script.read_text(), count=1))
    shutil.copy(UNIT, "/etc/systemd/system")
    SETTINGS.touch(mode=0o600)


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    systemctl("stop", SERVICE)
    systemctl("reset-failed")


def test_it_starts_exports_and_stops() -> None:
    """As a user of its own, without capability; what was counted since the last export leaves at the end."""
    with Receiver() as receiver, Pair() as pair:
        start(f"-v -l {pair.port} 0", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.grpc_endpoint)
        eventually(lambda: ATTACHED in journal())
        for _ in range(3):
            pair.wait(0.02)
        assert shown("ActiveState") == "active" and shown("NRestarts") == "0"
        lines = pathlib.Path(f"/proc/{shown('MainPID')}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        (user,) = {int(one) for one in status["Uid"]}
        assert 61184 <= user <= 65519  # of systemd's dynamic ones
        assert status["NoNewPrivs"] == ["1"] and status["Seccomp"] == ["2"]
        kept = 1 << CAP_BPF if kernel_version() < (5, 19) else 0
        assert [int(status[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, kept, kept, 0]
        assert not receiver.requests
        began_s = time.monotonic()
        systemctl("stop", SERVICE)
        assert time.monotonic() - began_s < float(unit()["TimeoutStopSec"][0])
        assert shown("Result") == "success" and shown("ExecMainStatus") == "0"
        assert told.check_balance(receiver) == {"received": 3, "observed": 3, "queued": 0}
        assert len(receiver.spans()) == 3


def test_a_wrong_option_is_not_tried_again() -> None:
    start("--flavour none")
    eventually(lambda: shown("ActiveState") == "failed")
    assert (shown("ExecMainStatus"), shown("NRestarts")) == ("2", "0")
    assert "--flavour" in journal()


def test_it_is_started_again() -> None:
    """After its death, five seconds later."""
    start("-v -l 1")
    eventually(lambda: ATTACHED in journal())
    before = shown("MainPID")
    systemctl("kill", "--signal=SIGKILL", SERVICE)
    eventually(lambda: shown("NRestarts") == "1" and ATTACHED in journal())
    assert shown("MainPID") not in (before, "0")
