"""Tempo: the tests of test_routes.py that look spans up, with Tempo in Jaeger's place. `TEMPO=path make test-tempo`.

Tempo is no Go module that could be built as the others are, so CI has none, and pytest does not collect this file by
itself.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

import pytest
import yaml

from backends.chain import STRAIGHT
from backends.servers import TraceStore, free_port
from backends.test_routes import (  # noqa: F401
    Told,
    test_every_slow_bucket_leads_to_its_span,
    told,
)
from telemetry.told import eventually


class Tempo(TraceStore):
    """The binary that TEMPO names, with local storage."""

    files = ("tempo.yaml",)
    path, resource_spans = "api/traces", ("batches",)

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__("tempo", folder)

    def _prepare(self, folder: pathlib.Path) -> tuple[Sequence[str], str]:
        configuration = {
            "target": "all",
            "server": {
                "http_listen_address": "127.0.0.1",
                "http_listen_port": self._http,
                "grpc_listen_address": "127.0.0.1",
                "grpc_listen_port": free_port(),
            },
            "distributor": {"receivers": {"otlp": {"protocols": {"grpc": {"endpoint": self.otlp}}}}},
            "memberlist": {"bind_addr": ["127.0.0.1"], "bind_port": free_port()},
            "storage": {
                "trace": {
                    "backend": "local",
                    "local": {"path": str(folder / "blocks")},
                    "wal": {"path": str(folder / "wal")},
                }
            },
            "usage_report": {"reporting_enabled": False},
        }
        (folder / "tempo.yaml").write_text(yaml.safe_dump(configuration))
        return [str(pathlib.Path(os.environ["TEMPO"]).resolve()), "-config.file=tempo.yaml"], "ready"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceStore]:
    version = subprocess.run([os.environ["TEMPO"], "-version"], capture_output=True, text=True, check=True)
    print(version.stdout.strip())
    with Tempo(tmp_path_factory.mktemp("tempo")) as it:
        yield it


def test_what_it_looks_like(told: Told, store: TraceStore) -> None:  # noqa: F811
    """For the README."""
    it = told.chains[STRAIGHT, "explicit"]
    eventually(lambda: it.exemplars(told.since_unix_s))
    exemplar = max(it.exemplars(told.since_unix_s), key=lambda one: float(one["value"]))
    trace_id = exemplar["labels"]["trace_id"]
    eventually(lambda: store.span(trace_id))
    span = store.span(trace_id)
    assert span
    print(f"exemplar {float(exemplar['value']) * 1e3:.3f} ms: trace {trace_id}: {span['name']!r}, {span['attributes']}")
