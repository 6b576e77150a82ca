"""Header values and what is private in an address appear nowhere, whatever fails, and with -v."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from urllib.parse import quote

import pytest

from cli.printed import environment
from otel_tcppktlat.demo.receiver import (
    Hang,
    HttpStatus,
    InvalidArgument,
    PartialSuccess,
    Receiver,
    ResourceExhausted,
    Unavailable,
)
from support.agent import Agent, Pair
from telemetry.told import eventually

SECRET = "s3cr3t k3y/+%"
RAW = quote(SECRET, safe="")
FAULTS = (
    Unavailable(),
    ResourceExhausted(),
    InvalidArgument(),
    HttpStatus(401),
    HttpStatus(403),
    HttpStatus(500),
    Hang(1),
    PartialSuccess(1, f"no room for authorization: Bearer {SECRET}"),
    PartialSuccess(1, f"{SECRET} has no budget left"),
)


def absent(text: str) -> None:
    """Neither as it is sent, nor as it was set, nor a part that would do."""
    assert "s3cr3t" not in text, [line for line in text.splitlines() if "s3cr3t" in line]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_while_all_goes_wrong(tmp_path: pathlib.Path, protocol: str) -> None:
    """Each fault is met by metrics and spans; at last nobody is there, also when the agent ends."""
    with Receiver() as receiver, Pair() as pair:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{RAW},x-key={RAW}",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"authorization=Basic%20{RAW}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
        }
        with Agent(tmp_path, ["-v", "-l", str(pair.port)], variables) as agent:
            agent.wait_for_stderr("attached")
            for fault in FAULTS:
                receiver.answer_with(fault)
                before = len(receiver.requests)
                while {one.signal for one in receiver.requests[before:]} != {"metrics", "traces"}:
                    pair.wait(0.01)
            sent = {one.headers.get("authorization") for one in receiver.requests}
            assert sent == {f"Bearer {SECRET}", f"Basic {SECRET}"}
            receiver.stop()
            eventually(lambda: "refused" in agent.stderr)
            assert agent.stop() == 0
        assert agent.stderr.count("cannot be delivered") >= 4, agent.stderr
        absent(agent.stderr + agent.stdout)


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--otlp", f"ftp://user:{RAW}@127.0.0.1"], {}),
        (["--otlp", f"http://user:{RAW}@127.0.0.1:port/"], {}),
        (["--otlp", f"http:///path?key={RAW}"], {}),
        (["--otlp", f"user:{RAW}@127.0.0.1"], {}),
        ([], {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://user:{RAW}@127.0.0.1:0"}),
        (["--otlp", "http://127.0.0.1:9"], {"OTEL_EXPORTER_OTLP_HEADERS": f"Bearer {SECRET}"}),
        (["--otlp", "http://127.0.0.1:9"], {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"key={SECRET}\x01"}),
    ],
)
def test_bad_input(arguments: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "otel_tcppktlat", "-v", *arguments],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    absent(done.stderr)
