"""What a process and the broker say to each other, over a Unix stream socket.

The process sends a line of JSON, {"version", "from_ns", "pause_ns"}; the answer is one, too, {"version", "agent",
"bounds_s"} with the descriptor of the shared area as ancillary data, or {"error"} and the end. `agent` is another one
after a restart, bounds_s are the histogram's boundaries, null for exponential ones. From then on each side sends single
bytes.
"""

from __future__ import annotations

import json
from typing import Any

from ..buckets import BadBounds, Buckets, explicit_buckets, exponential_buckets

VERSION = 1
DEFAULT_PATH = "/run/otel-tcppktlat/agent.sock"
MOST_GREETING_BYTES, MOST_ANSWER_BYTES = 256, 1 << 16
REFRESH = b"r"  # the process: have my totals written; the broker: they are
LATE = b"l"  # the broker: there are late pickups
_OTHER_VERSION = "agent and application have different versions of otel-tcppktlat: install the same for both"


class ProtocolError(Exception):
    """The other side said something else; the message is one line."""


def greeting(from_ns: int, pause_ns: int) -> bytes:
    """What the process sends first: from which wait on it wants to hear of its pickups, and how often on average."""
    return json.dumps({"version": VERSION, "from_ns": from_ns, "pause_ns": pause_ns}).encode() + b"\n"


def read_greeting(line: bytes) -> tuple[int, int]:
    """from_ns and pause_ns. Raises ProtocolError."""
    said = _object(line)
    if said.get("version") != VERSION:
        raise ProtocolError(_OTHER_VERSION)
    return _ns(said, "from_ns"), _ns(said, "pause_ns")


def _ns(said: dict[str, Any], name: str) -> int:
    number = said.get(name)
    if type(number) is not int or not 0 <= number < 1 << 62:
        raise ProtocolError(f"{name} is a number of nanoseconds")
    return number


def answer(agent: str, buckets: Buckets) -> bytes:
    """What the broker sends with the area."""
    return json.dumps({"version": VERSION, "agent": agent, "bounds_s": buckets.bounds_s}).encode() + b"\n"


def refusal(reason: str) -> bytes:
    """What it sends instead."""
    return json.dumps({"error": reason}).encode() + b"\n"


def read_answer(line: bytes) -> tuple[str, Buckets]:
    """The agent and its buckets. Raises ProtocolError, with the broker's reason if it gave one."""
    said = _object(line)
    if said.get("error"):
        raise ProtocolError(" ".join(str(said["error"]).split()))
    if said.get("version") != VERSION:
        raise ProtocolError(_OTHER_VERSION)
    bounds_s = said.get("bounds_s")
    try:
        buckets = exponential_buckets() if bounds_s is None else explicit_buckets([float(bound) for bound in bounds_s])
        return str(said.get("agent")), buckets
    except (BadBounds, TypeError, ValueError):
        raise ProtocolError("the agent's buckets cannot be read") from None


def _object(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise ProtocolError("that is no line of otel-tcppktlat's")
    return said
