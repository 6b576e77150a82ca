"""The SDK's gRPC exporters, with a Watch that knows what became of each call. Imported only where gRPC is used."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from .diagnosis import Failure, NotDelivered, note_failure, note_partial_success


class _Stub:
    """The service's stub, and what its answers say that the SDK does not look at."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def Export(self, **arguments: Any) -> Any:
        """Raises NotDelivered for what the SDK would send again as it is, in vain."""
        try:
            response = self._stub.Export(**arguments)
        except grpc.RpcError as error:
            failure = Failure(error.code().name, error.details() or "", "", _retry_delay_s(error.trailing_metadata()))
            note_failure(failure)
            if failure.of_size:
                raise NotDelivered(failure.detail) from error
            raise
        note_partial_success(response)
        return response


def _retry_delay_s(trailers: Any) -> float:
    """google.rpc.RetryInfo, in the status's details or in the trailer that the SDK looks at; 0 if there is none."""
    found = RetryInfo()
    for name, value in trailers or ():
        with contextlib.suppress(DecodeError):
            if name == "google.rpc.retryinfo-bin":
                found.ParseFromString(value)
            elif name == "grpc-status-details-bin":
                for detail in Status.FromString(value).details:
                    detail.Unpack(found)
    return max(0.0, float(found.retry_delay.ToNanoseconds()) / 1e9)


def watched(loaded: Any) -> Any:
    """The exporter's class with such a stub: it makes a new one whenever it connects anew."""

    class Watched(loaded):  # type: ignore[misc]
        def _initialize_channel_and_stub(self) -> None:
            super()._initialize_channel_and_stub()
            self._client: Any = _Stub(self._client)

    return Watched
