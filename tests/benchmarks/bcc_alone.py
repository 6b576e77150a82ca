"""Compiles and loads the agent's programs with bcc, with no agent around it: one request on stdin, phases on stdout.

Runs under the distribution's Python: the standard library, bcc and the product's loader only.
"""

from __future__ import annotations

import json
import os
import sys

from otel_tcppktlat.probe.loader.__main__ import load


def main() -> None:
    """Prints the seconds of each phase as JSON."""
    answer, _descriptors = load(json.load(sys.stdin))
    print(json.dumps(answer["seconds"]), flush=True)
    os._exit(0)  # nothing of LLVM is worth an orderly end


if __name__ == "__main__":
    main()
