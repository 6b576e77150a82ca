"""One agent that serves, for all that only ask it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from support.agent import Agent, serving_agent
from support.installed import open_folder


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """Short enough for the path of a socket, and open to all users."""
    with open_folder() as opened:
        yield opened


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[Agent, pathlib.Path]]:
    """The agent, and its socket."""
    with serving_agent() as it:
        yield it
