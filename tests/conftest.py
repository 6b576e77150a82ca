"""What may run at the same time: files do, but the kernel tests share one port that their programs see."""

from __future__ import annotations

import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for pytest-xdist's --dist loadgroup."""
    for item in items:
        path = item.path.relative_to(TESTS)
        together = path.parts[0] == "kernel" and path.name != "test_other_kernels.py"
        item.add_marker(pytest.mark.xdist_group("kernel" if together else str(path)))
