"""The gRPC side: calls to the receiver, its answers back, faults included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from .bodies import RawRequest, Take, grpc_encoding, joined, retry_info, status_of, success_body, text_of
from .ports import LOOPBACK
from .records import Signal

_GRPC_WORKERS = 16
_GRPC_GRACE_S = 0.1


class GrpcServer:
    """The gRPC side of one `Receiver.start`.

    Its handlers take the messages as bytes, still compressed, so that this module sees the encoding and the size, and
    answers INVALID_ARGUMENT (the generated code would answer INTERNAL) to what is no message.
    """

    def __init__(self, take: Take, max_wire_bytes: int, port: int, credentials: grpc.ServerCredentials | None) -> None:
        self._take = take
        self._executor = ThreadPoolExecutor(_GRPC_WORKERS, "otlp-grpc-receiver")
        self._server = grpc.server(
            self._executor,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.per_message_decompression", 0),
                ("grpc.max_receive_message_length", max_wire_bytes),
            ],
        )
        services = (
            ("metrics", metrics_service_pb2.DESCRIPTOR.services_by_name["MetricsService"].full_name),
            ("traces", trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"].full_name),
        )
        self._server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(
                    name, {"Export": grpc.unary_unary_rpc_method_handler(self._handler(cast(Signal, signal)))}
                )
                for signal, name in services
            )
        )
        address = f"{LOOPBACK}:{port}"
        try:
            if credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, credentials)
        except BaseException:
            self._executor.shutdown(wait=False)
            raise
        self._server.start()

    def _handler(self, signal: Signal) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def export(body: bytes, context: grpc.ServicerContext) -> bytes:
            encoding = grpc_encoding(body)
            headers = joined(context.invocation_metadata()) | {"grpc-encoding": encoding}
            answer = self._take(RawRequest(signal, "grpc", headers, body, encoding, "application/x-protobuf"))
            if answer.wait_s:
                gone = threading.Event()
                if not context.add_callback(gone.set) or gone.wait(answer.wait_s):
                    return b""  # the client has given up, or the server stops: nobody reads this
            if answer.accepts:
                return success_body(signal, answer)
            trailers: list[tuple[str, bytes]] = [("grpc-status-details-bin", status_of(answer).SerializeToString())]
            if answer.retry_after_s is not None:
                # The Python exporter looks for this trailer and not into grpc-status-details-bin.
                trailers.append(("google.rpc.retryinfo-bin", retry_info(answer.retry_after_s).SerializeToString()))
            context.set_trailing_metadata(tuple(trailers))
            context.abort(answer.grpc_code, text_of(answer))
            raise AssertionError("abort raises")

        return export

    def stop(self) -> threading.Event:
        """Close the port and cancel the calls that do not end soon; the event is set when that is done."""
        # Without a grace period the connections end with an error, which gRPC's C core reports on standard error.
        done: threading.Event = self._server.stop(_GRPC_GRACE_S)
        self._executor.shutdown(wait=False)
        return done


def start_grpc_server(
    take: Take, max_wire_bytes: int, port: int, credentials: grpc.ServerCredentials | None
) -> GrpcServer:
    """A gRPC server on the port; tries again while the listener of a server just stopped is still being closed."""
    deadline = time.monotonic() + 1.0
    while True:
        try:
            return GrpcServer(take, max_wire_bytes, port, credentials)
        except RuntimeError as error:
            if time.monotonic() >= deadline:
                raise OSError(f"cannot listen on {LOOPBACK}:{port}") from error
            time.sleep(0.01)
