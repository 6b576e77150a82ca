"""Kernel memory: README's formula, beside what the kernel says of the agent's maps and programs."""

from __future__ import annotations

import pathlib

import pytest

from otel_tcppktlat.probe.libbpf import Libbpf
from support.agent import Agent
from support.kernels import kernel_version
from support.objects import kernel_bytes

MB = 1e6


def formula_bytes(series: int, buckets: int, cpus: int, raw: bool = False) -> float:
    """README, "Kernels". `cpus`: possible ones."""
    histograms = 2 * series * min(4, cpus) * (8 + 4 * buckets)
    return histograms + 293 * series + 4.86 * MB + 4_300 * cpus + raw * 8.38 * MB


def precision() -> float:
    """Before Linux 6.4 what the kernel says is its own estimate, without what a map needs beside keys and values."""
    return 0.02 if kernel_version() >= (6, 4) else 0.25


@pytest.mark.parametrize(
    ("arguments", "aggregation", "series", "buckets"),
    [
        ([], "explicit_bucket_histogram", 2048, 32),
        (["--series-limit", "10000"], "base2_exponential_bucket_histogram", 10240, 128),
        (["--flavour", "raw"], "explicit_bucket_histogram", 2048, 32),
    ],
)
def test_kernel_memory_is_what_the_formula_says(
    tmp_path: pathlib.Path, arguments: list[str], aggregation: str, series: int, buckets: int
) -> None:
    variables = {"OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": aggregation}
    with Agent(tmp_path, ["--otlp", "http://127.0.0.1:9", "-v", *arguments], variables) as agent:
        agent.wait_for_stderr("otel-tcppktlat: attached")
        found, raw = kernel_bytes(agent.pid), "flavour raw" in agent.stderr
    expected = formula_bytes(series, buckets, Libbpf().possible_cpus(), raw)
    assert found == pytest.approx(expected, rel=precision())


def test_kernel_memory_is_bounded_on_a_large_host() -> None:
    """Whether or not this one is: the formula takes the CPUs, and the test above confirms it."""
    assert formula_bytes(2048, 32, 2) < 8 * MB
    assert formula_bytes(10240, 128, 64) < 64 * MB
