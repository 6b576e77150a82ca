"""collector-config/deploy/ as real tools read it, and the agent with exactly the capabilities that its files grant."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import kubernetes_validate
import pytest
import yaml

from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON
from support.agent import REPOSITORY, Agent, Pair
from support.installed import install, open_folder
from telemetry.told import eventually

DEPLOY = REPOSITORY / "collector-config" / "deploy"
UNIT = DEPLOY / "otel-tcppktlat.service"
NOBODY = "65534"


def unit() -> dict[str, list[str]]:
    """What the unit sets."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def manifests() -> dict[str, Any]:
    """The Kubernetes objects by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "daemonset.yaml").read_text())}


def container(name: str) -> Any:
    """One container of the DaemonSet."""
    containers = manifests()["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    return next(one for one in containers if one["name"] == name)


def run(*command: str | pathlib.Path) -> str:
    """Runs a tool that must find nothing to say against it; returns all that it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass(frozen=True)
class Grant:
    """Capabilities, and how they come: of a root that has no others, or ambient, of a user who is not root."""

    capabilities: tuple[str, ...]
    ambient: bool

    def without(self, capability: str) -> Grant:
        """All but one."""
        return Grant(tuple(one for one in self.capabilities if one != capability), self.ambient)

    def command(self) -> list[str]:
        """setpriv's command line, which a program follows."""
        granted = ",".join(["-all", *(f"+{one}" for one in self.capabilities)])
        kept = granted if self.ambient else "-all"
        user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if self.ambient else []
        sets = [f"--bounding-set={granted}", f"--inh-caps={kept}", f"--ambient-caps={kept}"]
        return ["setpriv", *user, *sets, "--no-new-privs"]


def unit_grant() -> Grant:
    """What the unit grants."""
    (ambient,) = unit()["AmbientCapabilities"]
    return Grant(tuple(one.removeprefix("CAP_").lower() for one in ambient.split()), ambient=True)


def daemonset_grant() -> Grant:
    """What the DaemonSet grants to the agent."""
    return Grant(tuple(one.lower() for one in container("agent")["securityContext"]["capabilities"]["add"]), False)


GRANTS = {"unit": unit_grant(), "daemonset": daemonset_grant()}


@pytest.fixture(scope="module")
def installed() -> Iterator[dict[str, str]]:
    """The environment in which every user finds the package."""
    with open_folder() as folder:
        yield install(folder)


# Instead of `python -m otel_tcppktlat`, the interpreter becomes the command that follows.
_BECOME = ["-c", "import os, sys; os.execvp(sys.argv[3], sys.argv[3:])"]


def restricted(folder: pathlib.Path, installed: dict[str, str], grant: Grant) -> Agent:
    """The agent under a grant, started in / as by systemd. Its table takes no package of PyPI."""
    command = [*grant.command(), "env", "--chdir=/", DISTRIBUTION_PYTHON, "-m", "otel_tcppktlat", "-v"]
    return Agent(folder, command, installed, _BECOME)


@pytest.mark.parametrize("grant", GRANTS.values(), ids=GRANTS)
def test_these_capabilities_are_enough(tmp_path: pathlib.Path, installed: dict[str, str], grant: Grant) -> None:
    """It attaches, shows what was received, and keeps none of them."""
    with restricted(tmp_path, installed, grant) as agent:
        agent.wait_for_stderr("otel-tcppktlat: attached")
        with Pair() as pair:
            for _ in range(5):
                pair.wait(0.02)
            eventually(lambda: sum(f" {pair.port} " in row for row in agent.stdout.splitlines()) == 5)
        status = agent.status()
        assert set(status["Uid"].split()) == {NOBODY}
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert agent.stop() == 0


@pytest.mark.parametrize(
    ("grant", "lacking"),
    [
        pytest.param(grant.without(one), one, id=f"{name}-{one}")
        for name, grant in GRANTS.items()
        for one in grant.capabilities
    ],
)
def test_none_can_be_left_out(tmp_path: pathlib.Path, installed: dict[str, str], grant: Grant, lacking: str) -> None:
    with restricted(tmp_path, installed, grant) as agent:
        assert agent.process.wait(60) == 1
    lines = [line for line in agent.stderr.splitlines() if "the loader said:" not in line]  # of -v
    assert len(lines) == 1 and lines[0].startswith("otel-tcppktlat: ")
    expected = "CAP_BPF and CAP_PERFMON" if lacking in ("bpf", "perfmon") else "CAP_SETUID and CAP_SETGID"
    assert expected in lines[0]


def test_the_unit_grants_what_it_bounds() -> None:
    assert unit()["AmbientCapabilities"] == unit()["CapabilityBoundingSet"]
    assert "User" not in unit() and unit()["DynamicUser"] == ["yes"]


def test_systemd_accepts_the_unit(tmp_path: pathlib.Path) -> None:
    (program,) = unit()["ExecStart"]
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(program, sys.executable))
    assert run("systemd-analyze", "verify", "--man=no", path) == ""


def test_the_unit_is_as_hardened_as_the_documentation_says() -> None:
    """systemd's measure goes from 0 to 10, and its threshold to 100."""
    text = " ".join((DEPLOY.parent / "README.md").read_text().split())
    (exposure,) = re.findall(r"`systemd-analyze security`: exposure ([0-9]\.[0-9])", text)
    threshold = f"--threshold={exposure.replace('.', '')}"
    run("systemd-analyze", "security", "--offline=yes", threshold, "--no-pager", UNIT)


@pytest.mark.parametrize("kind", ["Namespace", "ConfigMap", "DaemonSet"])
def test_kubernetes_accepts_the_objects(kind: str) -> None:
    kubernetes_validate.validate(manifests()[kind], kubernetes_validate.latest_version(), strict=True)


def test_the_daemonset_collects_as_elsewhere() -> None:
    """Its Collector's configuration is tcppktlat.yaml with an exporter, at the address that the agent has."""
    fragment = yaml.safe_load((DEPLOY.parent / "tcppktlat.yaml").read_text())
    configuration = yaml.safe_load(manifests()["ConfigMap"]["data"]["config.yaml"])
    assert list(configuration["exporters"]) == ["otlp/gateway"]
    for pipeline in fragment["service"]["pipelines"].values():
        pipeline["exporters"] = ["otlp/gateway"]
    assert {**fragment, "exporters": configuration["exporters"]} == configuration
    (endpoint,) = (one["value"] for one in container("agent")["env"] if one["name"] == "OTEL_EXPORTER_OTLP_ENDPOINT")
    receiver = configuration["receivers"]["otlp/tcppktlat"]["protocols"]["grpc"]
    assert receiver["endpoint"] == "${env:TCPPKTLAT_LISTEN:-" + endpoint.removeprefix("http://") + "}"


def test_hadolint_accepts_the_dockerfile() -> None:
    run(pathlib.Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile")
