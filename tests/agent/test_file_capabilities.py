"""A plain user, and capabilities that come from the executable's file: the loader gets them, the agent keeps none."""

from __future__ import annotations

import os
import shutil

from otel_tcppktlat.privileges import CAP_BPF
from otel_tcppktlat.probe.launch import DISTRIBUTION_PYTHON
from support.agent import Agent, Pair
from support.installed import install, open_folder
from support.kernels import kernel_version
from telemetry.told import eventually

CAPABILITIES = "cap_bpf,cap_perfmon" + (",cap_sys_resource" if kernel_version() < (5, 11) else "") + "+ep"
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all"]
BECOME = ["-c", "import os, sys; os.execvp(sys.argv[3], sys.argv[3:])"]  # instead of -m otel_tcppktlat


def test_file_capabilities() -> None:
    with open_folder() as folder:
        environment = install(folder)
        program = folder / "python-with-capabilities"
        shutil.copy(os.path.realpath(DISTRIBUTION_PYTHON), program)
        os.chmod(program, 0o755)
        assert os.spawnlp(os.P_WAIT, "setcap", "setcap", CAPABILITIES, str(program)) == 0
        command = [*AS_NOBODY, "env", "--chdir=/", str(program), "-m", "otel_tcppktlat", "-v"]
        with Agent(folder, command, environment, BECOME) as agent, Pair() as pair:
            agent.wait_for_stderr("otel-tcppktlat: attached")
            pair.wait(0.01)
            eventually(lambda: f" {pair.port} " in agent.stdout)
            status = agent.status()
            kept = 1 << CAP_BPF if kernel_version() < (5, 19) else 0
            assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, kept, kept, 0]
            assert set(status["Uid"].split()) == {"65534"} and status["NoNewPrivs"] == "1"
            assert agent.stop() == 0
