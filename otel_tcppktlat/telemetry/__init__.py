"""From what the kernel counted to OpenTelemetry: metrics with exemplars, spans, and the exporters that carry them."""
