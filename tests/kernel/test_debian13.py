"""The programs as Debian 13's compiler makes them: other bytecode for the verifier, and the same counts."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

from kernel.test_options import EXPLICIT, EXPONENTIAL, check
from kernel.test_stalls import stalled
from kernel.traced import Traced, large_pipe, options, splice
from otel_tcppktlat.probe import launch
from otel_tcppktlat.probe.probe import ProbeOptions
from support.debian13 import python
from support.kernels import flavours
from support.tun import TunPeer

COUNT = 100_000


@pytest.fixture(autouse=True)
def loader(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    its = python(tmp_path)
    monkeypatch.setattr(launch, "DISTRIBUTION_PYTHON", str(its))
    return its


def test_it_is_the_other_bcc(loader: pathlib.Path) -> None:
    said = subprocess.run([loader, "-I", "-c", "import bcc; print(bcc.__version__)"], capture_output=True, text=True)
    assert said.stdout.startswith("0.31."), said


@pytest.mark.parametrize("flavour", flavours())
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ProbeOptions(EXPLICIT, exemplars=False, rows=True, min_us=1, serve=16), id="serving-table"),
        pytest.param(ProbeOptions(EXPONENTIAL, rows=True, key_address=True, serve=16), id="exponential-all"),
        pytest.param(ProbeOptions(EXPLICIT, exemplars=False), id="histogram-alone"),
    ],
)
def test_it_loads_and_counts(flavour: str, options: ProbeOptions) -> None:
    check(flavour, options)


@pytest.mark.parametrize("flavour", flavours())
def test_the_longest_queue(flavour: str, peer: TunPeer) -> None:
    """Read in one call: the program that drains it does so many rounds as the verifier follows."""
    traced = Traced(options(flavour))
    try:
        conversation = stalled(peer, [1] * COUNT)
        with large_pipe() as pipe:
            assert splice(conversation.socket, pipe) == COUNT
        assert traced.books == {"received": COUNT, "observed": COUNT}
        assert traced.waits().count == COUNT
    finally:
        traced.probe.close()
