"""`otel-tcppktlat`, and `python -m otel_tcppktlat`."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the agent takes it: no traceback from the middle of an import

from .cli import main  # noqa: E402

if __name__ == "__main__":
    main()
