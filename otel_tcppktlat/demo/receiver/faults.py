"""The faults that a receiver can be told to answer with, and what each of them means in both protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc


@dataclass(frozen=True)
class Unavailable:
    """gRPC UNAVAILABLE, HTTP 503; with `retry_after_s` also RetryInfo and Retry-After."""

    retry_after_s: float | None = None


@dataclass(frozen=True)
class ResourceExhausted:
    """gRPC RESOURCE_EXHAUSTED, HTTP 429; with `retry_after_s` also RetryInfo and Retry-After."""

    retry_after_s: float | None = None


@dataclass(frozen=True)
class InvalidArgument:
    """gRPC INVALID_ARGUMENT, HTTP 400: not to be sent again."""


@dataclass(frozen=True)
class PartialSuccess:
    """Success with a partial_success part. The last `rejected` points or spans of the request count as refused."""

    rejected: int
    message: str = ""


@dataclass(frozen=True)
class Hang:
    """No answer for `seconds`, then UNAVAILABLE or 503. The request is kept at once, as refused."""

    seconds: float


@dataclass(frozen=True)
class Delay:
    """The request is accepted at once, the answer (success) is given after `seconds`."""

    seconds: float


@dataclass(frozen=True)
class HttpStatus:
    """An HTTP status, 300 to 599; gRPC gets the status that gRPC's own table gives for it."""

    code: int

    def __post_init__(self) -> None:
        if not 300 <= self.code <= 599:
            raise ValueError(f"HTTP status {self.code} is no fault: expected 300 to 599")


Fault = Unavailable | ResourceExhausted | InvalidArgument | PartialSuccess | Hang | Delay | HttpStatus


@dataclass(frozen=True)
class Answer:
    """What to do with one request, for both protocols."""

    name: str
    grpc_code: grpc.StatusCode = grpc.StatusCode.OK
    http_status: int = 200
    retry_after_s: float | None = None
    wait_s: float = 0.0
    rejected: int = 0
    message: str = ""

    @property
    def accepts(self) -> bool:
        return self.grpc_code is grpc.StatusCode.OK


OK = Answer("ok")
_GRPC_OF_HTTP: Mapping[int, grpc.StatusCode] = {
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.UNAVAILABLE,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}


def plan(fault: Fault) -> Answer:
    """What a fault means in both protocols."""
    if isinstance(fault, Unavailable):
        return Answer("unavailable", grpc.StatusCode.UNAVAILABLE, 503, fault.retry_after_s)
    if isinstance(fault, ResourceExhausted):
        return Answer("resource_exhausted", grpc.StatusCode.RESOURCE_EXHAUSTED, 429, fault.retry_after_s)
    if isinstance(fault, InvalidArgument):
        return Answer("invalid_argument", grpc.StatusCode.INVALID_ARGUMENT, 400)
    if isinstance(fault, PartialSuccess):
        return Answer("partial_success", rejected=fault.rejected, message=fault.message)
    if isinstance(fault, Hang):
        return Answer("hang", grpc.StatusCode.UNAVAILABLE, 503, wait_s=fault.seconds)
    if isinstance(fault, Delay):
        return Answer("delay", wait_s=fault.seconds)
    code = _GRPC_OF_HTTP.get(fault.code, grpc.StatusCode.UNKNOWN)
    return Answer(f"http_status_{fault.code}", code, fault.code)
