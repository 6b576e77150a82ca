"""How it gets to the collector: protocols, headers, compression, TLS; each signal as its own variables say."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import pytest

from otel_tcppktlat.demo.receiver import Hang, Receiver, Request, ServerTls
from support.certificates import Certificates, make_certificates
from telemetry import told
from telemetry.told import deliver

HEADERS = "OTEL_EXPORTER_OTLP_{}HEADERS"


def exchange(folder: pathlib.Path, environment: Mapping[str, str], **scene: Any) -> dict[str, Request]:
    """Runs an agent until metrics and spans have arrived; returns a request of each signal."""
    with told.scene(folder, "0", environment=environment, **scene) as it:
        deliver(*it.listener.connect())
        it.receiver.wait_for(lambda seen: bool(seen.spans()), 60)
        it.settle()
        assert it.agent.stop() == 0
        assert told.waits(it.receiver).count == len(it.receiver.spans()) == 1
        assert {one.answer for one in it.receiver.requests} == {"ok"}
        assert "WARN" not in it.agent.stderr.upper()
        return {one.signal: one for one in it.receiver.requests}


def test_grpc(tmp_path: pathlib.Path) -> None:
    """Headers and compression in general; spans have their own compression."""
    environment = {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=one,x-both=a%20b",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "none",
    }
    last = exchange(tmp_path, environment)
    assert {one.protocol for one in last.values()} == {"grpc"}
    assert {one.headers["x-tenant"] for one in last.values()} == {"one"}
    assert {one.headers["x-both"] for one in last.values()} == {"a b"}
    assert last["metrics"].headers["grpc-encoding"] == "gzip" and last["metrics"].wire_bytes < last["metrics"].bytes
    assert last["traces"].headers["grpc-encoding"] == "identity"


def test_grpc_connects_to_export_and_rests(tmp_path: pathlib.Path) -> None:
    """In between there is no connection, and none of gRPC's threads, which never sleep for long."""
    with told.scene(tmp_path, environment={"OTEL_METRIC_EXPORT_INTERVAL": "5000"}) as scene:
        pair, (interpreter,) = scene.listener.connect(), {*scene.agent.of_threads("comm")}
        for count in (1, 2):
            deliver(*pair)
            scene.receiver.wait_for(lambda seen, count=count: told.waits(seen).count == count, 60)  # type: ignore[misc]
            told.eventually(lambda: {*scene.agent.of_threads("comm")} == {interpreter})


def test_http(tmp_path: pathlib.Path) -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=one",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x-tenant=two",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "Deflate",
        "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "gzip",
    }
    last = exchange(tmp_path, environment, protocol="http/protobuf")
    assert {one.protocol for one in last.values()} == {"http/protobuf"}
    assert last["metrics"].headers["content-encoding"] == "gzip"
    assert last["traces"].headers["content-encoding"] == "deflate"
    assert (last["metrics"].headers["x-tenant"], last["traces"].headers["x-tenant"]) == ("one", "two")


def test_each_signal_its_own(tmp_path: pathlib.Path) -> None:
    """Metrics by gRPC, its endpoint without a scheme, and spans by HTTP; the general variables lead nowhere."""
    with Receiver() as receiver:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": receiver.grpc_endpoint.removeprefix("http://"),
            "OTEL_EXPORTER_OTLP_METRICS_INSECURE": "true",
            "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION": "deflate",
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.http_endpoint + "/v1/traces",
        }
        last = exchange(tmp_path, environment, receiver=receiver)
    assert (last["metrics"].protocol, last["traces"].protocol) == ("grpc", "http/protobuf")
    assert last["metrics"].headers["grpc-encoding"] == "deflate"
    assert last["traces"].headers.get("content-encoding", "identity") == "identity"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("others"), name="other")


def both_protocols(receiver: Receiver) -> dict[str, str]:
    """Metrics by gRPC, spans by HTTP."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint.replace("127.0.0.1", "localhost"),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.http_endpoint + "/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }


def test_a_certificate_variable_wins(made: Certificates, others: Certificates, tmp_path: pathlib.Path) -> None:
    """Over what requests and gRPC would take by default; and the signal's own over the general one."""
    with Receiver(tls=ServerTls(made.server_certificate, made.server_key)) as receiver:
        environment = {
            **both_protocols(receiver),
            "REQUESTS_CA_BUNDLE": str(others.ca),
            "CURL_CA_BUNDLE": str(others.ca),
            "SSL_CERT_FILE": str(others.ca),
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(others.ca),
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(made.ca),
            "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE": str(made.ca),
        }
        exchange(tmp_path, environment, receiver=receiver)


def test_default_authorities(made: Certificates, tmp_path: pathlib.Path) -> None:
    with Receiver(tls=ServerTls(made.server_certificate, made.server_key)) as receiver:
        environment = {
            **both_protocols(receiver),
            "REQUESTS_CA_BUNDLE": str(made.ca),
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(made.ca),
        }
        exchange(tmp_path, environment, receiver=receiver)


def test_mutual_tls_from_general_and_own_variables(
    made: Certificates, others: Certificates, tmp_path: pathlib.Path
) -> None:
    """Metrics have an authority and a key of their own, spans an authority of their own and the general key."""
    with Receiver(tls=ServerTls(made.server_certificate, made.server_key, made.ca)) as receiver:
        environment = {
            **both_protocols(receiver),
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(others.ca),
            "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE": str(made.ca),
            "OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY": str(made.client_key),
            "OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE": str(made.client_certificate),
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE": str(made.ca),
            "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(made.client_key),
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(made.client_certificate),
        }
        exchange(tmp_path, environment, receiver=receiver)


def test_a_server_that_nobody_vouches_for(made: Certificates, others: Certificates, tmp_path: pathlib.Path) -> None:
    with Receiver(tls=ServerTls(made.server_certificate, made.server_key)) as receiver:
        environment = {**both_protocols(receiver), "OTEL_EXPORTER_OTLP_CERTIFICATE": str(others.ca)}
        with told.scene(tmp_path, "0", environment=environment, receiver=receiver) as scene:
            deliver(*scene.listener.connect())
            scene.agent.wait_for_stderr("encountered while exporting metrics")
            scene.agent.wait_for_stderr("CERTIFICATE_VERIFY_FAILED")
            scene.agent.stop()
        assert receiver.requests == []
        assert "Traceback" not in scene.agent.stderr


def test_timeouts(tmp_path: pathlib.Path) -> None:
    """A collector that does not answer: metrics give up after theirs, spans, in general, after theirs."""
    with Receiver() as receiver:
        environment = {
            **both_protocols(receiver),
            "OTEL_EXPORTER_OTLP_TIMEOUT": "100",
            "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "0.5",
        }
        with told.scene(tmp_path, "0", environment=environment, receiver=receiver) as scene:
            receiver.answer_with(Hang(100))
            began_s = time.monotonic()
            deliver(*scene.listener.connect())
            receiver.wait_for(lambda seen: sum(one.answer == "hang" for one in seen.requests) >= 5, 60)
            assert time.monotonic() - began_s >= 3 * 0.5
            assert sum(one.answer == "hang" and one.signal == "traces" for one in receiver.requests) <= 1
