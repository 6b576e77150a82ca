"""The back ends are built before the first test that needs them, if `make backends` has not done it."""

from __future__ import annotations

import pytest

from backends import build


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    """All of them, at once: servers.py starts them from the cache."""
    for program in build.ALL:
        build.build(program)
