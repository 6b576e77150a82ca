"""What the plugin's variables say. A bad value is named in one line, and the default holds: an application goes on."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from ..series import DEFAULT_ATTRIBUTES
from ..serving.protocol import DEFAULT_PATH
from ..settings import SettingsError, parse_attributes
from .environment_variables import (
    OTEL_PYTHON_TCPPKTLAT_ATTRIBUTES,
    OTEL_PYTHON_TCPPKTLAT_LOAD,
    OTEL_PYTHON_TCPPKTLAT_SOCKET,
    OTEL_PYTHON_TCPPKTLAT_SPAN_RATE,
    OTEL_PYTHON_TCPPKTLAT_THRESHOLD,
)

_NEVER_NS = 1 << 61

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class PluginSettings:
    """All of them."""

    socket: str = DEFAULT_PATH
    threshold_ns: int = 1_000_000
    span_rate: float = 5.0
    attributes: tuple[str, ...] = DEFAULT_ATTRIBUTES
    load: bool = True

    @property
    def from_ns(self) -> int:
        """From which wait on a pickup is to become a span."""
        return self.threshold_ns if self.span_rate else _NEVER_NS

    @property
    def pause_ns(self) -> int:
        """Between two of them, on average."""
        return round(min(1e9 / self.span_rate, _NEVER_NS)) if self.span_rate else _NEVER_NS


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1e9 or math.isnan(value):
        raise ValueError("not a number from 0 to 1e9")
    return value


def _milliseconds(text: str) -> int:
    return round(_number(text) * 1e6)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("use true or false")
    return text.lower() == "true"


def export_ports(environ: Mapping[str, str] = os.environ) -> frozenset[int]:
    """Ports of the OTLP receivers that the SDK's own variables name, or else gRPC's default."""
    names = (f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT" for signal in ("", "TRACES_", "METRICS_", "LOGS_"))
    urls = [url for name in names if (url := environ.get(name, "").strip())]
    ports = set[int]()
    for url in urls or ["localhost:4317"]:
        with contextlib.suppress(ValueError):  # it is the exporter that complains
            if port := urlsplit(url if "//" in url else f"//{url}").port:
                ports.add(port)
    return frozenset(ports)


def read_settings(environ: Mapping[str, str] = os.environ) -> PluginSettings:
    """From the variables."""

    def value(name: str, default: _Value, parse: Callable[[str], _Value]) -> _Value:
        text = environ.get(name, "").strip()
        try:
            return parse(text) if text else default
        except (ValueError, SettingsError) as error:
            _log.warning("%s=%s is ignored: %s", name, text, error)
            return default

    defaults = PluginSettings()
    return PluginSettings(
        socket=value(OTEL_PYTHON_TCPPKTLAT_SOCKET, defaults.socket, str),
        threshold_ns=value(OTEL_PYTHON_TCPPKTLAT_THRESHOLD, defaults.threshold_ns, _milliseconds),
        span_rate=value(OTEL_PYTHON_TCPPKTLAT_SPAN_RATE, defaults.span_rate, _number),
        attributes=value(OTEL_PYTHON_TCPPKTLAT_ATTRIBUTES, defaults.attributes, parse_attributes),
        load=value(OTEL_PYTHON_TCPPKTLAT_LOAD, defaults.load, _truth),
    )
