"""What the user asked for, checked: from the command line and the standard variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .buckets import BadBounds, Buckets, explicit_buckets, exponential_buckets
from .series import ATTRIBUTES, DEFAULT_ATTRIBUTES, DEFAULT_LIMIT

AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
DEFAULT_SPAN_RATE = 100.0
DEFAULT_EXPORT_INTERVAL_MS = 60_000.0


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


def check_endpoint(url: str) -> str:
    """A collector's address; raises SettingsError unless it is http:// or https:// with a host."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError(f"{url!r} is not a collector's address: write http://HOST:4317, or https:// for TLS")
    return url


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


def export_interval_s(environ: Mapping[str, str] = os.environ) -> float:
    """OTEL_METRIC_EXPORT_INTERVAL in seconds. Raises SettingsError."""
    text = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    try:
        interval_ms = float(text) if text else DEFAULT_EXPORT_INTERVAL_MS
    except ValueError:
        interval_ms = math.nan
    if not 0 < interval_ms < math.inf:
        raise SettingsError(f"OTEL_METRIC_EXPORT_INTERVAL={text} is not a number of milliseconds above 0")
    return interval_ms / 1e3
