"""Chooses and makes the exporters that the standard variables name, ready to work without privilege.

Certificates and keys are read here, once: later, the agent may not be allowed to. The SDK's exporters read the rest of
their variables themselves.
"""

from __future__ import annotations

import os
import pathlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.trace.export import SpanExporter

from ..settings import SettingsError

Signal = Literal["metrics", "traces"]
_BUILT_IN = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


def _variable(name: str, signal: Signal) -> tuple[str, str | None]:
    """An OTEL_EXPORTER_OTLP variable's name and value: the signal's own goes before the general one."""
    for full in (f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}", f"OTEL_EXPORTER_OTLP_{name}"):
        if value := os.environ.get(full, "").strip():
            return full, value
    return f"OTEL_EXPORTER_OTLP_{name}", None


def exporter_name(signal: Signal) -> str | None:
    """The entry point of the signal's exporter; None if there is to be none. Raises SettingsError."""
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    name = os.environ.get(variable, "").strip() or "otlp"
    if "," in name:
        raise SettingsError(f"{variable} names several exporters ({name}): name one, and let a Collector distribute")
    if name == "none":
        return None
    if name != "otlp":
        return name
    protocol_variable, protocol = _variable("PROTOCOL", signal)
    if (protocol or "grpc") not in _BUILT_IN:
        raise SettingsError(f"{protocol_variable}={protocol} is not supported: use grpc or http/protobuf")
    return _BUILT_IN[protocol or "grpc"]


@dataclass(frozen=True)
class TlsFiles:
    """The contents of the files that the certificate variables name."""

    authorities: bytes
    authorities_path: str
    key_path: str | None
    certificate_path: str | None

    @classmethod
    def read(cls, signal: Signal) -> TlsFiles:
        """Raises SettingsError for a file that cannot be read."""
        paths = {name: _variable(name, signal) for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")}
        for variable, path in paths.values():
            if path:
                _read(variable, path)
        variable, authorities_path = paths["CERTIFICATE"]
        if authorities_path is None:
            variable, authorities_path = _default_authorities()
        return cls(
            _read(variable, authorities_path), authorities_path, paths["CLIENT_KEY"][1], paths["CLIENT_CERTIFICATE"][1]
        )


def _default_authorities() -> tuple[str, str]:
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        if path := os.environ.get(variable):
            return variable, path
    import certifi

    return "the certifi package", certifi.where()


def _read(variable: str, path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{variable}: cannot read {path}: {error.strerror}") from None


def _grpc_arguments(signal: Signal) -> dict[str, Any]:
    import grpc

    arguments: dict[str, Any] = {}
    variable, compression = _variable("COMPRESSION", signal)
    algorithms = {
        "none": grpc.Compression.NoCompression,
        "gzip": grpc.Compression.Gzip,
        "deflate": grpc.Compression.Deflate,
    }
    if compression:
        if compression.lower() not in algorithms:
            raise SettingsError(f"{variable}={compression} is not known: use gzip, deflate or none")
        arguments["compression"] = algorithms[compression.lower()]
    if not any(name.startswith("OTEL_PYTHON_EXPORTER_OTLP_GRPC") and "CREDENTIAL" in name for name in os.environ):
        files = TlsFiles.read(signal)
        key, certificate = (
            pathlib.Path(path).read_bytes() if path else None for path in (files.key_path, files.certificate_path)
        )
        arguments["credentials"] = grpc.ssl_channel_credentials(files.authorities, key, certificate)
    return arguments


def _http_arguments(signal: Signal) -> dict[str, Any]:
    if any(name.startswith("OTEL_PYTHON_EXPORTER_OTLP_HTTP") and "CREDENTIAL" in name for name in os.environ):
        return {}
    import requests
    from requests.adapters import HTTPAdapter

    files = TlsFiles.read(signal)
    try:
        context = ssl.create_default_context(cadata=files.authorities.decode("ascii", errors="ignore"))
        if files.certificate_path:
            context.load_cert_chain(files.certificate_path, files.key_path)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(f"the TLS files of the {signal} exporter cannot be used: {error}") from None

    class PreparedTls(HTTPAdapter):
        """Uses the context made above, whatever verify and cert say: their files may be out of reach by now."""

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs, ssl_context=context)

        def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
            host, _ = super().build_connection_pool_key_attributes(request, verify=True, cert=None)
            return host, {"ssl_context": context}

        def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
            """The context does."""

    session = requests.Session()
    session.mount("https://", PreparedTls())
    return {"session": session}


_ARGUMENTS: Mapping[str, Callable[[Signal], dict[str, Any]]] = {
    "otlp_proto_grpc": _grpc_arguments,
    "otlp_proto_http": _http_arguments,
}


def _make(signal: Signal, name: str, kind: type[Any]) -> Any:
    found = [*entry_points(group=f"opentelemetry_{signal}_exporter", name=name)]
    if not found:
        raise SettingsError(f"OTEL_{signal.upper()}_EXPORTER={name}: no installed package has such an exporter")
    arguments = _ARGUMENTS[name](signal) if name in _ARGUMENTS else {}
    try:
        exporter = found[0].load()(**arguments)
    except Exception as error:  # whatever a third party's constructor thinks of its settings
        raise SettingsError(f"the {signal} exporter {name} cannot be made: {error}") from error
    if not isinstance(exporter, kind):
        raise SettingsError(f"OTEL_{signal.upper()}_EXPORTER={name} is not a push exporter of {signal}")
    return exporter


def make_metric_exporter() -> MetricExporter | None:
    """The exporter that OTEL_METRICS_EXPORTER names; None for `none`. Raises SettingsError."""
    name = exporter_name("metrics")
    exporter: MetricExporter | None = _make("metrics", name, MetricExporter) if name else None
    return exporter


def make_span_exporter() -> SpanExporter | None:
    """The exporter that OTEL_TRACES_EXPORTER names; None for `none`. Raises SettingsError."""
    name = exporter_name("traces")
    exporter: SpanExporter | None = _make("traces", name, SpanExporter) if name else None
    return exporter
