"""otel-tcppktlat: how long received TCP data waits until a thread reads it, as OpenTelemetry metrics and spans."""

__version__ = "0.1.0"
