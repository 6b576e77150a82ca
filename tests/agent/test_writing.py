"""The running agent can write no file but what it has open: tried from inside of it, by a plug-in exporter."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from support.agent import Agent
from telemetry.told import eventually

NOBODY = 65534
TRUNCATE_SINCE = 3  # Landlock's ABI
EXPORTER = """
import json, os, pathlib, shutil, socket, subprocess, sys
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult

def attempts(folder):
    return {
        "create": lambda: (folder / "created").write_text("x"),
        "create in /dev/shm": lambda: pathlib.Path("/dev/shm", folder.name).write_text("x"),
        "overwrite": lambda: (folder / "there").open("r+").close(),
        "append": lambda: (folder / "there").open("a").close(),
        "truncate": lambda: os.truncate(folder / "there", 0),
        "mkdir": lambda: (folder / "made").mkdir(),
        "rmdir": lambda: (folder / "empty").rmdir(),
        "unlink": lambda: (folder / "old").unlink(),
        "rename": lambda: (folder / "older").rename(folder / "newer"),
        "link": lambda: os.link(folder / "mine", folder / "linked"),
        "symlink": lambda: (folder / "symlinked").symlink_to("there"),
        "mkfifo": lambda: os.mkfifo(folder / "fifo"),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind(str(folder / "socket")),
        "execute": lambda: subprocess.run([shutil.which("true")], check=True),
    }

def outcomes(folder):
    found = {}
    for name, attempt in attempts(pathlib.Path(folder)).items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = error.strerror
    return found

class Exporter(MetricExporter):
    told = False

    def export(self, metrics_data, timeout_millis=10_000, **kwargs):
        if not self.told:
            self.told = True
            print(json.dumps(outcomes(os.environ["FOLDER"])), flush=True)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **kwargs):
        pass

if __name__ == "__main__":
    print(json.dumps(outcomes(sys.argv[1])))
"""


def landlock_abi() -> int:
    """What this kernel has; 0 or less if it has none."""
    create_ruleset, version = 444, 1
    return int(ctypes.CDLL(None).syscall(create_ruleset, None, ctypes.c_size_t(0), version))


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """A folder in which everybody may do anything, and where the exporter is installed."""
    path = pathlib.Path(tempfile.mkdtemp())
    (path / "empty").mkdir()
    for name in ("there", "old", "older", "mine"):
        (path / name).touch()
    (path / "writing.py").write_text(EXPORTER)
    metadata = path / "writing-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: writing\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[opentelemetry_metrics_exporter]\nwriting = writing:Exporter\n")
    subprocess.run(["chmod", "-R", "a+rwX", path], check=True)
    for name in ("mine", "there"):
        os.chown(path / name, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)
    pathlib.Path("/dev/shm", path.name).unlink(missing_ok=True)


def test_the_agents_user_could(folder: pathlib.Path) -> None:
    """Nothing but the agent's own doing forbids it."""
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*as_nobody, "/usr/bin/python3", "-c", WITHOUT_SDK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert set(json.loads(done.stdout).values()) == {"done"}, done.stdout


WITHOUT_SDK = EXPORTER.replace("from opentelemetry", "MetricExporter = object #")


def test_the_agent_can_not(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In the thread that exports; its standard output is a file, which it writes to."""
    environment = {"OTEL_METRICS_EXPORTER": "writing", "OTEL_TRACES_EXPORTER": "none", "FOLDER": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path[:1], str(pathlib.Path(__file__).parents[2])])
    with Agent(tmp_path, ["-v"], environment) as agent:
        agent.wait_for_stderr("attached")
        eventually(lambda: agent.stdout.endswith("\n"), what=agent.stderr)
        assert agent.stop() == 0
    outcomes = json.loads(agent.stdout)
    abi = landlock_abi()
    done = {name for name, outcome in outcomes.items() if outcome == "done"}
    if abi < 1:
        assert done == set(outcomes) and "Landlock" in agent.stderr
    else:
        assert done == ({"truncate"} if abi < TRUNCATE_SINCE else set()), outcomes
        assert {outcomes[name] for name in set(outcomes) - done} == {"Permission denied"}
        assert ("Landlock" in agent.stderr) == (abi < TRUNCATE_SINCE)
