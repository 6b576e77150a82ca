"""Exporters by their names: console, a third party's, none; and the traffic of the agent's own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from otel_tcppktlat.demo.receiver import Receiver
from support.agent import REPOSITORY, Agent
from telemetry import told
from telemetry.told import DURATION, RECEIVED, SETTLED, Listener, deliver

_THIRD_PARTY = '''
import json, os, sys
from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, MetricExportResult
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

class Metrics(MetricExporter):
    """Prefers deltas of histograms, and refuses every other of them."""

    def __init__(self):
        super().__init__(preferred_temporality={Histogram: AggregationTemporality.DELTA})
        self.calls = 0

    def export(self, metrics_data, timeout_millis=10_000, **kwargs):
        for resource_metrics in metrics_data.resource_metrics:
            for scope_metrics in resource_metrics.scope_metrics:
                for metric in scope_metrics.metrics:
                    if metric.name == "tcppktlat.receive_queue.duration":
                        self.calls += 1
                        if self.calls % 2:
                            return MetricExportResult.FAILURE
                        print(json.dumps([metric.data.aggregation_temporality.name, metric.data.data_points[0].count]))
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **kwargs):
        print(json.dumps("metrics shut down"))

class Spans(SpanExporter):
    def export(self, spans):
        print(json.dumps([span.name for span in spans]))
        return SpanExportResult.SUCCESS

    def shutdown(self):
        print(json.dumps("spans shut down"))
'''


@pytest.fixture
def third_party(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with an installed package that has two exporters."""
    folder = tmp_path / "site"
    metadata = folder / "third_party-1.dist-info"
    metadata.mkdir(parents=True)
    (folder / "third_party.py").write_text(_THIRD_PARTY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[opentelemetry_metrics_exporter]\ntheirs = third_party:Metrics\nbroken = third_party:Nothing\n"
        "[opentelemetry_traces_exporter]\ntheirs = third_party:Spans\n"
    )
    return folder


def test_a_third_partys(third_party: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With its preferences; refused deltas come again; the end reaches both."""
    environment = {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{third_party}",
        "OTEL_METRICS_EXPORTER": "theirs",
        "OTEL_TRACES_EXPORTER": "theirs",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
    }
    with Listener() as listener, Agent(tmp_path, ["-v", "-l", str(listener.port), "0"], environment) as agent:
        agent.wait_for_stderr("attached")
        sender, reader = listener.connect()
        for count in range(1, 4):
            for _ in range(5):
                deliver(sender, reader)
            told.eventually(lambda count=count: agent.stdout.count("DELTA") >= count)  # type: ignore[misc]
        assert agent.stop() == 0
        said = [json.loads(line) for line in agent.stdout.splitlines()]
    assert sum(one[1] for one in said if one[0] == "DELTA") == 15
    assert sum(len(one) for one in said if one[0] == "tcp receive") > 0
    assert "metrics shut down" in said and "spans shut down" in said


def test_one_that_cannot_be_made(third_party: pathlib.Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{third_party}",
        "OTEL_METRICS_EXPORTER": "broken",
    }
    done = subprocess.run(
        [sys.executable, "-m", "otel_tcppktlat"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "broken" in done.stderr


def test_console(tmp_path: pathlib.Path) -> None:
    """The SDK's own, on standard output; its ids are those of the spans."""
    environment = {"OTEL_METRICS_EXPORTER": "console", "OTEL_TRACES_EXPORTER": "console"}
    environment |= {"OTEL_METRIC_EXPORT_INTERVAL": "60000"}
    with Listener() as listener, Agent(tmp_path, ["-v", "-l", str(listener.port)], environment) as agent:
        agent.wait_for_stderr("attached")
        deliver(*listener.connect())
        assert agent.stop() == 0
        text, decoder, said = agent.stdout.strip(), json.JSONDecoder(), []
        while text:
            one, end = decoder.raw_decode(text)
            said.append(one)
            text = text[end:].strip()
    (metrics,) = (one for one in said if "resource_metrics" in one)
    (span,) = (one for one in said if one.get("name") == "tcp receive")
    points = [
        point
        for scope in metrics["resource_metrics"][0]["scope_metrics"]
        for metric in scope["metrics"]
        if metric["name"] == DURATION
        for point in metric["data"]["data_points"]
    ]
    (point,) = points
    assert point["count"] == 1
    assert f"0x{point['exemplars'][0]['span_id']:016x}" == span["context"]["span_id"]


def test_spans_alone(tmp_path: pathlib.Path) -> None:
    with told.scene(tmp_path, "0", environment={"OTEL_METRICS_EXPORTER": "none"}) as scene:
        deliver(*scene.listener.connect())
        scene.receiver.wait_for(lambda seen: len(seen.spans()) == 1, 60)
        assert scene.agent.stop() == 0
        assert {one.signal for one in scene.receiver.requests} == {"traces"}


def test_a_service_by_name(tmp_path: pathlib.Path) -> None:
    """OTEL_SERVICE_NAME; and without a filter on the reader there is no such outcome."""
    with told.scene(tmp_path, environment={"OTEL_SERVICE_NAME": "mine"}) as scene:
        scene.settle()
        points = scene.receiver.all_points()
        assert {point.resource["service.name"] for point in points} == {"mine"}
        outcomes = {point.attributes["tcppktlat.outcome"] for point in scene.receiver.points(SETTLED)}
        assert outcomes == {"observed", "duplicate", "dropped", "unread", "untracked", "own"}


@pytest.mark.parametrize("option", ["-p", "-t"])
def test_filtered(option: str, tmp_path: pathlib.Path) -> None:
    """What others read is in the books as such, not in the histogram, and has no span."""
    read = "import socket,sys;s=socket.socket(fileno=int(sys.argv[1]));sys.stdin.readline();print(s.recv(9))"
    with told.scene(tmp_path, option, str(os.getpid()), "0") as scene:
        sender, reader = scene.listener.connect()
        deliver(sender, reader)
        sender.sendall(b"x")
        fd = reader.fileno()
        subprocess.run([sys.executable, "-I", "-c", read, str(fd)], pass_fds=[fd], input=b"\n", check=True)
        deliver(sender, reader)
        scene.settle()
        assert told.check_balance(scene.receiver) == {"received": 3, "observed": 2, "filtered": 1, "queued": 0}
        assert {span.attributes["process.pid"] for span in scene.receiver.spans()} == {os.getpid()}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_own_connections(protocol: str, tmp_path: pathlib.Path) -> None:
    """What the agent's exporters read is `own`: no histogram, no span, or each export would cause the next."""
    with Receiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        environment = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_METRIC_EXPORT_INTERVAL": "200"}
        arguments = ["-v", "-r", endpoint.rpartition(":")[2], "--otlp", endpoint, "0"]
        with Agent(tmp_path, arguments, environment):
            receiver.wait_for(lambda seen: told.number(seen, SETTLED, tcppktlat_outcome="own") > 20, 60)
            assert receiver.points(DURATION) == [] and receiver.spans() == []
            said = told.books(receiver)
            assert set(said) == {"received", "queued", "own"}
            assert said["received"] == said["own"] + said["queued"]
            assert receiver.points(RECEIVED)
