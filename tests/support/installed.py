"""What users other than root may read, which a checkout below /root is not. Standard library only."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def open_folder() -> Iterator[pathlib.Path]:
    """A folder that all users may enter, with a name that is short enough for a socket's.

    pytest's are below one that each pytest closes to others when it makes its first.
    """
    with tempfile.TemporaryDirectory(prefix="tcppktlat-") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        yield folder


def install(folder: pathlib.Path) -> dict[str, str]:
    """Copies the package to an open folder; returns the environment in which it is found."""
    for name in ("otel_tcppktlat", "bpf"):
        shutil.copytree(_REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
