"""The agent as deploy/ starts it: installed in /opt, under each grant, nothing to write to, and exporting."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
import yaml

from backends.servers import Collector, free_port
from backends.traffic import SlowReader
from deploy.test_deploy import _BECOME, DEPLOY, GRANTS, NOBODY, container, manifests, unit
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON
from support.agent import REPOSITORY, Agent
from telemetry.told import DURATION, eventually

WAITS_S = (0.03, 0.06)
NODE = "node-1"
POD = manifests()["DaemonSet"]["spec"]["template"]["spec"]
MEMORY_BYTES = 384 << 20

# A mount namespace as a container's or a unit's: / is read-only, and /opt the installation.
_CONFINE = """
mount --bind "$1" /opt
echo $$ > "$2"
mount -o remount,bind,ro /
shift 2
exec "$@"
"""


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What is in /opt after the commands in the unit's head, by the distribution's Python."""
    folder = tmp_path_factory.mktemp("opt")
    folder.chmod(0o755)
    script = f"""
        mount --bind {folder} /opt
        {DISTRIBUTION_PYTHON} -m venv --without-pip /opt/otel-tcppktlat
        {sys.executable} -m pip --python /opt/otel-tcppktlat/bin/python install --quiet {REPOSITORY}
    """
    done = subprocess.run(["unshare", "--mount", "sh", "-ec", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@contextlib.contextmanager
def memory_cgroup(most_bytes: int) -> Iterator[pathlib.Path]:
    """A cgroup for processes that take so much memory together at most, BPF maps included; version 2 or 1."""
    root, limit = pathlib.Path("/sys/fs/cgroup"), "memory.max"
    if (root / "memory").is_dir():
        root, limit = root / "memory", "memory.limit_in_bytes"
    else:
        (root / "cgroup.subtree_control").write_text("+memory")
    cgroup = root / f"otel-tcppktlat-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        (cgroup / limit).write_text(str(most_bytes))
        yield cgroup
    finally:
        eventually(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()


def pods_environment(endpoint: str) -> Mapping[str, str]:
    """The DaemonSet's variables as Kubernetes expands them, but for the Collector's address."""
    plain = {one["name"]: one["value"] for one in container("agent")["env"] if "value" in one}
    expanded = {name: value.replace("$(NODE_NAME)", NODE) for name, value in plain.items()}
    return {**expanded, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}


def test_the_pod_has_what_the_agent_needs_and_no_more() -> None:
    assert {name: POD[name] for name in POD if name.startswith("host")} == {"hostPID": True}
    assert POD["automountServiceAccountToken"] is False
    agent = container("agent")
    assert "volumeMounts" not in agent
    assert agent["resources"]["limits"] == {"memory": f"{MEMORY_BYTES >> 20}Mi"}
    assert agent["securityContext"] == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["BPF", "PERFMON", "SETUID", "SETGID"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container("collector")["volumeMounts"] == [{"name": "config", "mountPath": "/etc/otelcol", "readOnly": True}]
    assert POD["volumes"] == [{"name": "config", "configMap": {"name": "collector"}}]
    assert [one["name"] for one in POD["containers"]] == ["agent", "collector"] and "initContainers" not in POD


def test_what_the_unit_starts_is_what_the_image_starts() -> None:
    (line,) = (line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line.startswith("ENTRYPOINT "))
    assert json.loads(line.removeprefix("ENTRYPOINT ")) == unit()["ExecStart"]


@pytest.mark.parametrize("name", GRANTS)
def test_it_exports_through_the_daemonsets_collector(tmp_path: pathlib.Path, opt: pathlib.Path, name: str) -> None:
    """Histogram and spans arrive at the gateway; it can write nothing, and all memory fits into the pod's limit."""
    configuration = yaml.safe_load(manifests()["ConfigMap"]["data"]["config.yaml"])
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(Receiver())
        gateway_otlp = gateway.grpc_endpoint.removeprefix("http://")
        collector = Collector(tmp_path / "collector", configuration, environment={"GATEWAY_OTLP": gateway_otlp})
        stack.enter_context(collector)
        cgroup = stack.enter_context(memory_cgroup(MEMORY_BYTES))
        endpoint, port = f"http://{collector.otlp}", free_port()
        confine = [
            "unshare",
            "--mount",
            "sh",
            "-ec",
            _CONFINE,
            "sh",
            str(opt),
            f"{cgroup}/cgroup.procs",
        ]
        become = [*GRANTS[name].command(), "env", "--chdir=/", *unit()["ExecStart"], "-v", "-l", str(port)]
        variables = pods_environment(endpoint) if name == "daemonset" else {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        agent = stack.enter_context(Agent(tmp_path, [*confine, *become], {**variables, "PYTHONPATH": ""}, _BECOME))
        agent.wait_for_stderr("otel-tcppktlat: attached")
        stack.enter_context(SlowReader(b"reader", port)).wait(*WAITS_S)
        gateway.wait_for(lambda it: sum(one.count or 0 for one in it.points(DURATION)[-1:]) == len(WAITS_S), 60)
        ids = {one.span_id for point in gateway.points(DURATION) for one in point.exemplars}
        gateway.wait_for(lambda it: {one.span_id for one in it.spans()} >= ids, 60)
        assert len(ids) == len(WAITS_S)
        if name == "daemonset":
            resource = gateway.points(DURATION)[-1].resource
            assert [resource[key] for key in ("host.name", "k8s.node.name", "service.instance.id")] == [NODE] * 3
        mounts = [line.split() for line in pathlib.Path(f"/proc/{agent.pid}/mountinfo").read_text().splitlines()]
        assert {path: options.split(",")[0] for _, _, _, _, path, options, *_ in mounts}["/"] == "ro"
        status = agent.status()
        assert set(status["Uid"].split()) == {NOBODY} and int(status["CapEff"], 16) == 0
        assert agent.stop() == 0
