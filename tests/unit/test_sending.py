"""What follows from how an export ended; and who still waits for one that hangs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

import pytest
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, detach, get_value, set_value
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_tcppktlat.telemetry.diagnosis import Ended, Failure, Target, Watch
from otel_tcppktlat.telemetry.sending import Fate, Sender, fate

TOO_LARGE = (  # in the words of grpc-go, gRPC's C core, grpc-java, grpc-dotnet, tonic, and of proxies
    Failure("RESOURCE_EXHAUSTED", "grpc: received message larger than max (5242880 vs. 4194304)"),
    Failure("RESOURCE_EXHAUSTED", "grpc: received message after decompression larger than max 4194304"),
    Failure("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (5242880 vs. 4194304)"),
    Failure("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 5242880"),
    Failure("RESOURCE_EXHAUSTED", "Received message exceeds the maximum configured message size."),
    Failure(
        "OUT_OF_RANGE", "Error, decoded message length too large: found 5242880 bytes, the limit is: 4194304 bytes"
    ),
    Failure("UNKNOWN", "Received http2 header with status: 413"),
    Failure(413, "Request Entity Too Large"),
    Failure(400, "Bad Request", said="http: request body too large"),  # an OpenTelemetry Collector
)
LATER = (
    Failure(None, "Connection refused"),
    Failure("UNAVAILABLE", "failed to connect to all addresses"),
    Failure("DEADLINE_EXCEEDED", "Deadline Exceeded"),
    Failure("RESOURCE_EXHAUSTED", "ingestion rate limit (10000) exceeded while adding 512 samples"),
    Failure(
        "RESOURCE_EXHAUSTED", "RATE_LIMITED: ingestion rate limit (15000000 bytes) exceeded while adding 300000 bytes"
    ),
    Failure("RESOURCE_EXHAUSTED", "data refused due to high memory usage"),
    *(Failure(status, "") for status in (302, 408, 429, 502, 503, 504)),
    Failure(200, "OK with a web page"),
)
DENIED = (
    *(Failure(status, "") for status in (401, 403, 404, 405, 500, 501)),
    *(
        Failure(status, "")
        for status in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "INTERNAL", "UNKNOWN")
    ),
    Failure(400, "Bad Request", from_page=True),  # as Go's servers answer plain HTTP on their TLS port
)
REFUSED = (
    Failure("INVALID_ARGUMENT", "bad data"),
    Failure(400, "Bad Request", said="out of order sample"),
    Failure(422, "Unprocessable Entity"),
)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        *((failure, Fate.TOO_LARGE) for failure in TOO_LARGE),
        *((failure, Fate.FAILED) for failure in LATER),
        *((failure, Fate.DENIED) for failure in DENIED),
        *((failure, Fate.REFUSED) for failure in REFUSED),
    ],
    ids=str,
)
def test_fate(failure: Failure, expected: Fate) -> None:
    assert fate(Ended(False, failure)) is expected


def test_fate_without_a_reason() -> None:
    """A third party's word is final for its spans; who was not waited for may come again."""
    assert fate(Ended(True)) is Fate.DELIVERED
    assert fate(Ended(False)) is Fate.DENIED
    assert fate(Ended(False, abandoned=True)) is Fate.FAILED


class Hanging(SpanExporter):
    """Does not come back until it is shut down, and then says that it has failed; another one works at once."""

    def __init__(self, made: list[Hanging]) -> None:
        self.first, self.began, self.over = not made, threading.Event(), threading.Event()
        made.append(self)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.began.set()
        if not self.first:
            return SpanExportResult.SUCCESS
        self.over.wait(60)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.over.set()


def test_letting_go(caplog: pytest.LogCaptureFixture) -> None:
    """Only of what was under way when the end began, and quietly; the next goes by another exporter."""
    made: list[Hanging] = []
    watch = Watch(Target("traces", "grpc", urlsplit("http://127.0.0.1:9"), False, [], {}))
    sender: Sender[SpanExporter] = Sender(lambda: Hanging(made), watch, SpanExportResult.SUCCESS)
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(sender.send([])))
    thread.start()
    assert made[0].began.wait(60)
    sender.let_go()
    assert len(made) == 1  # nothing was told to end
    sender.ending()
    sender.let_go()
    thread.join(60)
    assert ended == [Ended(False, abandoned=True)] and made[0].over.is_set() and len(made) == 2
    watch.tell(ended[0])
    assert sender.send([]).delivered
    sender.let_go()
    assert len(made) == 2
    watch.conclude()
    assert caplog.records == []


def test_the_sdks_context_goes_along() -> None:
    """Instrumented libraries make no spans of exports: the SDK says so in its context."""
    found: list[object] = []

    class Looks(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            found.append(get_value(_SUPPRESS_INSTRUMENTATION_KEY))
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

    sender: Sender[SpanExporter] = Sender(Looks, Watch(None), SpanExportResult.SUCCESS)
    token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
    assert sender.send([]).delivered
    detach(token)
    assert found == [True]
