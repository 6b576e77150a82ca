"""Something else answers, or nobody: one line says what was found, the agent goes on, and nothing is lost."""

from __future__ import annotations

import contextlib
import http.server
import logging
import pathlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from otel_tcppktlat.demo.receiver import Receiver, ServerTls
from otel_tcppktlat.telemetry import exporters
from otel_tcppktlat.telemetry.diagnosis import Failure, Protocol, Target, Watch
from otel_tcppktlat.telemetry.sending import Sender
from support.agent import Agent
from support.certificates import Certificates, make_certificates
from telemetry import told
from telemetry.told import Listener, deliver

SECRET = "s3cr3t-k3y"
GRPC: Protocol = "grpc"
HTTP: Protocol = "http/protobuf"
SET_HTTP = "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf (usually port 4318)"
SET_GRPC = "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc (usually port 4317)"
WRITE_HTTP, WRITE_HTTPS = (f"write {scheme}:// in OTEL_EXPORTER_OTLP_ENDPOINT" for scheme in ("http", "https"))


Page = tuple[int, str, Mapping[str, str], bytes]  # status, reason, headers, body


class _Pages(http.server.BaseHTTPRequestHandler):
    """Answers a POST as the path asks for; other methods as http.server does."""

    pages: Mapping[str, Page] = {
        "login": (302, "Found", {"Location": f"https://sso.example/login?token={SECRET}"}, b""),
        "page": (200, "OK", {"Content-Type": "text/html; charset=utf-8"}, b"\n<!doctype html><title>Log in</title>"),
        "unauthorized": (401, "Unauthorized", {}, b"no"),
        "forbidden": (403, f"not {SECRET}", {}, b"no"),
        "empty": (200, "OK", {"Content-Type": "text/html"}, b""),
        "words": (200, "OK", {"Content-Type": "text/html"}, b"OK"),
        "json": (200, "OK", {"Content-Type": "application/json"}, b"{}"),
        "accepted": (202, "Accepted", {}, b""),
        "no-content": (204, "No Content", {}, b""),
    }

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        missing: Page = (404, "Not Found", {}, b"nothing here")
        status, reason, headers, body = self.pages.get(self.path.split("/")[1], missing)
        self.send_response(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _pages(**others: str) -> Mapping[str, Page]:
    return {**_Pages.pages, **{path: _Pages.pages[page] for path, page in others.items()}}


class _Web(http.server.ThreadingHTTPServer):
    """An HTTP server that is no receiver."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is expected to."""


@contextlib.contextmanager
def web(tls: Certificates | None = None, host: str = "127.0.0.1") -> Iterator[_Web]:
    """Such a server, on a free port."""
    with _Web((host, 0), _Pages) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.server_certificate, tls.server_key)
            context.set_alpn_protocols(["h2", "http/1.1"])
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


class Odd:
    """A TCP service that says `banner` and hangs up; without one it hangs up, or, if `silent`, says nothing."""

    def __init__(self, banner: bytes = b"", silent: bool = False) -> None:
        self._banner, self._silent = banner, silent
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.accepted: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self._server.accept()[0]
                self.accepted.append(sock)
                if not self._silent:
                    with contextlib.suppress(OSError):  # whoever called may have hung up first
                        sock.sendall(self._banner)
                        sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown(socket.SHUT_RDWR)
        for sock in (self._server, *self.accepted):
            sock.close()


@dataclass
class World:
    """Addresses by what is there."""

    addresses: dict[str, str]
    made: Certificates
    others: Certificates
    nobody: socket.socket


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made, others = (make_certificates(tmp_path_factory.mktemp(name), name=name) for name in ("made", "others"))
    expired = make_certificates(tmp_path_factory.mktemp("expired"), server_expired=True)
    with contextlib.ExitStack() as stack:

        def receiver(name: str, tls: ServerTls | None = None) -> dict[str, str]:
            it = stack.enter_context(Receiver(tls=tls))
            return {f"{name} gRPC receiver": it.grpc_endpoint, f"{name} HTTP receiver": it.http_endpoint}

        def odd(*arguments: Any) -> str:
            it = Odd(*arguments)
            stack.callback(it.close)
            return f"http://127.0.0.1:{it.port}"

        nobody = stack.enter_context(socket.socket())  # bound, so that nobody else will listen there
        nobody.bind(("127.0.0.1", 0))
        elsewhere = stack.enter_context(web(made, "127.0.0.2"))
        addresses = {
            **receiver("plain"),
            **receiver("TLS", ServerTls(made.server_certificate, made.server_key)),
            **receiver("expired TLS", ServerTls(expired.server_certificate, expired.server_key)),
            **receiver("mutual TLS", ServerTls(made.server_certificate, made.server_key, made.ca)),
            "web": f"http://127.0.0.1:{stack.enter_context(web()).server_port}",
            "web with another name": f"https://127.0.0.2:{elsewhere.server_port}",
            "mail": odd(b"220 mail.example ESMTP\r\n"),
            "closes": odd(),
            "silent": odd(b"", True),
            "nobody": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "no name": "http://no-such-host.invalid:4317",
        }
        made.ca.write_text(made.ca.read_text() + expired.ca.read_text())  # both authorities are trusted
        yield World(addresses, made, others, nobody)


def attempt(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    protocol: str,
    url: str,
    environment: Mapping[str, str] | None = None,
) -> tuple[bool, dict[str, list[str]]]:
    """Exports each signal twice. Returns whether that worked, always or never, and what was printed by signal."""
    variables = {
        "GRPC_VERBOSITY": "NONE",
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",  # less than the first retry takes
        "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={SECRET}",
        **(environment or {}),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    span = TracerProvider().get_tracer("test").start_span("span")
    span.end()
    assert isinstance(span, ReadableSpan)
    make_metrics, make_spans = exporters.metric_exporter_maker(), exporters.span_exporter_maker()
    assert make_metrics and make_spans
    metrics = Sender(make_metrics, exporters.make_watch("metrics"), MetricExportResult.SUCCESS)
    spans = Sender(make_spans, exporters.make_watch("traces"), SpanExportResult.SUCCESS)
    caplog.clear()
    worked = set()
    for _ in range(2):
        for sender, data in ((metrics, MetricsData([])), (spans, [span])):
            ended = sender.send(data)
            sender.watch.tell(ended)
            worked.add(ended.delivered)
    metrics.shutdown()
    spans.shutdown()
    (result,) = worked
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert SECRET not in caplog.text
    return result, {what: [line for line in lines if line.startswith(what)] for what in ("metrics", "spans", "")}


CASES = [  # protocol, what is there, the URL's scheme there, what is found
    (HTTP, "plain gRPC receiver", "http", f"a gRPC (HTTP/2) server answers there; for OTLP over gRPC {SET_GRPC}"),
    (GRPC, "plain HTTP receiver", "http", f"an HTTP/1.1 server answers there; for OTLP over HTTP {SET_HTTP}"),
    (GRPC, "web", "http", f"an HTTP/1.1 server answers there; for OTLP over HTTP {SET_HTTP}"),
    (HTTP, "web", "http", "no OTLP receiver is at this path (HTTP 404 Not Found)"),
    (HTTP, "TLS gRPC receiver", "https", f"a gRPC (HTTP/2) server answers there; for OTLP over gRPC {SET_GRPC}"),
    (GRPC, "TLS HTTP receiver", "https", f"an HTTP/1.1 server answers there; for OTLP over HTTP {SET_HTTP}"),
    (GRPC, "plain gRPC receiver", "https", f"a gRPC (HTTP/2) server without TLS answers there; {WRITE_HTTP}"),
    (HTTP, "plain HTTP receiver", "https", f"an HTTP/1.1 server without TLS answers there; {WRITE_HTTP}"),
    (GRPC, "plain HTTP receiver", "https", f"for OTLP over HTTP {SET_HTTP}, and {WRITE_HTTP}"),
    (HTTP, "plain gRPC receiver", "https", f"for OTLP over gRPC {SET_GRPC}, and {WRITE_HTTP}"),
    (GRPC, "TLS gRPC receiver", "http", f"a gRPC (HTTP/2) server with TLS answers there; {WRITE_HTTPS}"),
    (HTTP, "TLS HTTP receiver", "http", f"an HTTP/1.1 server with TLS answers there; {WRITE_HTTPS}"),
    (GRPC, "TLS HTTP receiver", "http", f"for OTLP over HTTP {SET_HTTP}, and {WRITE_HTTPS}"),
    (HTTP, "TLS gRPC receiver", "http", f"for OTLP over gRPC {SET_GRPC}, and {WRITE_HTTPS}"),
    *(
        (protocol, there, scheme, found)
        for there, scheme, found in (
            ("mail", "http", "with '220 mail.example ESMTP'"),
            ("mail", "https", "with '220 mail.example ESMTP'"),
            ("closes", "http", "takes connections there, and closes"),
            ("closes", "https", "takes connections there, and closes"),
            ("nobody", "http", "connection refused"),
            ("nobody", "https", "connection refused"),
            ("no name", "http", "the name no-such-host.invalid does not resolve"),
            ("web with another name", "https", "not for 127.0.0.2"),
        )
        for protocol in (GRPC, HTTP)
    ),
    (GRPC, "silent", "http", "takes connections there, and says nothing"),
    (GRPC, "expired TLS gRPC receiver", "https", "not accepted: certificate has expired"),
    (HTTP, "expired TLS HTTP receiver", "https", "not accepted: certificate has expired"),
    (GRPC, "mutual TLS gRPC receiver", "https", "a client's certificate (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)?"),
    (HTTP, "mutual TLS HTTP receiver", "https", "a client's certificate (OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE)?"),
]  # fmt: skip


@pytest.mark.parametrize(("protocol", "there", "scheme", "found"), CASES)
def test_what_is_found(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    protocol: str,
    there: str,
    scheme: str,
    found: str,
) -> None:
    url = urlsplit(world.addresses[there])._replace(scheme=scheme).geturl()
    environment = {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(world.made.ca)}
    worked, lines = attempt(monkeypatch, caplog, protocol, url, environment)
    assert not worked and len(lines[""]) == 2, lines
    for what, path in (("metrics", "/v1/metrics"), ("spans", "/v1/traces")):
        (line,) = lines[what]
        over = "gRPC" if protocol == GRPC else "HTTP"
        assert line.startswith(f"{what} cannot be delivered to {url}{path if protocol == HTTP else ''} over {over}: ")
        assert found in line and "\n" not in line


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
def test_an_authority_that_is_not_trusted(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    url = world.addresses["TLS gRPC receiver" if protocol == GRPC else "TLS HTTP receiver"]
    environment = {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(world.others.ca)}
    worked, lines = attempt(monkeypatch, caplog, protocol, url, environment)
    assert not worked and [len(lines[what]) for what in ("metrics", "spans", "")] == [1, 1, 2]
    assert all("its certificate is not accepted: unable to get local issuer" in line for line in lines[""]), lines
    assert all("OTEL_EXPORTER_OTLP_CERTIFICATE" in line for line in lines[""])


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("login", "HTTP 302 Found, a redirect to https://sso.example/login: is a login in between?"),
        ("page", "HTTP 200 OK with a web page: is a login in between?"),
        ("unauthorized", "refuses the credentials (HTTP 401 Unauthorized); check OTEL_EXPORTER_OTLP_HEADERS"),
        ("forbidden", "refuses the credentials (HTTP 403 not ***); check OTEL_EXPORTER_OTLP_HEADERS"),
        ("empty", ""),
        ("words", ""),
        ("json", ""),
        ("accepted", ""),
        ("no-content", ""),
    ],
)
def test_answers_of_http_servers(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, page: str, found: str
) -> None:
    """A redirect and a web page are no delivery, as little as an error; a receiver's own manners do not matter."""
    worked, lines = attempt(monkeypatch, caplog, HTTP, f"{world.addresses['web']}/{page}")
    assert worked == (not found)
    assert [len(lines[what]) for what in ("metrics", "spans", "")] == ([1, 1, 2] if found else [0, 0, 0])
    assert all(found in line for line in lines[""]), lines


def test_a_signals_own_address_without_a_path(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is taken as it is, which surprises."""
    environment = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": world.addresses["plain HTTP receiver"]}
    url = world.addresses["web"] + "/accepted"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    with pytest.raises(ValueError):  # metrics fail, spans do not
        attempt(monkeypatch, caplog, HTTP, url, environment)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "404" in line and "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is taken as it is" in line and "/v1/metrics" in line


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
def test_secrets_in_the_address(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    caplog.set_level(logging.DEBUG)  # as with -v
    url = world.addresses["nobody"].replace("//", f"//user:{SECRET}@") + f"/path?key={SECRET}"
    worked, lines = attempt(monkeypatch, caplog, protocol, url)
    assert not worked and [len(lines[what]) for what in ("metrics", "spans")] == [1, 1]
    assert "Failed to export" in caplog.text


def test_a_proxy_is_not_passed_by(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who answers behind a proxy is not for the agent to ask."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    behind = Odd()
    environment = {"http_proxy": world.addresses["nobody"]}
    worked, lines = attempt(monkeypatch, caplog, HTTP, f"http://127.0.0.1:{behind.port}", environment)
    assert not worked and [len(lines[what]) for what in ("metrics", "spans", "")] == [1, 1, 2]
    assert all("proxy" in line for line in lines[""]), lines
    assert behind.accepted == []
    behind.close()


def a_watch() -> Watch:
    """Over nothing in particular."""
    names = dict.fromkeys(("HEADERS", "PROTOCOL", "TIMEOUT", "ENDPOINT"), "VARIABLE")
    return Watch(Target("metrics", HTTP, urlsplit("http://h/v1/metrics"), False, [], names))


def failing(watch: Watch, *failures: Failure | None) -> None:
    """Exports that end so; None: that succeed."""

    def export(failure: Failure | None) -> bool:
        if failure:
            watch.note(failure)
        return failure is None

    for failure in failures:
        watch.tell(watch.attend(lambda failure=failure: export(failure), True))  # type: ignore[misc]


def test_a_line_for_each_change(caplog: pytest.LogCaptureFixture) -> None:
    """Not for each attempt, nor when two kinds of failure alternate; again when one has lasted, or after a delivery."""
    watch = a_watch()
    forbidden, broken = Failure(403, "Forbidden"), Failure(500, "Oops")

    def said() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [line.removeprefix("metrics ").removesuffix(" to http://h/v1/metrics over HTTP") for line in lines]

    failing(watch, None, None)
    assert said() == []
    failing(watch, *[forbidden, broken] * 20)
    first, second = said()
    assert "403" in first and "500" in second
    failing(watch, *[broken] * 20, forbidden)
    (line,) = said()
    assert "403" in line
    failing(watch, None, None)
    assert said() == ["are delivered again"]
    failing(watch, forbidden, forbidden)
    (line,) = said()
    assert "403" in line


def test_an_export_that_outlives_the_agent(caplog: pytest.LogCaptureFixture) -> None:
    """It is lost, and said to be; nothing is said after that."""
    watch, begun, told_to_end = a_watch(), threading.Event(), threading.Event()

    def export() -> bool:
        begun.set()
        told_to_end.wait(60)
        watch.note(Failure(500, "Oops"))
        return False

    thread = threading.Thread(target=lambda: watch.tell(watch.attend(export, True)))
    thread.start()
    begun.wait(60)
    watch.ending()
    watch.conclude()
    told_to_end.set()
    thread.join(60)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "metrics could not be delivered" in line and "no answer until the agent ended" in line


def test_a_third_partys_words_are_left_alone() -> None:
    """What an SDK's exporter logs outside of a Watch, and what it does under one that has no target."""
    exporters_logger = logging.getLogger("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    a_watch()
    said: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keeps()
    logging.getLogger().addHandler(handler)
    try:
        exporters_logger.warning("theirs")
        Watch(None).attend(lambda: exporters_logger.warning("also theirs"), None)
    finally:
        logging.getLogger().removeHandler(handler)
    assert said == ["theirs", "also theirs"]


def test_the_agent_at_a_web_server_and_then_at_a_receiver(world: World, tmp_path: pathlib.Path) -> None:
    """TLS and gRPC to a plain HTTP server; without -v nothing else is said, however often it tries."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener())
        sender, reader = listener.connect()
        with web() as server:
            port = server.server_port
            environment = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://127.0.0.1:{port}",
                "OTEL_EXPORTER_OTLP_CERTIFICATE": str(world.made.ca),
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
                "OTEL_EXPORTER_OTLP_TIMEOUT": "0.7",
                "OTEL_METRIC_EXPORT_INTERVAL": "200",
            }
            agent = stack.enter_context(Agent(tmp_path, ["-l", str(listener.port), "0"], environment))
            agent.wait_for_stderr("metrics cannot be delivered")
            for _ in range(10):
                deliver(sender, reader)
            agent.wait_for_stderr("spans cannot be delivered")
            time.sleep(0.7)  # a few intervals
        tls = ServerTls(world.made.server_certificate, world.made.server_key)
        receiver = stack.enter_context(Receiver(tls=tls, grpc_port=port))
        agent.wait_for_stderr("metrics are delivered again")
        for _ in range(10):
            deliver(sender, reader)
        agent.wait_for_stderr("spans are delivered again")
        told.settle(receiver)
        assert told.check_balance(receiver)["observed"] == 20
        assert agent.stop() == 0
        lines = agent.stderr.splitlines()
    for what in ("metrics", "spans"):
        said = [line for line in lines if line.startswith(f"otel-tcppktlat: {what} ")]
        assert f"an HTTP/1.1 server without TLS answers there; for OTLP over HTTP {SET_HTTP}, and" in said[0]
        assert said[-1].endswith(f" again to https://127.0.0.1:{port} over gRPC")
        # Between the two servers nobody listened: one may have noticed.
        assert all("answers there" not in line for line in said[1:]) and len(set(said)) == len(said), said
    assert all(" delivered " in line for line in lines), lines


def test_the_agent_at_a_login_and_then_at_a_receiver(tmp_path: pathlib.Path) -> None:
    """Deltas that a redirect, and a web page, answered are sent again; and finding out takes no import."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener())
        sender, reader = listener.connect()
        with web() as server:
            port = server.server_port
            environment = {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{port}/page/v1/traces",
                "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://127.0.0.1:{port}/v1/metrics",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
                "OTEL_EXPORTER_OTLP_TIMEOUT": "0.7",
                "OTEL_METRIC_EXPORT_INTERVAL": "200",
            }
            failed = f"otel-tcppktlat: metrics cannot be delivered to http://127.0.0.1:{port}/v1/metrics over HTTP"
            server.RequestHandlerClass = type("Login", (_Pages,), {"pages": _pages(v1="login")})
            arguments = ["-v", "-l", str(listener.port), "0"]
            agent = stack.enter_context(Agent(tmp_path, arguments, environment, python=["-X", "importtime"]))
            agent.wait_for_stderr(f"{failed}: it answers HTTP 302 Found, a redirect")
            deliver(sender, reader)
            agent.wait_for_stderr("spans cannot be delivered")
            server.RequestHandlerClass = type("Page", (_Pages,), {"pages": _pages(v1="page")})
            agent.wait_for_stderr(f"{failed}: it answers HTTP 200 OK with a web page")
            deliver(sender, reader)
        agent.wait_for_stderr(f"{failed}: nobody listens")
        receiver = stack.enter_context(Receiver(http_port=port))
        agent.wait_for_stderr("metrics are delivered again")
        deliver(sender, reader)
        told.settle(receiver)
        assert told.check_balance(receiver)["observed"] == 3
        assert agent.stop() == 0
        later = agent.stderr.partition("otel-tcppktlat: attached")[2]
    lines = [line for line in later.splitlines() if line.startswith("otel-tcppktlat: metrics ")]
    assert len(set(lines)) == len(lines), lines
    assert "import time:" not in later and "Traceback" not in later


def test_an_agent_that_ends_early(world: World, tmp_path: pathlib.Path) -> None:
    """The first export is the last, and is retried until the end; it is explained all the same."""
    environment = {"OTEL_METRIC_EXPORT_INTERVAL": "60000", "OTEL_TRACES_EXPORTER": "none"}
    with Agent(tmp_path, ["-v", "--otlp", world.addresses["web"]], environment) as agent:
        agent.wait_for_stderr("attached")
        assert agent.stop() == 0
        lines = [line for line in agent.stderr.splitlines() if "delivered" in line]
    assert len(lines) == 1 and f"an HTTP/1.1 server answers there; for OTLP over HTTP {SET_HTTP}" in lines[0], lines
