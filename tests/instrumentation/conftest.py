"""An agent that serves, and the programs that an application asks, once for all tests."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator

import pytest

from instrumentation.programs import Postgres, Redis, Upstream
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import serving_agent


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
    with tempfile.TemporaryDirectory(prefix="tcppktlat-") as name, Upstream() as upstream:
        pathlib.Path(name).chmod(0o755)
        with Redis(tmp_path_factory.mktemp("redis")) as redis, Postgres(pathlib.Path(name) / "postgres") as postgres:
            yield {"REDIS_PORT": str(redis.port), "POSTGRES": postgres.address, "UPSTREAM": upstream.url}
