"""Tempo: an exemplar in Prometheus leads to its span there. `TEMPO=path make test-tempo`; CI has no Tempo to run.

Tempo is no Go module that could be built as the others are, so pytest does not collect this file by itself.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pathlib
import subprocess
import time
from typing import Any

import requests
import yaml

from backends.chain import HISTOGRAM, SERVER
from backends.servers import Collector, Prometheus, Server, free_port, plain
from backends.traffic import LENGTH, SlowReader
from support.agent import Agent
from telemetry.told import eventually

WAITS_S = (0.03, 0.06, 0.12, 0.25)


class Tempo(Server):
    """The binary that TEMPO names, with local storage."""

    def __init__(self, folder: pathlib.Path) -> None:
        http, self.otlp = free_port(), f"127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{http}"
        configuration = {
            "target": "all",
            "server": {
                "http_listen_address": "127.0.0.1",
                "http_listen_port": http,
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
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tempo.yaml").write_text(yaml.safe_dump(configuration))
        super().__init__("tempo", [os.environ["TEMPO"], "-config.file=tempo.yaml"], f"{self.url}/ready", folder)

    def span(self, trace_id: str) -> dict[str, Any] | None:
        """The only span of a trace, with its attributes as a dictionary; None if there is no such trace."""
        answer = requests.get(f"{self.url}/api/traces/{trace_id}", headers={"Accept": "application/json"}, timeout=30)
        if answer.status_code == 404:
            return None
        assert answer.ok, answer.text
        (batch,) = answer.json()["batches"]
        ((span,),) = (scope["spans"] for scope in batch["scopeSpans"])
        return {**span, "attributes": {one["key"]: plain(one["value"]) for one in span["attributes"]}}


def test_every_slow_bucket_leads_to_its_span_in_tempo(tmp_path: pathlib.Path) -> None:
    version = subprocess.run([os.environ["TEMPO"], "-version"], capture_output=True, text=True, check=True)
    print(version.stdout.strip())
    with contextlib.ExitStack() as stack:
        tempo = stack.enter_context(Tempo(tmp_path / "tempo"))
        prometheus = stack.enter_context(Prometheus(tmp_path / "prometheus"))
        environment = {"TEMPO_OTLP": tempo.otlp, "PROMETHEUS_URL": prometheus.url}
        files = ("prometheus/otlp.yaml", "tempo.yaml")
        collector = stack.enter_context(Collector(tmp_path / "collector", *files, environment=environment))
        port, since_unix_s = free_port(), time.time()
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.otlp}", "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
        agent = stack.enter_context(Agent(tmp_path, ["-v", "-l", str(port)], variables))
        agent.wait_for_stderr("otel-tcppktlat: attached")
        reader = stack.enter_context(SlowReader(b"slow-reader", port))
        reader.wait(*WAITS_S)
        eventually(lambda: prometheus.value(f"{HISTOGRAM}_count{SERVER}") == len(WAITS_S))
        exemplars = prometheus.exemplars(f"{HISTOGRAM}_bucket{SERVER}", since_unix_s)
        assert len(exemplars) >= len(WAITS_S)
        for exemplar in sorted(exemplars, key=lambda one: float(one["value"])):
            trace_id = exemplar["labels"]["trace_id"]
            eventually(lambda trace_id=trace_id: tempo.span(trace_id))  # type: ignore[misc]
            span = tempo.span(trace_id)
            assert span
            assert base64.b64decode(span["spanId"]).hex() == exemplar["labels"]["span_id"]
            said = span["attributes"]
            assert (said["process.pid"], said["thread.name"]) == (reader.pid, "slow-reader")
            assert (said["network.local.port"], said["network.peer.port"]) == (port, reader.sender_port)
            assert said["tcppktlat.bytes"] == LENGTH
            length_ns = int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])
            assert length_ns == round(float(exemplar["value"]) * 1e9)
            print(f"exemplar {float(exemplar['value']) * 1e3:.3f} ms: trace {trace_id}: {span['name']!r}, {said}")
