"""The flavours of the programs, each set of options compiled once; and the peer that sends any segment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel.traced import Load, Traced
from support.kernels import flavours
from support.tun import TunPeer


@pytest.fixture(scope="session", params=flavours())
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    loads = Load(request.param)
    yield loads
    loads.close()


@pytest.fixture
def traced(load: Load) -> Traced:
    return load()


@pytest.fixture
def peer() -> Iterator[TunPeer]:
    with TunPeer() as it:
        yield it
