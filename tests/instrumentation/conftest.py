"""An agent that serves, and the programs that an application asks, once for all tests."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from instrumentation.programs import Postgres, Redis, Upstream
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import serving_agent
from support.installed import open_folder


@pytest.fixture(scope="session")
def serving() -> Iterator[pathlib.Path]:
    """The agent's socket."""
    with serving_agent() as (_, path):
        yield path


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as it:
        yield it


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that say where they are."""
    with open_folder() as folder, Upstream() as upstream:
        with Redis(tmp_path_factory.mktemp("redis")) as redis, Postgres(folder / "postgres") as postgres:
            yield {"REDIS_PORT": str(redis.port), "POSTGRES": postgres.address, "UPSTREAM": upstream.url}
