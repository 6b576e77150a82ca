"""Chooses and makes the exporters that the standard variables name, ready to work without privilege.

Certificates and keys are read here, once: later, the agent may not be allowed to. The SDK's exporters read the rest of
their variables themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal
from urllib.parse import SplitResult, quote, unquote, urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.trace.export import SpanExporter

from ..settings import SettingsError, check_endpoint_variable
from .diagnosis import Failure, Protocol, Target, Watch, check_response, note_failure, note_partial_success

Signal = Literal["metrics", "traces"]
_SIGNALS: tuple[Signal, ...] = ("metrics", "traces")
_TLS_FILES = ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
_BUILT_IN = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_DEFAULT_ENDPOINTS: Mapping[Protocol, str] = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}

_log = logging.getLogger(__name__)


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


def _encrypted(signal: Signal) -> bool:
    """May the exporter use TLS? An address without http:// says no more than HOST:PORT."""
    _, url = _variable("ENDPOINT", signal)
    _, insecure = _variable("INSECURE", signal)
    return (url is not None and not url.startswith("http://")) or (insecure or "").lower() == "false"


@dataclass(frozen=True)
class _TlsFiles:
    """What the certificate variables name: paths that were readable, and usable together with these authorities."""

    authorities: str
    certificate: str | None
    key: str | None
    context: ssl.SSLContext

    @classmethod
    def check(cls, signal: Signal, default_authorities: tuple[str, str]) -> _TlsFiles:
        """Raises SettingsError. Without a certificate variable the default is taken: where it is from, and its path."""
        named = {name: _variable(name, signal) for name in _TLS_FILES}
        variable, authorities = named["CERTIFICATE"]
        if authorities is None:
            variable, authorities = default_authorities
        try:
            folder = os.path.isdir(authorities)
            context = ssl.create_default_context(
                cafile=None if folder else authorities, capath=authorities if folder else None
            )
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "reason", None) or error.strerror
            raise SettingsError(f"{variable}: no certificates in {authorities}: {reason}") from None
        variable, certificate = named["CLIENT_CERTIFICATE"]
        key = named["CLIENT_KEY"][1]
        if key and not certificate:
            raise SettingsError(f"{named['CLIENT_KEY'][0]} is set, and {variable} is not")
        if certificate:
            try:
                context.load_cert_chain(certificate, key, password="")
            except ssl.SSLError as error:
                with_key = f" with the key {key}" if key else ", which should hold its key as well"
                raise SettingsError(f"{variable}: cannot use {certificate}{with_key}: {error.reason}") from None
        return cls(authorities, certificate, key, context)


def _check_files(signal: Signal) -> None:
    for variable, path in (_variable(name, signal) for name in _TLS_FILES):
        try:
            if path:
                pathlib.Path(path).read_bytes()
        except OSError as error:
            raise SettingsError(f"{variable}: cannot read {path}: {error.strerror}") from None


def _own_credentials(protocol: str) -> bool:
    """Does a plug-in of the SDK bring the credentials?"""
    prefix, suffix = f"OTEL_PYTHON_EXPORTER_OTLP_{protocol}_", "CREDENTIAL_PROVIDER"
    return any(name.startswith(prefix) and name.endswith(suffix) for name in os.environ)


def _grpc_arguments(signal: Signal) -> dict[str, Any]:
    if not _log.isEnabledFor(logging.DEBUG):
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a Watch says it once, gRPC's library at every attempt
    import grpc

    _check_files(signal)
    arguments: dict[str, Any] = {}
    algorithms = {
        "none": grpc.Compression.NoCompression,
        "gzip": grpc.Compression.Gzip,
        "deflate": grpc.Compression.Deflate,
    }
    _, compression = _variable("COMPRESSION", signal)
    if compression:  # the SDK's own reading of the variable knows gzip only
        arguments["compression"] = algorithms[compression.lower()]
    if _encrypted(signal) and not _own_credentials("GRPC"):
        bundled = os.path.join(os.path.dirname(grpc.__file__), "_cython", "_credentials", "roots.pem")
        variable = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
        default = (variable, os.environ[variable]) if os.environ.get(variable) else ("the grpcio package", bundled)
        files = _TlsFiles.check(signal, default)
        if files.certificate and not files.key:
            raise SettingsError(f"{_variable('CLIENT_CERTIFICATE', signal)[0]} is set, and the client key is not")
        arguments["credentials"] = grpc.ssl_channel_credentials(
            *(
                pathlib.Path(path).read_bytes() if path else None
                for path in (files.authorities, files.key, files.certificate)
            )
        )
    return arguments


def _http_arguments(signal: Signal) -> dict[str, Any]:
    variable, url = _variable("ENDPOINT", signal)
    if url:
        check_endpoint_variable(variable, url)
    _check_files(signal)
    if _own_credentials("HTTP"):
        return {}
    import requests
    from google.rpc.status_pb2 import Status
    from requests.adapters import HTTPAdapter

    response_kind = _response_kind(signal)

    def said_by(response: requests.Response) -> str:
        """A google.rpc.Status, as OTLP/HTTP has it, or plain text."""
        content_type = response.headers.get("Content-Type", "")
        if "protobuf" in content_type:
            with contextlib.suppress(DecodeError):
                return str(Status.FromString(response.content).message)
        return " ".join(response.text.split()) if "text/plain" in content_type else ""

    class Watched(HTTPAdapter):
        """Lets a Watch know what becomes of a request, and the SDK have no success that is none."""

        def send(self, *args: Any, **kwargs: Any) -> requests.Response:
            try:
                response = super().send(*args, **kwargs)
            except Exception as error:
                note_failure(Failure(None, str(error)))
                raise
            check_response(response, said_by(response) if response.status_code >= 400 else "")
            if response.status_code == 200 and "protobuf" in response.headers.get("Content-Type", ""):
                with contextlib.suppress(DecodeError):
                    note_partial_success(response_kind.FromString(response.content))
            return response

    session = requests.Session()
    session.mount("http://", Watched())
    if not _encrypted(signal):
        return {"session": session}
    import certifi

    bundles = ((name, os.environ.get(name)) for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"))
    default = next(((name, path) for name, path in bundles if path), ("the certifi package", certifi.where()))
    context = _TlsFiles.check(signal, default).context

    class PreparedTls(Watched):
        """Uses the context made above, whatever verify and cert say: their files may be out of reach by now."""

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs, ssl_context=context)

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            return super().proxy_manager_for(proxy, **kwargs, ssl_context=context)

        def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
            host, _ = super().build_connection_pool_key_attributes(request, verify=True, cert=None)
            return host, {"ssl_context": context}

        def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
            """The context does."""

    session.mount("https://", PreparedTls())
    return {"session": session}


def _response_kind(signal: Signal) -> type[Any]:
    if signal == "metrics":
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

        return ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    return ExportTraceServiceResponse


_ARGUMENTS: Mapping[str, Callable[[Signal], dict[str, Any]]] = {
    "otlp_proto_grpc": _grpc_arguments,
    "otlp_proto_http": _http_arguments,
}


def _maker(signal: Signal, kind: type[Any]) -> Callable[[], Any] | None:
    """Makes the exporter that the variables name, whenever it is called; it reads no file. Raises SettingsError."""
    name = exporter_name(signal)
    if name is None:
        return None
    found = [*entry_points(group=f"opentelemetry_{signal}_exporter", name=name)]
    if not found:
        raise SettingsError(f"OTEL_{signal.upper()}_EXPORTER={name}: no installed package has such an exporter")
    arguments = _ARGUMENTS[name](signal) if name in _ARGUMENTS else {}

    def make() -> Any:
        try:
            loaded = found[0].load()
            if name == "otlp_proto_grpc":
                from .watched_grpc import watched

                loaded = watched(loaded)
            exporter = loaded(**arguments)
        except Exception as error:  # whatever a third party's constructor thinks of its settings
            raise SettingsError(f"the {signal} exporter {name} cannot be made: {error}") from error
        if not isinstance(exporter, kind):
            raise SettingsError(f"OTEL_{signal.upper()}_EXPORTER={name} is not a push exporter of {signal}")
        return exporter

    return make


def metric_exporter_maker() -> Callable[[], MetricExporter] | None:
    """Makes the exporter that OTEL_METRICS_EXPORTER names; None for `none`. Both raise SettingsError."""
    return _maker("metrics", MetricExporter)


def span_exporter_maker() -> Callable[[], SpanExporter] | None:
    """Makes the exporter that OTEL_TRACES_EXPORTER names; None for `none`. Both raise SettingsError."""
    return _maker("traces", SpanExporter)


def _uses_tls(signal: Signal, protocol: Protocol, url: SplitResult) -> bool:
    """As the SDK decides; gRPC's addresses may come without a scheme."""
    insecure = _variable("INSECURE", signal)[1]
    if protocol == "http/protobuf" or url.scheme == "https" or insecure is None:
        return url.scheme != "http"
    return insecure.lower() == "false"


def _secrets(url: SplitResult) -> list[str]:
    """What no message may contain: the values of headers, raw and decoded, and what is private in an address.

    Those of both signals, as one receiver may get both; and a value such as `Bearer TOKEN` without its first word, too.
    """
    pairs = [pair for signal in _SIGNALS for pair in (_variable("HEADERS", signal)[1] or "").split(",")]
    values = [pair.partition("=")[2].strip() for pair in pairs]
    tokens = [unquote(value).partition(" ")[2] for value in values]
    private = [*values, *tokens, url.netloc.rpartition("@")[0], url.password or "", url.query]
    return [text for one in private for text in (one, unquote(one), quote(one, safe="=&%"))]


def make_watch(signal: Signal) -> Watch:
    """Watches over the deliveries of the exporter that is made for a signal, unless it is a third party's."""
    protocols: Mapping[str, Protocol] = {"otlp_proto_grpc": "grpc", "otlp_proto_http": "http/protobuf"}
    protocol = protocols.get(exporter_name(signal) or "")
    if protocol is None:
        return Watch(None)
    names = {name: _variable(name, signal)[0] for name in ("HEADERS", "PROTOCOL", "TIMEOUT", *_TLS_FILES)}
    names["ENDPOINT"], endpoint = _variable("ENDPOINT", signal)
    endpoint = endpoint or _DEFAULT_ENDPOINTS[protocol]
    if protocol == "http/protobuf" and f"_{signal.upper()}_" not in names["ENDPOINT"]:
        endpoint = f"{endpoint.removesuffix('/')}/v1/{signal}"
    url = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    tls = _uses_tls(signal, protocol, url)
    if not url.scheme:
        url = url._replace(scheme="https" if tls else "http")
    return Watch(Target(signal, protocol, url, tls, _secrets(url), names))
