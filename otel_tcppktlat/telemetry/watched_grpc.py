"""The SDK's gRPC exporters, with a Watch that knows what became of each call. Imported only where gRPC is used."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import grpc
import grpc._channel  # the first channel would import it, when the agent may be unable to
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from .diagnosis import Failure, NotDelivered, note_failure, note_partial_success

REST_AFTER_S = 2.0  # shorter than all intervals but a few, so that most agents have no connection most of the time


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
    """The exporter's class with such a stub, and with a channel only while there is something to send.

    An open channel keeps threads of gRPC's that wake up several times a second, four on two CPUs and up to sixteen on
    larger hosts. One that rests is closed, and the next export opens another.
    """

    class Watched(loaded):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            self._lock, self._exports = threading.Lock(), 0
            self._resting: threading.Timer | None = None
            self._channel: Any = None
            super().__init__(**arguments)

        def _initialize_channel_and_stub(self) -> None:
            if self._exports:  # the SDK would connect as soon as it is made
                super()._initialize_channel_and_stub()
                self._client: Any = _Stub(self._client)

        def export(self, *arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                self._exports += 1
                if self._resting:
                    self._resting.cancel()
                if self._channel is None and not self._shutdown:
                    self._initialize_channel_and_stub()
            try:
                return super().export(*arguments, **keywords)
            finally:
                with self._lock:
                    self._resting = threading.Timer(REST_AFTER_S, self._rest, (self._exports,))
                    self._resting.daemon = True
                    self._resting.start()

        def _rest(self, exports: int) -> None:
            with self._lock:
                if self._exports == exports and self._channel is not None:
                    self._channel.close()
                    self._channel = self._client = None

    return Watched
