"""The loader: a short-lived privileged process, the only part that knows bcc.

It runs under the distribution's Python (3.9 or later), with the standard library and bcc only.
"""

# How an interpreter becomes the loader: `python -I -c START` with the folder of this package, the socket's descriptor,
# and further interpreters to try. Appended, not prepended: the interpreter's own packages go first, bcc among them.
START = "import sys; sys.path.append(sys.argv[1]); from otel_tcppktlat.probe.loader.__main__ import main; main()"
