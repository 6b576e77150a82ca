"""The kernel's records are declared twice, in bpf/maps.h and in layout.py, and both must agree."""

from __future__ import annotations

import ctypes as ct
import json
import subprocess
from typing import Any

import pytest

from kernel.traced import BOUNDS_NS
from otel_tcppktlat.probe import layout
from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON, bpf_folder
from otel_tcppktlat.probe.probe import ProbeOptions

RECORDS: dict[str, Any] = {
    "books": layout.Books,
    "process_key": layout.ProcessKey,
    "series_key": layout.SeriesKey,
    "identity": layout.Identity,
    "interval": layout.Interval,
    "event": layout.Event,
    "allowance": layout.Allowance,
    "served": layout.Served,
}
CONSTANTS = {
    "OVERFLOW": layout.OVERFLOW_SERIES,
    "SINK": layout.SINK_SERIES,
    "KIND_EXEMPLAR": layout.KIND_EXEMPLAR,
    "KIND_ROW": layout.KIND_ROW,
    "KIND_SERVED": layout.KIND_SERVED,
    "ROLE_SERVER": layout.ROLE_SERVER,
    "ROLE_CLIENT": layout.ROLE_CLIENT,
}
BUCKETS = ProbeOptions(BOUNDS_NS).buckets

# Runs under the distribution's Python: compiles functions that return constants, and prints them as JSON.
COMPILE = """
import json, os, pathlib, sys
folder, expressions = sys.argv[1], json.loads(sys.argv[2])
import bcc
os.environ["BCC_KERNEL_SOURCE"] = os.path.join(folder, "shim")
maps = (pathlib.Path(folder) / "maps.h").read_text()
text = maps + "".join(f"int value_{n}(void *ctx) {{ return {e}; }}\\n" for n, e in enumerate(expressions))
flags = "TYPED=0 SERVE=16 MAX_SERIES=16 MAX_CHUNKS=16 MAX_SOCKETS=16 COPIES=2 EVENTS_FD=0 OFF_bpf_array_value=0"
flags += " BUCKETS=" + sys.argv[3]
program = bcc.BPF(text=text, cflags=["-D" + flag for flag in flags.split()])
code = [program.dump_func(f"value_{n}") for n in range(len(expressions))]
assert all(each[0] == 0xB7 for each in code), "mov r0, immediate"
print(json.dumps([int.from_bytes(each[4:8], "little") for each in code]))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, int]:
    """Sizes, offsets and constants of maps.h, by expression."""
    expressions = list(CONSTANTS)
    for name, record in RECORDS.items():
        expressions.append(f"sizeof(struct {name})")
        for field, *_ in record._fields_:
            expressions.append(f"__builtin_offsetof(struct {name}, {field})")
            expressions.append(f"sizeof(((struct {name} *)0)->{field})")
    expressions += ["sizeof(struct histogram)", "__builtin_offsetof(struct histogram, bucket)"]
    command = [
        DISTRIBUTION_PYTHON,
        "-c",
        COMPILE,
        str(bpf_folder()),
        json.dumps(expressions),
        str(BUCKETS),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(expressions, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", RECORDS)
def test_record(compiled: dict[str, int], name: str) -> None:
    record = RECORDS[name]
    assert ct.sizeof(record) == compiled[f"sizeof(struct {name})"]
    for field, *_ in record._fields_:
        ours = getattr(record, field)
        offset, size = f"__builtin_offsetof(struct {name}, {field})", f"sizeof(((struct {name} *)0)->{field})"
        assert (field, ours.offset, ours.size) == (field, compiled[offset], compiled[size])


def test_every_byte_is_declared() -> None:
    """So that no field of the kernel's lies in a gap of ours."""
    for record in RECORDS.values():
        assert sum(getattr(record, field).size for field, *_ in record._fields_) == ct.sizeof(record)


def test_constants_and_histogram(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in CONSTANTS} == CONSTANTS
    assert compiled["sizeof(struct histogram)"] == layout.histogram_bytes(BUCKETS)
    assert compiled["__builtin_offsetof(struct histogram, bucket)"] == 8
