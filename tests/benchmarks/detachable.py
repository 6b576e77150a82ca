"""The agent as it is, but it detaches its programs when a line comes on stdin: the benchmark then attaches them."""

from __future__ import annotations

import os
import sys
import threading
from unittest import mock

from otel_tcppktlat.cli import main
from otel_tcppktlat.probe.launch import Loaded
from otel_tcppktlat.probe.probe import Probe

_open = Probe.open


def _open_detachable(probe: Probe) -> Loaded:
    loaded = _open(probe)

    def detach() -> None:
        if sys.stdin.readline():
            for name, fd in loaded.descriptors.items():
                if name.startswith("link:"):
                    os.close(fd)

    threading.Thread(target=detach, daemon=True).start()
    return loaded


if __name__ == "__main__":
    with mock.patch.object(Probe, "open", _open_detachable):
        main()
