"""`python -m otel_tcppktlat`."""

from .cli import main

main()
