"""The kernel's buckets are those that a back end finds for the same waits."""

from __future__ import annotations

import bisect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_tcppktlat.buckets import (
    DEFAULT_BOUNDS_S,
    FIRST_EXPONENT,
    LAST_EXPONENT,
    MAX_BOUNDS,
    BadBounds,
    explicit_buckets,
    exponential_buckets,
)

BOUNDS_S = st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=MAX_BOUNDS, unique=True).map(sorted)


def kernel_bucket(bounds_ns: tuple[int, ...], ns: int) -> int:
    """How many upper bounds are below (bucket_of() in bpf/series.h)."""
    return sum(bound < ns for bound in bounds_ns)


@given(BOUNDS_S, st.integers(0, 10**15), st.data())
def test_explicit(bounds_s: list[float], ns: int, data: st.DataObject) -> None:
    """Also right at a bound and beside it."""
    try:
        buckets = explicit_buckets(bounds_s)
    except BadBounds:
        return  # closer than 1 ns
    near = data.draw(st.sampled_from(buckets.bounds_ns)) + data.draw(st.integers(-1, 1))
    for wait_ns in (ns, near):
        bucket = kernel_bucket(buckets.bounds_ns, wait_ns)
        assert bucket == bisect.bisect_left(bounds_s, wait_ns / 1e9)
        lower, upper = buckets.limits_s(bucket)
        assert lower < wait_ns / 1e9 <= upper or (wait_ns == 0 and bucket == 0)


def test_default_bounds() -> None:
    buckets = explicit_buckets()
    assert buckets.bounds_ns == tuple(step * 10**power for power in range(3, 10) for step in (1, 2, 5)) + (10**10,)
    assert buckets.bounds_s == DEFAULT_BOUNDS_S == tuple(ns / 1e9 for ns in buckets.bounds_ns)


def test_exponential_bounds_are_exact() -> None:
    """The largest whole ns not above 2^(k/4) s: its fourth power is at most 2^k s^4."""
    for k, bound in zip(range(FIRST_EXPONENT, LAST_EXPONENT + 1), exponential_buckets().bounds_ns, strict=True):
        numerator, denominator = 10**36 * 2 ** max(k, 0), 2 ** max(-k, 0)
        assert bound**4 * denominator <= numerator < (bound + 1) ** 4 * denominator
    assert len(exponential_buckets().bounds_ns) == MAX_BOUNDS


@given(st.integers(300, 10**12))
def test_exponential(ns: int) -> None:
    """OpenTelemetry's index: base^i < value <= base^(i + 1), base 2^(1/4), compared as fourth powers."""
    bucket = kernel_bucket(exponential_buckets().bounds_ns, ns)
    index = FIRST_EXPONENT - 1 + bucket
    assert ns**4 * 2**200 > 10**36 * 2 ** (200 + index)
    assert ns**4 * 2**200 <= 10**36 * 2 ** (200 + index + 1)
    lower, upper = exponential_buckets().limits_s(bucket)
    assert lower < ns / 1e9 <= upper


@pytest.mark.parametrize(
    "bounds_s", [[], [0.0], [-1.0], [math.nan], [math.inf], [1.0, 1.0], [2.0, 1.0], [1.0, 1.0 + 1e-12], [1.0] * 128]
)
def test_bad_bounds(bounds_s: list[float]) -> None:
    with pytest.raises(BadBounds):
        explicit_buckets(bounds_s)
