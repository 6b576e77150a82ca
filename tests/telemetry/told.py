"""What a receiver was told: histograms and books, whichever temporality; and an agent that sees one port only."""

from __future__ import annotations

import bisect
import contextlib
import math
import pathlib
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from otel_tcppktlat.demo.receiver import ExemplarRecord, Point, Receiver, SpanRecord
from support.agent import PATIENCE, Agent

DURATION = "tcppktlat.receive_queue.duration"
RECEIVED, SETTLED, QUEUED = (f"tcppktlat.segments.{name}" for name in ("received", "settled", "queued"))
SUPPRESSED, DROPPED = "tcppktlat.spans.suppressed", "tcppktlat.spans.dropped"
REJECTED = "tcppktlat.points.rejected"
BOOKS = (RECEIVED, SETTLED, QUEUED)
DEFAULT_BOUNDS_S = tuple(float(f"{step}e{power}") for power in range(-6, 1) for step in (1, 2, 5)) + (10.0,)

AttributeKey = frozenset[tuple[str, Any]]


class Listener:
    """A listening socket, and connections to it; a context manager. Clients send at once."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, dual_stack: bool = False) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=dual_stack)
        self.host, self.port = host, int(self._server.getsockname()[1])
        self._open: list[socket.socket] = [self._server]

    def connect(self, host: str | None = None) -> tuple[socket.socket, socket.socket]:
        """(the client's socket, the server's)."""
        client = socket.create_connection((host or self.host, self.port))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.append(client)
        return client, self.accept()

    def accept(self) -> socket.socket:
        """The server's socket of a connection that somebody made."""
        server, _ = self._server.accept()
        self._open.append(server)
        return server

    def fileno(self) -> int:
        """The listening socket's descriptor."""
        return self._server.fileno()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._open:
            sock.close()


def deliver(sender: socket.socket, reader: socket.socket, wait_s: float = 0.0, length: int = 100) -> None:
    """One segment, read after `wait_s` in one pickup."""
    sender.sendall(b"x" * length)
    time.sleep(wait_s)
    assert len(reader.recv(length, socket.MSG_WAITALL)) == length


def queued_for(reader: socket.socket, length: int) -> None:
    """Waits until so many bytes wait to be read."""
    while len(reader.recv(length, socket.MSG_PEEK)) < length:
        time.sleep(0.001)


@dataclass
class Scene:
    """An agent that sees the listener's port, and the receiver that it exports to."""

    listener: Listener
    receiver: Receiver
    agent: Agent

    def settle(self) -> None:
        """Waits until an interval that began later has been exported as a whole."""
        settle(self.receiver)


@contextlib.contextmanager
def scene(
    folder: pathlib.Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    protocol: str = "grpc",
    receiver: Receiver | None = None,
    host: str = "127.0.0.1",
    dual_stack: bool = False,
    side: str = "-l",
    prefix: Sequence[str] = (),
) -> Iterator[Scene]:
    """Starts all three; returns when the agent counts.

    side: whether the port is the local one of what is measured ("-l") or the remote one ("-r"). prefix: the Agent's.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(Listener(host, dual_stack=dual_stack))
        if receiver is None:
            receiver = stack.enter_context(Receiver())
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            **(environment or {}),
        }
        agent = stack.enter_context(
            Agent(folder, ["-v", side, str(listener.port), *arguments], variables, prefix=prefix)
        )
        agent.wait_for_stderr("otel-tcppktlat: attached")
        yield Scene(listener, receiver, agent)


def settle(receiver: Receiver, timeout_s: float = 60) -> None:
    """Waits until an interval that began later has been exported as a whole: until the next but one begins."""
    now_unix_ns = time.time_ns()

    def told(seen: Receiver) -> bool:
        return len({point.time_unix_ns for point in seen.points(RECEIVED) if point.time_unix_ns > now_unix_ns}) >= 3

    receiver.wait_for(told, timeout_s)


def eventually(condition: Callable[[], object], timeout_s: float = 60, what: object = None) -> None:
    """Waits for `what` must come, however long it takes."""
    end_s = time.monotonic() + timeout_s * PATIENCE
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


@dataclass
class Waits:
    """A histogram: counts by bucket, which is an index of the bounds or of the exponential histogram."""

    count: int = 0
    sum_s: float = 0.0
    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, point: Point) -> None:
        self.count += point.count or 0
        self.sum_s += point.sum or 0.0
        self.buckets.update(bucket_counts(point))


def bucket_counts(point: Point) -> dict[int, int]:
    """Counts by index, without the empty ones."""
    if point.kind == "histogram":
        return {index: count for index, count in enumerate(point.bucket_counts) if count}
    assert point.offset is not None and not point.zero_count and not point.negative_counts
    return {point.offset + index: count for index, count in enumerate(point.positive_counts) if count}


def bucket_of(point: Point, value_s: float) -> int:
    """The bucket that a back end finds for a value."""
    if point.kind == "histogram":
        return bisect.bisect_left(point.bounds, value_s)
    assert point.scale is not None
    mantissa, exponent = math.frexp(value_s)
    if mantissa == 0.5:  # a power of two is the inclusive upper bound of its bucket
        return ((exponent - 1) << point.scale) - 1
    return math.ceil(math.log2(value_s) * (1 << point.scale)) - 1


def key_of(point: Point) -> AttributeKey:
    """The point's attributes."""
    return frozenset(point.attributes.items())


def latest(points: Sequence[Point]) -> dict[AttributeKey, Point]:
    """The last point of each set of attributes."""
    return {key_of(point): point for point in points}


def waits_by_attributes(receiver: Receiver) -> dict[AttributeKey, Waits]:
    """All that the histogram's points say, whichever temporality."""
    points = receiver.points(DURATION)
    found: dict[AttributeKey, Waits] = {}
    chosen = points if points and points[0].temporality == "delta" else list(latest(points).values())
    for point in chosen:
        found.setdefault(key_of(point), Waits()).add(point)
    return found


def waits(receiver: Receiver) -> Waits:
    """The sum of all."""
    total = Waits()
    for part in waits_by_attributes(receiver).values():
        total.count += part.count
        total.sum_s += part.sum_s
        total.buckets.update(part.buckets)
    return total


def number(receiver: Receiver, metric: str, **attributes: Any) -> int:
    """A counter's total, whichever temporality, over the points that have these attributes (`_` stands for a dot)."""
    wanted = {name.replace("_", "."): value for name, value in attributes.items()}
    points = [point for point in receiver.points(metric) if wanted.items() <= point.attributes.items()]
    chosen = points if points and points[0].temporality == "delta" else list(latest(points).values())
    return sum(int(point.value or 0) for point in chosen)


def books(receiver: Receiver) -> dict[str, int]:
    """received, queued, and each outcome that is not 0."""
    outcomes: Counter[str] = Counter()
    points = receiver.points(SETTLED)
    for point in points if points and points[0].temporality == "delta" else latest(points).values():
        outcomes[point.attributes["tcppktlat.outcome"]] += int(point.value or 0)
    return {
        "received": number(receiver, RECEIVED),
        "queued": number(receiver, QUEUED),
        **{name: count for name, count in outcomes.items() if count},
    }


def check_balance(receiver: Receiver) -> dict[str, int]:
    """What must hold whenever traffic rests; returns the books."""
    said = books(receiver)
    assert said["received"] == sum(said.values()) - said["received"], said
    assert said.get("observed", 0) == waits(receiver).count, said
    return said


def dropped(receiver: Receiver, reason: str) -> int:
    """Spans that no receiver gets, by reason."""
    return number(receiver, DROPPED, tcppktlat_reason=reason)


def length_ns(span: SpanRecord) -> int:
    """How long it took."""
    return span.end_unix_ns - span.start_unix_ns


def spans_by_id(receiver: Receiver) -> dict[tuple[str, str], SpanRecord]:
    """The spans by (trace id, span id)."""
    return {(span.trace_id, span.span_id): span for span in receiver.spans()}


def exemplars(receiver: Receiver) -> list[tuple[Point, ExemplarRecord]]:
    """All exemplars with their points."""
    return [(point, exemplar) for point in receiver.points(DURATION) for exemplar in point.exemplars]
