"""The package where every user may read it, which a checkout below /root is not. Standard library only."""

from __future__ import annotations

import pathlib
import shutil

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def install(folder: pathlib.Path) -> dict[str, str]:
    """Copies it there, below /tmp; returns the environment in which it is found."""
    folder.chmod(0o755)
    for one in folder.parents[:-1]:
        one.chmod(one.stat().st_mode | 0o011)  # pytest keeps its folders to root
    for name in ("otel_tcppktlat", "bpf"):
        shutil.copytree(_REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
