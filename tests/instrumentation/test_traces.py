"""`opentelemetry-instrument gunicorn` with real services, an application that reads late, and its traces in Jaeger."""

from __future__ import annotations

import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from backends import build
from backends.servers import Jaeger
from instrumentation.programs import Gunicorn, Upstream, environment
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.demo.receiver.records import ExemplarRecord, Point
from telemetry import told
from telemetry.told import DURATION, eventually

LATE_S = 0.03  # as applications/late.py


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    build.build(build.JAEGER)
    with Jaeger(tmp_path_factory.mktemp("jaeger")) as it:
        yield it


@pytest.fixture(scope="module", params=["sync", "gthread"])
def shop(
    request: pytest.FixtureRequest,
    serving: pathlib.Path,
    services: dict[str, str],
    jaeger: Jaeger,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Gunicorn, Receiver]]:
    """Traces go to Jaeger, metrics to a receiver."""
    with Receiver() as receiver:
        variables = environment(
            serving,
            receiver.http_endpoint,
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"http://{jaeger.otlp}",
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc",
            OTEL_PYTHON_TCPPKTLAT_THRESHOLD="10",  # a busy machine reads late, too
            **services,
        )
        options = ("--threads", "4") if request.param == "gthread" else ()
        folder = tmp_path_factory.mktemp("shop")
        with Gunicorn(folder, "late:app", request.param, variables, *options) as gunicorn:
            gunicorn.wait_until_ready()
            gunicorn.wait_until_measured(receiver)
            yield gunicorn, receiver


def get(gunicorn: Gunicorn, path: str) -> tuple[str, str]:
    """Asks the shop; returns the trace, and the server's span."""
    answer = requests.get(f"http://127.0.0.1:{gunicorn.port}{path}", timeout=30)
    assert answer.ok, answer.text
    return answer.headers["Trace-Id"], answer.headers["Span-Id"]


def tree(jaeger: Jaeger, trace_id: str, count: int) -> dict[str, dict[str, Any]]:
    """The spans of a trace by id, once there are so many."""
    eventually(lambda: len(jaeger.trace(trace_id)) >= count, 30, f"{count} spans in {trace_id}")
    return {span["spanId"]: span for span in jaeger.trace(trace_id)}


def receives(spans: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [span for span in spans.values() if span["name"] == "tcp receive"]


def wait_s(span: dict[str, Any]) -> float:
    return (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e9


@pytest.mark.parametrize(("path", "parent", "port"), [("/redis", "GET", "REDIS_PORT"), ("/postgres", "select", "")])
def test_an_answer_that_lay_there_is_a_child_of_its_query(
    shop: tuple[Gunicorn, Receiver], jaeger: Jaeger, services: dict[str, str], path: str, parent: str, port: str
) -> None:
    trace_id, server_id = get(shop[0], f"{path}?late")
    eventually(lambda: receives(tree(jaeger, trace_id, 1)), 30, "no wait in the trace")
    eventually(lambda: server_id in tree(jaeger, trace_id, 1), 30)
    spans = tree(jaeger, trace_id, 3)
    late = [span for span in receives(spans) if spans[span["parentSpanId"]]["name"].lower().startswith(parent.lower())]
    assert late, [span["name"] for span in spans.values()]
    for span in late:
        query = spans[span["parentSpanId"]]
        assert query["kind"] == 3 and query["parentSpanId"] == server_id  # SPAN_KIND_CLIENT
        assert int(query["startTimeUnixNano"]) <= int(span["endTimeUnixNano"]) <= int(query["endTimeUnixNano"])
        assert span["attributes"]["tcppktlat.role"] == "client"
        assert not port or span["attributes"]["server.port"] == int(services[port])
    assert max(wait_s(span) for span in late) >= LATE_S / 2


def test_a_body_that_lay_there_is_a_child_of_who_read_it(shop: tuple[Gunicorn, Receiver], jaeger: Jaeger) -> None:
    """The span of requests ends with the headers: the server's reads the rest."""
    trace_id, server_id = get(shop[0], "/requests?late")
    eventually(lambda: receives(tree(jaeger, trace_id, 1)), 30)
    spans = tree(jaeger, trace_id, 3)
    late = max(receives(spans), key=wait_s)
    assert late["parentSpanId"] == server_id
    assert wait_s(late) >= 2 * LATE_S - Upstream.LATER_S - 0.01 and late["attributes"]["tcppktlat.bytes"] == 1000


def test_a_requests_own_body(shop: tuple[Gunicorn, Receiver], jaeger: Jaeger) -> None:
    with socket.create_connection(("127.0.0.1", shop[0].port)) as sock:
        sock.sendall(b"POST /body?late HTTP/1.1\r\nHost: shop\r\nConnection: close\r\nContent-Length: 100\r\n\r\n")
        time.sleep(LATE_S / 2)  # the application runs, and sleeps
        sock.sendall(b"x" * 100)
        headers = b""
        while data := sock.recv(65536):
            headers += data
    lines = dict(line.split(": ", 1) for line in headers.decode().split("\r\n\r\n")[0].splitlines()[1:])
    eventually(lambda: receives(tree(jaeger, lines["Trace-Id"], 1)), 30)
    late = max(receives(tree(jaeger, lines["Trace-Id"], 2)), key=wait_s)
    assert late["parentSpanId"] == lines["Span-Id"] and late["attributes"]["tcppktlat.role"] == "server"
    assert late["attributes"]["server.port"] == shop[0].port


def test_prompt_reads_make_no_span(shop: tuple[Gunicorn, Receiver], jaeger: Jaeger) -> None:
    """Traces stay as they are, but for what really waited: nothing here waits for long in the usual course."""
    plain = [get(shop[0], path) for path in ("/redis", "/postgres", "/requests")]
    late_trace, _ = get(shop[0], "/redis?late")
    eventually(lambda: receives(tree(jaeger, late_trace, 1)), 30)
    for trace_id, server_id in plain:
        spans = tree(jaeger, trace_id, 2)
        assert server_id in spans
        for span in receives(spans):  # a machine that is busy may read late: then it says so, and is right
            assert wait_s(span) >= 0.01 and span["parentSpanId"] in spans


def test_the_histogram_is_the_applications_own(shop: tuple[Gunicorn, Receiver], jaeger: Jaeger) -> None:
    """Its resource, and exemplars that lead to its traces: the slowest of each bucket and interval, so not to all."""
    gunicorn, receiver = shop
    asked = set[str]()

    def ours() -> list[tuple[Point, ExemplarRecord]]:
        return [(point, one) for point, one in told.exemplars(receiver) if one.trace_id in asked]

    def asking() -> bool:
        asked.add(get(gunicorn, "/redis?late")[0])
        return bool(ours())

    eventually(asking)
    point, exemplar = ours()[0]
    assert point.resource["service.name"] == "shop" and point.resource["telemetry.auto.version"]
    assert point.name == DURATION and point.unit == "s" and point.kind == "histogram"
    assert set(point.attributes) == {"process.executable.name", "server.port", "network.type", "tcppktlat.role"}
    eventually(lambda: exemplar.span_id in tree(jaeger, exemplar.trace_id, 1), 30)
    span = tree(jaeger, exemplar.trace_id, 1)[exemplar.span_id]
    assert span["name"] == "tcp receive" and wait_s(span) == pytest.approx(exemplar.value, abs=1e-6)
    assert span["attributes"]["process.pid"] == exemplar.attributes["process.pid"]
    assert told.bucket_of(point, float(exemplar.value or 0)) in told.bucket_counts(point)


def test_a_request_that_waited_for_a_worker_is_a_root(shop: tuple[Gunicorn, Receiver], jaeger: Jaeger) -> None:
    """It is read before its span begins: a trace of its own says how long it lay there, and of whom."""
    gunicorn = shop[0]
    busy = [socket.create_connection(("127.0.0.1", gunicorn.port)) for _ in range(6)]
    for sock in busy:
        sock.sendall(b"GET /busy?s=0.1 HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
    ports = {int(sock.getsockname()[1]) for sock in busy}
    for sock in busy:
        while sock.recv(65536):
            pass
        sock.close()

    def roots() -> list[dict[str, Any]]:
        found = jaeger.find("shop", "tcp receive")
        return [span for span in found if span["attributes"]["network.peer.port"] in ports]

    eventually(roots, 30, "no request waited")
    for span in roots():
        assert not span.get("parentSpanId") and span["attributes"]["tcppktlat.role"] == "server"
    assert max(wait_s(span) for span in roots()) >= 0.05
