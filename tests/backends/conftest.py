"""The back ends are built before the first test that needs them, if `make backends` has not done it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends import build
from backends.servers import Jaeger


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    """All of them, at once: servers.py starts them from the cache."""
    for program in build.ALL:
        build.build(program)


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as it:
        yield it
