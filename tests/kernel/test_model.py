"""Random segments and random reads, against a small model of what must become of each."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel.traced import Traced, accept, eventually
from support.tun import TunPeer

UNIT = 7  # bytes of the grid that segments start and end on; reads ignore it
LIMIT = 40  # of that grid


@dataclass
class Model:
    """What the receiver's books should say. Offsets are in bytes of the stream.

    Behind a gap, neighbours of equal length make a run; a segment that lies within one run brings nothing new. When the
    gap closes, segments are taken by their start, and one that the taken ones cover is a duplicate.
    """

    received: int = 0
    duplicate: int = 0
    next_offset: int = 0
    copied: int = 0
    observed: int = 0
    readable: list[int] = field(default_factory=list)  # where unread segments end
    runs: list[tuple[int, int, int]] = field(default_factory=list)  # (start, length, count), behind gaps

    def send(self, start: int, end: int) -> None:
        self.received += 1
        if end <= self.next_offset:
            self.duplicate += 1
        elif start > self.next_offset:
            self._keep(start, end)
        else:
            self._take(end)
            while self.runs and self.runs[0][0] <= self.next_offset:
                first, length, count = self.runs.pop(0)
                for index in range(count):
                    self._take(first + (index + 1) * length)

    def _take(self, end: int) -> None:
        if end <= self.next_offset:
            self.duplicate += 1
            return
        self.readable.append(end)
        self.next_offset = end

    def _keep(self, start: int, end: int) -> None:
        length, at = end - start, sum(run[0] < start for run in self.runs)
        if at:
            first, its_length, count = self.runs[at - 1]
            its_end = first + its_length * count
            if end <= its_end:
                self.duplicate += 1
                return
            if its_end == start and its_length == length:
                self.runs[at - 1] = first, length, count + 1
                return
        if at < len(self.runs):
            first, its_length, count = self.runs[at]
            if first == start and end <= first + its_length * count:
                self.duplicate += 1
                return
            if first == end and its_length == length:
                self.runs[at] = start, length, count + 1
                return
        self.runs.insert(at, (start, length, 1))

    def read(self, length: int) -> None:
        self.copied = min(self.copied + length, self.next_offset)
        done = sum(end <= self.copied for end in self.readable)
        self.observed += done
        del self.readable[:done]

    @property
    def unread(self) -> int:
        return len(self.readable) + sum(count for _, _, count in self.runs)

    def books(self, *, closed: bool) -> dict[str, int]:
        books = {"received": self.received, "observed": self.observed, "duplicate": self.duplicate}
        if closed:
            books["unread"] = self.unread
        return {name: count for name, count in books.items() if count}


SEGMENT = st.tuples(st.just("send"), st.integers(0, LIMIT), st.integers(1, 5))
READ = st.tuples(st.sampled_from(["read", "peek"]), st.integers(1, LIMIT * UNIT), st.just(0))
NEXT = st.tuples(st.just("next"), st.just(0), st.integers(1, 3))
STEPS = st.lists(st.one_of(SEGMENT, SEGMENT, NEXT, READ), min_size=1, max_size=60)


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS, isn=st.sampled_from([0, 0xFFFFFF80, 0x7FFFFF80]))
def test_random_segments_and_reads(traced: Traced, peer: TunPeer, steps: list[tuple[str, int, int]], isn: int) -> None:
    conversation = accept(peer, isn=isn)
    model = Model()
    traced.begin()
    for action, where, units in steps:
        if action in ("send", "next"):
            start = model.next_offset if action == "next" else where * UNIT
            conversation.send(units * UNIT, at=start)
            model.send(start, start + units * UNIT)
            continue
        with contextlib.suppress(BlockingIOError):
            conversation.socket.recv(where, socket.MSG_DONTWAIT | (socket.MSG_PEEK if action == "peek" else 0))
        if action == "read":
            model.read(where)
            assert traced.books.get("observed", 0) == model.observed
    conversation.send(UNIT, at=model.next_offset)
    model.send(model.next_offset, model.next_offset + UNIT)
    conversation.socket.recv(1, socket.MSG_PEEK)  # the stack's last word on what is behind a gap is heard at a hook
    assert traced.waits().count == model.observed
    assert traced.books == model.books(closed=False)
    conversation.socket.close()
    conversation.rst()
    eventually(lambda: traced.life.get("sockets_closed"), "a destroyed socket")
    assert traced.books == model.books(closed=True)
