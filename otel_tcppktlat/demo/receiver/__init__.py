"""An OTLP receiver inside this process, on loopback: gRPC and HTTP/protobuf, TLS and mutual TLS, faults on demand.

The demo and the tests import this package; nothing else does. It takes metrics and traces, keeps every request whose
body reached it (those it refused, too) in memory without bound (`Receiver.clear` empties it), and gives typed views of
the data points and spans that it accepted.

    with Receiver() as receiver:
        ...export to receiver.grpc_endpoint or receiver.http_endpoint + "/v1/metrics"...
        receiver.wait_for(lambda r: bool(r.points("some.metric")), timeout_s=10)

Times are in nanoseconds of Unix time where a name ends in `_unix_ns`, durations in seconds where it ends in `_s`.
"""

from .faults import (
    Delay,
    Fault,
    Hang,
    HttpStatus,
    InvalidArgument,
    PartialSuccess,
    ResourceExhausted,
    Unavailable,
)
from .receiver import Receiver
from .records import ExemplarRecord, Kind, Point, Request, SpanRecord, Temporality
from .tls import ServerTls
from .views import points_of, spans_of

__all__ = [
    "Delay",
    "ExemplarRecord",
    "Fault",
    "Hang",
    "HttpStatus",
    "InvalidArgument",
    "Kind",
    "PartialSuccess",
    "Point",
    "Receiver",
    "Request",
    "ResourceExhausted",
    "ServerTls",
    "SpanRecord",
    "Temporality",
    "Unavailable",
    "points_of",
    "spans_of",
]
