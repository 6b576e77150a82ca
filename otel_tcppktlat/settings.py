"""What the user asked for, checked: from the command line and the standard variables."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from .buckets import BadBounds, Buckets, explicit_buckets, exponential_buckets
from .series import ATTRIBUTES, DEFAULT_ATTRIBUTES, DEFAULT_LIMIT

AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
EXEMPLAR_FILTER = "OTEL_METRICS_EXEMPLAR_FILTER"
DEFAULT_SPAN_RATE = 100.0
DEFAULT_EXPORT_INTERVAL_MS = 60_000.0

# What the SDK would pass over with a warning, or end with a traceback for. Of numbers: type, lowest, highest.
_LONGEST_MS = 2**31 - 1
_NUMBERS: Mapping[str, tuple[type[int] | type[float], float, float]] = {
    "OTEL_METRIC_EXPORT_INTERVAL": (float, 1, _LONGEST_MS),
    "OTEL_METRIC_EXPORT_TIMEOUT": (float, 1, _LONGEST_MS),
    "OTEL_BSP_SCHEDULE_DELAY": (int, 1, _LONGEST_MS),
    "OTEL_BSP_EXPORT_TIMEOUT": (int, 1, _LONGEST_MS),
    "OTEL_BSP_MAX_QUEUE_SIZE": (int, 1, _LONGEST_MS),
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": (int, 1, _LONGEST_MS),
    "OTEL_TRACES_SAMPLER_ARG": (float, 0, 1),
    **{f"OTEL_EXPORTER_OTLP_{signal}TIMEOUT": (float, 1e-3, 1e6) for signal in ("", "METRICS_", "TRACES_")},
}
_LIMITS = (  # whole numbers, or "unset"
    "OTEL_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
    "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT",
)
_HEADER = re.compile(r"[ \t]*[!#-'*+.0-9A-Z^-z|~-]+[ \t]*=[ !#-+\--:<-\[\]-~]*")  # what the SDK takes for one
_SAMPLERS = ("always_on", "always_off", "traceidratio")
_CHOICES: Mapping[str, Sequence[str]] = {
    "OTEL_TRACES_SAMPLER": (*_SAMPLERS, *(f"parentbased_{name}" for name in _SAMPLERS)),
    EXEMPLAR_FILTER: ("always_on", "always_off", "trace_based"),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": ("cumulative", "delta", "lowmemory"),
    **{
        f"OTEL_EXPORTER_OTLP_{signal}COMPRESSION": ("gzip", "deflate", "none") for signal in ("", "METRICS_", "TRACES_")
    },
    **{f"OTEL_EXPORTER_OTLP_{signal}INSECURE": ("true", "false") for signal in ("", "METRICS_", "TRACES_")},
}


class SettingsError(Exception):
    """Bad input; the message is one line that says what to do."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on, besides what the SDK's exporters read themselves."""

    pid: int | None = None
    tid: int | None = None
    lport: int | None = None
    rport: int | None = None
    min_us: int | None = None
    timestamp: bool = False
    wide: bool = False
    verbose: bool = False
    export: bool = False
    table: bool = True
    attributes: tuple[str, ...] = DEFAULT_ATTRIBUTES
    buckets: Buckets = explicit_buckets()
    series_limit: int = DEFAULT_LIMIT
    span_rate: float = DEFAULT_SPAN_RATE
    flavour: str = "auto"
    user: str = "nobody"
    serve: pathlib.Path | None = None
    serve_application: tuple[int, int] | None = None  # descriptors: a listening socket, and a pipe whose end is ours

    @property
    def serves(self) -> bool:
        """Does anybody hear of his own pickups?"""
        return self.serve is not None or self.serve_application is not None


def sdk_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """OTEL_SDK_DISABLED."""
    return environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def exporter_configured(environ: Mapping[str, str] = os.environ) -> bool:
    """Does any standard variable name an endpoint or an exporter?"""
    exporters = [environ.get(f"OTEL_{signal}_EXPORTER", "").strip() for signal in ("METRICS", "TRACES")]
    if exporters == ["none", "none"]:
        return False
    endpoints = (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    )
    return any(name not in ("", "none") for name in exporters) or any(
        environ.get(name, "").strip() for name in endpoints
    )


def spans_exported(environ: Mapping[str, str] = os.environ) -> bool:
    """OTEL_TRACES_EXPORTER, where anything is exported."""
    return environ.get("OTEL_TRACES_EXPORTER", "").strip() != "none"


def check_endpoint(url: str) -> str:
    """A collector's address; raises SettingsError unless it is http:// or https:// with a host."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        valid = valid and url.isprintable() and " " not in url
    except ValueError:
        valid = False
    if not valid:
        shown = _without_secrets(url)
        raise SettingsError(f"{shown!r} is not a collector's address: write http://HOST:4317, or https:// for TLS")
    return url


def _without_secrets(url: str) -> str:
    """What may be printed of an address, which need not be a valid one: no user, no password, no query."""
    url, query, _ = url.partition("?")
    private, at, host = url.rpartition("@")
    scheme, slashes, _ = private.rpartition("://")
    return scheme + slashes + ("***@" if at else "") + host + (query and "?***")


def parse_attributes(text: str) -> tuple[str, ...]:
    """The metric's attributes from a comma-separated list; an empty one is one series for all. Raises SettingsError."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in ATTRIBUTES:
            raise SettingsError(f"there is no attribute {name!r}: choose from {', '.join(ATTRIBUTES)}")
    return names


def parse_boundaries(text: str) -> tuple[float, ...]:
    """Bucket boundaries in seconds from a comma-separated list. Raises SettingsError."""
    try:
        bounds_s = tuple(float(word) for word in text.split(","))
        explicit_buckets(bounds_s)
    except BadBounds as error:
        raise SettingsError(f"--boundaries: {error}") from None
    except ValueError:
        raise SettingsError(f"--boundaries: {text!r} is not a list of seconds such as 0.001,0.01,0.1") from None
    return bounds_s


def choose_buckets(boundaries_s: Sequence[float] | None, environ: Mapping[str, str] = os.environ) -> Buckets:
    """Explicit or exponential buckets, as the standard variable says. Raises SettingsError."""
    wanted = environ.get(AGGREGATION, "").strip().lower() or "explicit_bucket_histogram"
    if wanted == "explicit_bucket_histogram":
        return explicit_buckets(boundaries_s) if boundaries_s is not None else explicit_buckets()
    if wanted != "base2_exponential_bucket_histogram":
        raise SettingsError(
            f"{AGGREGATION}={wanted} is not known: use explicit_bucket_histogram or base2_exponential_bucket_histogram"
        )
    if boundaries_s is not None:
        raise SettingsError(f"--boundaries has no meaning for the exponential histogram that {AGGREGATION} asks for")
    return exponential_buckets()


def drop_empty_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Unsets what is set to nothing: the specification has both mean the same, the SDK does not everywhere."""
    for name in [name for name, value in environ.items() if name.startswith("OTEL_") and not value.strip()]:
        del environ[name]


def check_variables(environ: Mapping[str, str] = os.environ) -> None:
    """Raises SettingsError for a variable of the export that has no meaning."""
    for name, (kind, lowest, highest) in _NUMBERS.items():
        if name in environ:
            _check_number(name, environ[name], kind, lowest, highest)
    for name in _LIMITS:
        if environ.get(name, "unset").strip().lower() != "unset":
            _check_number(name, environ[name], int, 0, _LONGEST_MS)
    for name, known in _CHOICES.items():
        if name in environ and environ[name].strip().lower() not in known:
            raise SettingsError(f"{name}={environ[name]} is not known: use one of {', '.join(known)}")
    for signal in ("", "METRICS_", "TRACES_"):
        name = f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT"
        if url := environ.get(name, "").strip():
            check_endpoint_variable(name, url if "://" in url else f"http://{url}")  # gRPC takes HOST:PORT as well
        name = f"OTEL_EXPORTER_OTLP_{signal}HEADERS"
        _check_headers(name, environ.get(name, ""))
    queue, batch = (environ.get(f"OTEL_BSP_MAX_{what}_SIZE") for what in ("QUEUE", "EXPORT_BATCH"))
    if queue and batch and int(batch) > int(queue):
        raise SettingsError(f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={batch} is more than OTEL_BSP_MAX_QUEUE_SIZE={queue}")


def _check_number(name: str, text: str, kind: type[int] | type[float], lowest: float, highest: float) -> None:
    try:
        valid = lowest <= kind(text) <= highest
    except ValueError:
        valid = False
    if not valid:
        what = "whole number" if kind is int else "number"
        raise SettingsError(f"{name}={text} is not a {what} from {lowest:.15g} to {highest:.15g}")


def _check_headers(name: str, text: str) -> None:
    for number, entry in enumerate(map(str.strip, text.split(",")), 1):
        if entry and not (_HEADER.fullmatch(entry) and unquote(entry).strip().isprintable()):
            raise SettingsError(f"{name}: entry {number} is not NAME=VALUE, URL-encoded (it may be secret: not shown)")


def check_endpoint_variable(name: str, url: str) -> None:
    """As check_endpoint, naming the variable."""
    try:
        check_endpoint(url)
    except SettingsError as error:
        raise SettingsError(f"{name}: {error}") from None


def export_interval_s(environ: Mapping[str, str] = os.environ) -> float:
    """OTEL_METRIC_EXPORT_INTERVAL, which has been checked, in seconds."""
    return float(environ.get("OTEL_METRIC_EXPORT_INTERVAL", DEFAULT_EXPORT_INTERVAL_MS)) / 1e3
