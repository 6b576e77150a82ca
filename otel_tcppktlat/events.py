"""The kernel's events in user space's terms: the attributes of a span, and of an exemplar."""

from __future__ import annotations

from .probe.layout import Event
from .series import AttributeSet, AttributeValue, role
from .text import address_text, name_text, network_type


def exemplar_attributes(event: Event, metric_attributes: AttributeSet) -> dict[str, AttributeValue]:
    """The attributes of the measurement that the metric's point lacks.

    pid, thread id and comm only: Prometheus keeps 128 characters of an exemplar's labels or none of them, and the ids
    take 63. The rest is on the span.
    """
    known = {name for name, _ in metric_attributes}
    candidates: dict[str, AttributeValue] = {
        "process.pid": int(event.tgid),
        "thread.id": int(event.tid),
        "thread.name": name_text(event.comm),
    }
    return {name: value for name, value in candidates.items() if name not in known}


def span_attributes(event: Event, metric_attributes: AttributeSet) -> dict[str, AttributeValue]:
    """The attributes of a `tcp receive` span: the metric's, and who and where exactly."""
    return {
        **dict(metric_attributes),
        "process.pid": int(event.tgid),
        "thread.id": int(event.tid),
        "thread.name": name_text(event.comm),
        "network.local.address": address_text(event.family, bytes(event.local_address)),
        "network.local.port": int(event.local_port),
        "network.peer.address": address_text(event.family, bytes(event.remote_address)),
        "network.peer.port": int(event.remote_port),
        "network.transport": "tcp",
        "network.type": network_type(event.family),
        "tcppktlat.role": role(event.role),
        "tcppktlat.segments": int(event.segments),
        "tcppktlat.bytes": int(event.bytes),
    }
