"""One agent that serves, for all that only ask it."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator

import pytest

from support.agent import Agent, serving_agent


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """Short enough for the path of a socket, and open to all users."""
    with tempfile.TemporaryDirectory(prefix="tcppktlat-") as name:
        pathlib.Path(name).chmod(0o755)
        yield pathlib.Path(name)


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[Agent, pathlib.Path]]:
    """The agent, and its socket."""
    with serving_agent() as it:
        yield it
