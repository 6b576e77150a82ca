"""The bodies of requests and answers: decoding those that arrive, encoding those that go back."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from .faults import Answer
from .records import Message, Protocol, Signal


@dataclass(frozen=True)
class RawRequest:
    """A request as a server hands it on: the body as sent, and what was said about it.

    encoding, content_type: in lower case and without parameters.
    """

    signal: Signal
    protocol: Protocol
    headers: dict[str, str]
    body: bytes
    encoding: str
    content_type: str


# What a server asks for every request whose body reached it: keep this, and say how to answer it.
Take = Callable[[RawRequest], Answer]


@dataclass(frozen=True)
class Decoded:
    """A request's message, and its size as `Request.bytes` has it; with a refusal the message is empty."""

    message: Message
    size: int
    refusal: Answer | None = None


class _Refusal(Exception):
    """A body that is not taken, with the answer for it."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.message)
        self.answer = answer


def _undecodable(message: str) -> _Refusal:
    return _Refusal(Answer("undecodable", grpc.StatusCode.INVALID_ARGUMENT, 400, message=message))


def _unsupported(message: str) -> _Refusal:
    return _Refusal(Answer("unsupported", grpc.StatusCode.UNIMPLEMENTED, 415, message=message))


def _too_large(limit: int) -> _Refusal:
    message = f"request larger than {limit} bytes"
    return _Refusal(Answer("too_large", grpc.StatusCode.RESOURCE_EXHAUSTED, 413, message=message))


def _decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its encoding ("identity", "gzip" or "deflate", which is zlib's format), at most `limit` bytes.

    Raises _Refusal: too large, not in that format, cut short, or an unknown encoding.
    """
    if encoding == "identity":
        data = body
    elif encoding in ("gzip", "deflate"):
        decompressor = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
        try:
            data = decompressor.decompress(body, limit + 1)
        except zlib.error as error:
            raise _undecodable(f"body is not {encoding}: {error}") from error
        if len(data) <= limit and (not decompressor.eof or decompressor.unused_data):
            raise _undecodable(f"{encoding} body is cut short or has something after its end")
    else:
        raise _unsupported(f"encoding {encoding!r} is not taken, only gzip, deflate and identity")
    if len(data) > limit:
        raise _too_large(limit)
    return data


def grpc_encoding(body: bytes) -> str:
    """The compression of a gRPC message, by its first bytes.

    No message of the two types taken here begins like gzip (0x1f) or zlib (0x78): their one field is number 1 and its
    tag is 0x0a.
    """
    if body[:2] == b"\x1f\x8b":
        return "gzip"
    return "deflate" if body[:1] == b"\x78" else "identity"


def _new_message(signal: Signal) -> Message:
    return ExportMetricsServiceRequest() if signal == "metrics" else ExportTraceServiceRequest()


def decode(raw: RawRequest, limit: int) -> Decoded:
    """The message in a body, which may have at most `limit` bytes after decompression."""
    message = _new_message(raw.signal)
    size = len(raw.body)
    try:
        if raw.content_type != "application/x-protobuf":
            raise _unsupported(f"content type {raw.content_type!r} is not taken, only application/x-protobuf")
        data = _decompressed(raw.body, raw.encoding, limit)
        size = len(data)
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            message = _new_message(raw.signal)
            raise _undecodable(f"body is no {message.DESCRIPTOR.name}: {error}") from error
    except _Refusal as error:
        return Decoded(message, size, error.answer)
    return Decoded(message, size)


def success_body(signal: Signal, answer: Answer) -> bytes:
    """The response message of an accepted request, partial success included."""
    partial = answer.name == "partial_success"
    if signal == "metrics":
        metrics = ExportMetricsServiceResponse()
        if partial:
            metrics.partial_success.rejected_data_points = answer.rejected
            metrics.partial_success.error_message = answer.message
        body: bytes = metrics.SerializeToString()
        return body
    traces = ExportTraceServiceResponse()
    if partial:
        traces.partial_success.rejected_spans = answer.rejected
        traces.partial_success.error_message = answer.message
    body = traces.SerializeToString()
    return body


def retry_info(seconds: float) -> RetryInfo:
    info = RetryInfo()
    info.retry_delay.FromNanoseconds(round(seconds * 1e9))
    return info


def status_of(answer: Answer) -> Status:
    """The google.rpc.Status of a refusal: HTTP's body, and gRPC's details."""
    status = Status(code=cast(int, answer.grpc_code.value[0]), message=text_of(answer))
    if answer.retry_after_s is not None:
        status.details.add().Pack(retry_info(answer.retry_after_s))
    return status


def text_of(answer: Answer) -> str:
    """What a refusal says to people."""
    return answer.message or f"refused on demand: {answer.name}"


def joined(pairs: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """Headers or metadata as `Request.headers` has them; binary values in hex."""
    headers: dict[str, str] = {}
    for name, value in pairs:
        text = value.hex() if isinstance(value, bytes) else value
        key = name.lower()
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers
