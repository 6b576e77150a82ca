"""The bounds of the histogram's buckets: the user's or the default ones, or those of an exponential histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BOUNDS = 127  # the kernel's histogram has at most 128 buckets

# 1-2-5 from 1 us to 10 s.
DEFAULT_BOUNDS_S: tuple[float, ...] = (
    *(float(f"{step}e{power}") for power in range(-6, 1) for step in (1, 2, 5)),
    10.0,
)

# OpenTelemetry's exponential histogram (metrics data model, "ExponentialHistogram"): at scale s, base = 2^(2^-s), and
# bucket i holds (base^i, base^(i+1)] of the unit, here seconds. At scale 2 the bounds are 2^(k/4) s. These k cover 0.3
# us to 17 min; what is outside goes to the buckets at the ends.
SCALE = 2
FIRST_EXPONENT, LAST_EXPONENT = -86, 40


class BadBounds(ValueError):
    """The bounds cannot be used; the message says why."""


@dataclass(frozen=True)
class Buckets:
    """Upper bounds, inclusive, in ns as the kernel compares them, and how they are told to OpenTelemetry.

    bounds_s: the explicit bounds in seconds, or None for the exponential histogram.
    """

    bounds_ns: tuple[int, ...]
    bounds_s: tuple[float, ...] | None

    def limits_s(self, bucket: int) -> tuple[float, float]:
        """(lower, upper] of a bucket in seconds, as a back end understands it."""
        if self.bounds_s is None:
            index = FIRST_EXPONENT - 1 + bucket
            return 2.0 ** (index / 2**SCALE), 2.0 ** ((index + 1) / 2**SCALE)
        lower = self.bounds_s[bucket - 1] if bucket else 0.0
        return lower, self.bounds_s[bucket] if bucket < len(self.bounds_s) else math.inf


def _whole_ns(bound_s: float) -> int:
    """The longest wait in ns that a back end, which gets it as a float of seconds, does not find above the bound."""
    nearest = round(bound_s * 1e9)
    return nearest if nearest / 1e9 <= bound_s else nearest - 1


def explicit_buckets(bounds_s: Sequence[float] = DEFAULT_BOUNDS_S) -> Buckets:
    """Buckets with these upper bounds. Raises BadBounds unless they are 1 to 127 growing numbers of at least 1 ns."""
    if not bounds_s:
        raise BadBounds("there is no bound")
    if len(bounds_s) > MAX_BOUNDS:
        raise BadBounds(f"there are {len(bounds_s)} bounds, and {MAX_BOUNDS} is the most")
    if not all(math.isfinite(bound) and 1e-9 <= bound <= 1e9 for bound in bounds_s):
        raise BadBounds("a bound is a number of seconds from 1e-9 to 1e9")
    bounds_ns = tuple(_whole_ns(bound) for bound in bounds_s)
    if any(lower >= upper for lower, upper in zip(bounds_ns, bounds_ns[1:], strict=False)):
        raise BadBounds("each bound has to be larger than the one before it, by 1 ns at least")
    return Buckets(bounds_ns, tuple(bounds_s))


def exponential_buckets() -> Buckets:
    """The buckets of an exponential histogram of seconds, scale 2."""
    exponents = range(FIRST_EXPONENT, LAST_EXPONENT + 1)
    return Buckets(tuple(_whole_ns(2 ** (k / 2**SCALE)) for k in exponents), None)
