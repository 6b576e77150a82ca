"""The plugin's variables, as `opentelemetry-instrument --help` lists them."""

OTEL_PYTHON_TCPPKTLAT_SOCKET = "OTEL_PYTHON_TCPPKTLAT_SOCKET"
"""Where the host's agent serves: the PATH of its --serve. Default: /run/otel-tcppktlat/agent.sock"""

OTEL_PYTHON_TCPPKTLAT_THRESHOLD = "OTEL_PYTHON_TCPPKTLAT_THRESHOLD"
"""Milliseconds: a shorter wait makes no span. Default: 1, at least 0.1"""

OTEL_PYTHON_TCPPKTLAT_SPAN_RATE = "OTEL_PYTHON_TCPPKTLAT_SPAN_RATE"
"""Spans a second, as an average over ten, and what is twice as slow as the slowest of late. Default: 5, at most 20"""

OTEL_PYTHON_TCPPKTLAT_ATTRIBUTES = "OTEL_PYTHON_TCPPKTLAT_ATTRIBUTES"
"""The metric's attributes, as the agent's --attributes. Default: the agent's default"""

OTEL_PYTHON_TCPPKTLAT_LOAD = "OTEL_PYTHON_TCPPKTLAT_LOAD"
"""Whether an application that may load eBPF programs does so if no agent serves: true (default) or false"""
