"""The back ends are built before the first test that needs them, if `make backends` has not done it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from backends import build
from backends.chain import KINDS, ROUTES
from backends.servers import Jaeger, TraceStore


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds all of them, if a test of this folder is to run; here, because no test's timeout counts it."""
    here = pathlib.Path(__file__).parent
    if not session.config.option.collectonly and any(item.path.is_relative_to(here) for item in session.items):
        for program in build.ALL:
            build.build(program)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceStore]:
    """Where spans go to: Jaeger; tempo.py has another."""
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as it:
        yield it


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)
