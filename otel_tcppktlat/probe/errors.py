"""What may go wrong on the way to the kernel."""

from __future__ import annotations


class ProbeError(Exception):
    """The probe cannot run here; the message is one line that says what to do."""
