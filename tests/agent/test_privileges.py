"""After attaching, the agent has no privilege, no child and no compiler in memory, and needs none of them."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator

import pytest

from otel_tcppktlat.demo.receiver import Receiver, ServerTls
from otel_tcppktlat.privileges import CAP_BPF
from support.agent import LONG_S, Agent, Pair
from support.certificates import make_certificates
from support.kernels import kernel_version

RECEIVED = "tcppktlat.segments.received"
MARK = "otel-tcppktlat: attached"


@pytest.fixture(scope="module", params=["grpc", "http/protobuf", "grpc+mtls", "http/protobuf+mtls"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Agent, Receiver]]:
    """An agent that has exported once; with mTLS its key is root's alone. The last test ends it."""
    tmp_path = tmp_path_factory.mktemp("agent")
    protocol, _, tls = request.param.partition("+")
    environment = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    server_tls = None
    if tls:
        (tmp_path / "keys").mkdir(mode=0o700)
        made = make_certificates(tmp_path / "keys")
        server_tls = ServerTls(made.server_certificate, made.server_key, made.ca)
        os.chmod(made.client_key, 0o600)
        environment |= {
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(made.ca),
            "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(made.client_key),
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(made.client_certificate),
        }
    with Receiver(tls=server_tls) as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint.replace("127.0.0.1", "localhost")
        with Agent(tmp_path, ["-v"], environment, python=["-X", "importtime"]) as agent:
            agent.wait_for_stderr(MARK)
            receiver.wait_for(lambda seen: bool(seen.points(RECEIVED)), LONG_S)
            yield agent, receiver


def test_it_is_nobody_without_capabilities(running: tuple[Agent, Receiver]) -> None:
    status = running[0].status()
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65534"}
    assert status["Groups"] == ""
    kept = 1 << CAP_BPF if kernel_version() < (5, 19) else 0
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, kept, kept, 0]
    assert status["NoNewPrivs"] == "1"
    for thread in running[0].of_threads("status"):
        (permitted,) = re.findall(r"CapPrm:\t([0-9a-f]+)", thread)
        assert int(permitted, 16) in (0, kept)


def test_no_llvm_and_no_child(running: tuple[Agent, Receiver]) -> None:
    agent, _ = running
    mapped = pathlib.Path(f"/proc/{agent.pid}/maps").read_text()
    assert "libbpf" in mapped
    assert "LLVM" not in mapped and "libbcc" not in mapped and "clang" not in mapped
    assert [children for children in agent.of_threads("children") if children] == []


def test_one_heap(running: tuple[Agent, Receiver]) -> None:
    """None of its threads has one of its own: glibc reserves 64 MiB of addresses for each."""
    lines = pathlib.Path(f"/proc/{running[0].pid}/maps").read_text().splitlines()
    ranges = (re.findall(r"^(\w+)-(\w+) ---p .* 0 *$", line) for line in lines)
    reserved = [int(end, 16) - int(start, 16) for found in ranges for start, end in found]
    assert max(reserved, default=0) < 32 << 20


def test_nothing_is_imported_later_and_reconnects_work(running: tuple[Agent, Receiver]) -> None:
    """Spans, a collector that goes away and comes back, the errors that are logged meanwhile, and the last flush."""
    agent, receiver = running
    with Pair() as pair:
        pair.wait(0.02)
        receiver.wait_for(lambda seen: bool(seen.spans()), LONG_S)
        receiver.stop()
        agent.wait_for_stderr("retrying")
        pair.wait(0.02)
        receiver.start()
        before = len(receiver.requests)
        receiver.wait_for(lambda seen: len(seen.requests) > before + 1, LONG_S)
        pair.wait(0.02)
    assert agent.stop() == 0
    later = agent.stderr.partition(MARK)[2]
    assert [line for line in later.splitlines() if line.startswith("import time:")] == []
    assert receiver.requests[-1].accepted
