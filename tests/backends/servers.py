"""Real back ends as processes on loopback: Prometheus, Jaeger, a Collector; each a context manager."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import requests
import yaml

from backends.build import COLLECTOR, JAEGER, PROMETHEUS

AnyServer = TypeVar("AnyServer", bound="Server")
COLLECTOR_CONFIG = pathlib.Path(__file__).parents[2] / "collector-config"


_reserved: list[socket.socket] = []


def free_port() -> int:
    """A TCP port that nobody else gets while this process runs, and that a server can listen on.

    A socket is bound to it and never listens. The kernel then gives the port to no connection and to no other bind to
    port 0; a server that asks for it with SO_REUSEADDR, as Go's and Python's do, may have it.
    """
    reservation = socket.socket(socket.AF_INET6)  # of IPv4, too
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    reservation.bind(("::", 0))
    _reserved.append(reservation)
    return int(reservation.getsockname()[1])


class Server:
    """One process; what it prints is in `folder`/NAME.log."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        ready: str,
        folder: pathlib.Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`ready`: a URL that answers 200, or the address of a port that takes connections, once it is ready."""
        folder.mkdir(parents=True, exist_ok=True)
        self._name, self._command, self.ready, self._folder = name, [*command], ready, folder
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return (self._folder / f"{self._name}.log").read_text()

    def start(self) -> None:
        """Starts it; wait_until_ready() waits."""
        with (self._folder / f"{self._name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, stdout=log, stderr=log, env=self._environment
            )

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        """Waits until it answers."""
        end_s = time.monotonic() + timeout_s
        while not self._answers():
            assert self._process and self._process.poll() is None and time.monotonic() < end_s, self.log
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            if self.ready.startswith("http://"):
                return requests.get(self.ready, timeout=5).ok
            host, port = self.ready.split(":")
            socket.create_connection((host, int(port)), timeout=5).close()
            return True
        except OSError:  # requests.RequestException is one
            return False

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int | None:
        """Sends a signal, waits for the end, and returns the exit status; None if it was never started."""
        if not self._process:
            return None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(timeout_s)

    def __enter__(self: AnyServer) -> AnyServer:
        self.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)


class Prometheus(Server):
    """Prometheus with the project's own prometheus.yml, started with the flags that its head says."""

    def __init__(self, folder: pathlib.Path, scrapes: bool = False) -> None:
        """`scrapes`: whether it shall scrape a Collector's Prometheus exporter, for which it chooses the address."""
        self.url, self.scrape = f"http://127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        path = COLLECTOR_CONFIG / "prometheus/prometheus.yml"
        configuration = yaml.safe_load(path.read_text())
        configuration["global"]["scrape_interval"] = "250ms"  # a test does not wait for 15 s
        if scrapes:
            (job,) = configuration["scrape_configs"]
            job["static_configs"] = [{"targets": [self.scrape]}]
        else:
            del configuration["scrape_configs"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        command = [
            str(PROMETHEUS.binary),
            "--config.file=prometheus.yml",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            *(word for word in path.read_text().split() if word.startswith(("--enable-feature=", "--web.enable-"))),
        ]
        super().__init__("prometheus", command, f"{self.url}/-/ready", folder)

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", parameters, timeout=30)
        assert answer.ok, answer.text
        return answer.json()["data"]

    def query(self, promql: str) -> list[dict[str, Any]]:
        """The instant vector (or matrix) that a query returns now."""
        result: list[dict[str, Any]] = self._get("query", query=promql)["result"]
        return result

    def over_time(self, promql: str, start_unix_s: float, end_unix_s: float, step_s: float) -> list[dict[str, Any]]:
        """The range vector's series: `values` (or `histograms`) are pairs of a time and a value."""
        result: list[dict[str, Any]] = self._get(
            "query_range", query=promql, start=start_unix_s, end=end_unix_s, step=step_s
        )["result"]
        return result

    def value(self, promql: str) -> float | None:
        """The one number that a query returns; None if it returns nothing."""
        result = self.query(promql)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def label_values(self, selector: str, label: str) -> list[str]:
        """The values of a label of the series that a selector matches."""
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": selector})
        return values

    def exemplars(self, promql: str, since_unix_s: float) -> list[dict[str, Any]]:
        """Exemplars of the series that a query selects, from a time until now: labels, value, timestamp."""
        found = self._get("query_exemplars", query=promql, start=since_unix_s, end=time.time() + 1)
        return [exemplar for series in found for exemplar in series["exemplars"]]


class TraceStore(Server):
    """A back end for spans, on loopback, that takes OTLP over gRPC at the address `otlp`."""

    files: ClassVar[Sequence[str]]  # of collector-config/: those whose spans are sent to it
    path: ClassVar[str]  # of the traces that it is asked for; the id follows
    resource_spans: ClassVar[Sequence[str]]  # where its answer has them

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        self._http, self.otlp = free_port(), f"127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{self._http}"
        folder.mkdir(parents=True, exist_ok=True)
        command, ready = self._prepare(folder)
        super().__init__(name, command, f"{self.url}/{ready}", folder)

    def _prepare(self, folder: pathlib.Path) -> tuple[Sequence[str], str]:
        """Writes its configuration into `folder`; returns its command line, and the path that says when it is ready."""
        raise NotImplementedError

    def span(self, trace_id: str) -> dict[str, Any] | None:
        """A trace's only span, as trace() has it; None: no such trace."""
        spans = self.trace(trace_id)
        assert len(spans) <= 1
        return spans[0] if spans else None

    def trace(self, trace_id: str) -> list[dict[str, Any]]:
        """A trace's spans, as OTLP JSON with hex ids and attributes as a dictionary; none: no such trace."""
        return self._spans(f"{self.path}/{trace_id}")

    def _spans(self, path: str, **query: Any) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.url}/{path}", query, headers={"Accept": "application/json"}, timeout=30)
        if answer.status_code == 404:
            return []
        assert answer.ok, answer.text
        found = answer.json()
        for key in self.resource_spans:
            found = found[key]
        return [
            {
                **span,
                "spanId": hexadecimal(span["spanId"]),
                "parentSpanId": hexadecimal(parent) if (parent := span.get("parentSpanId")) else "",
                "attributes": {one["key"]: plain(one["value"]) for one in span.get("attributes", ())},
            }
            for resource_spans in found
            for scope in resource_spans["scopeSpans"]
            for span in scope["spans"]
        ]


def plain(value: Mapping[str, Any]) -> Any:
    """An OTLP JSON AnyValue as a Python value."""
    ((kind, content),) = value.items()
    return int(content) if kind == "intValue" else content


def hexadecimal(span_id: str) -> str:
    """A span's id, which OTLP JSON has in hex, and plain protobuf JSON in base64."""
    return span_id if len(span_id) == 16 else base64.b64decode(span_id).hex()


class Jaeger(TraceStore):
    """Jaeger v2 in memory.

    Source: its api_v3 `GET /api/v3/traces/{trace_id}`.
    """

    files = ("jaeger.yaml", "tempo.yaml")  # its OTLP stands in for that of a Tempo
    path, resource_spans = "api/v3/traces", ("result", "resourceSpans")

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__("jaeger", folder)

    def _prepare(self, folder: pathlib.Path) -> tuple[Sequence[str], str]:
        configuration = {
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                "telemetry": {"metrics": {"level": "none"}},
            },
            "extensions": {
                "jaeger_query": {
                    "storage": {"traces": "memory"},
                    "http": {"endpoint": f"127.0.0.1:{self._http}"},
                    "grpc": {"endpoint": f"127.0.0.1:{free_port()}"},
                },
                "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 100_000}}}},
            },
            "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": self.otlp}}}},
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
        }
        (folder / "jaeger.yaml").write_text(yaml.safe_dump(configuration))
        return [str(JAEGER.binary), "--config=jaeger.yaml"], "api/services"

    def find(self, service: str, name: str) -> list[dict[str, Any]]:
        """The spans of this name of all traces that a service has a part in."""
        query = {"query.service_name": service, "query.operation_name": name, "query.num_traces": 1000}
        query |= {"query.start_time_min": "2000-01-01T00:00:00Z", "query.start_time_max": "2200-01-01T00:00:00Z"}
        return [span for span in self._spans(self.path, **query) if span["name"] == name]


class Collector(Server):
    """A Collector with files of collector-config/, or other configurations given as dictionaries.

    The Collector's own way of merging brings them together, so that a test changes only what it must, ports above all.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *configurations: str | Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.otlp = f"127.0.0.1:{free_port()}"
        quiet = {"service": {"telemetry": {"metrics": {"level": "none"}}}}  # its own metrics have a fixed port
        command = [str(COLLECTOR.binary), *_options((*configurations, quiet))]
        environment = {"TCPPKTLAT_LISTEN": self.otlp, **(environment or {})}
        super().__init__("collector", command, self.otlp, folder, environment)


def _options(configurations: Sequence[str | Mapping[str, Any]]) -> list[str]:
    return [
        f"--config={COLLECTOR_CONFIG / one}" if isinstance(one, str) else f"--config=yaml:{json.dumps(one)}"
        for one in configurations
    ]


def validate(*configurations: str | Mapping[str, Any], environment: Mapping[str, str] | None = None) -> str:
    """What `otelcol validate` says of these configurations together; empty if it is content."""
    command = [str(COLLECTOR.binary), "validate", *_options(configurations)]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""
