"""The process: signals it cannot catch, a loader that is killed, a disk that is full, and another agent beside it."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from cli.printed import HEADER, environment, parse
from otel_tcppktlat.demo.receiver import Receiver
from otel_tcppktlat.probe.layout import Event
from otel_tcppktlat.probe.libbpf import Libbpf
from otel_tcppktlat.probe.probe import RING_BYTES
from support.agent import LONG_S, Agent, loader_of
from support.kernels import flavours
from support.objects import held
from telemetry import told
from telemetry.told import Listener, deliver

_EVENT_BYTES = ct.sizeof(Event) + 8  # with the ring buffer's header


def loaded(kind: str, number: int) -> bool:
    """Does the kernel still have it?"""
    fd = int(getattr(Libbpf().lib, f"bpf_{kind}_get_fd_by_id")(number))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def writable_files(pid: int) -> set[str]:
    """Files with a name that a process could write to."""
    found = set()
    for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            path = os.readlink(fd)
            if os.path.isfile(path) and os.stat(fd, follow_symlinks=False).st_mode & 0o200:
                found.add(path)
    return found


@pytest.fixture
def empty(tmp_path: pathlib.Path) -> Iterator[dict[str, str]]:
    """Variables that lead whatever makes files without asking into an empty folder, which must stay so."""
    folder = tmp_path / "empty"
    folder.mkdir()
    folder.chmod(0o777)
    yield dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"), str(folder))
    assert list(folder.rglob("*")) == []


def pinned() -> set[str]:
    """What is in the BPF file system."""
    return {str(path) for path in pathlib.Path("/sys/fs/bpf").rglob("*")}


@pytest.mark.parametrize("flavour", flavours())
def test_sigkill_leaves_nothing(flavour: str, tmp_path: pathlib.Path, empty: dict[str, str]) -> None:
    """No program, no map, no file; while it ran it had no file to write to but its outputs."""
    pins = pinned()
    with Receiver() as receiver:
        arguments = ["-v", "--otlp", receiver.grpc_endpoint, "--flavour", flavour, "-l", "1"]
        with Agent(tmp_path, arguments, empty) as agent:
            told.settle(receiver)
            ids = {kind: held(agent.pid, kind) for kind in ("link", "prog", "map")}
            assert all(ids.values())
            assert all(loaded(kind, number) for kind, numbers in ids.items() for number in numbers)
            assert writable_files(agent.pid) == {str(tmp_path / "stdout"), str(tmp_path / "stderr")}
            assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
        told.eventually(
            lambda: not any(loaded(kind, number) for kind, numbers in ids.items() for number in numbers), what=ids
        )
    assert pinned() == pins


@contextlib.contextmanager
def compiling(variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An agent whose loader has just begun, and the loader's process id."""
    with subprocess.Popen(
        [sys.executable, "-m", "otel_tcppktlat", "-l", "1"],
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        yield agent, loader_of(agent.pid)


@pytest.mark.parametrize("after_s", [0, 0.5])
def test_a_killed_loader(after_s: float, empty: dict[str, str]) -> None:
    """Before it has read what to load, and while it compiles."""
    with compiling(empty) as (agent, loader):
        time.sleep(after_s)
        os.kill(loader, signal.SIGKILL)
        stdout, stderr = agent.communicate(timeout=30)
        assert (agent.returncode, stdout, stderr.count("\n")) == (1, "", 1)
        assert stderr.startswith("otel-tcppktlat: signal 9 (Killed) ended the loader")


def test_sigkill_while_the_programs_are_compiled(empty: dict[str, str]) -> None:
    """The loader finds nobody to hand them to, and ends; what it has loaded goes with it."""
    pins = pinned()
    with compiling(empty) as (agent, loader):
        agent.kill()
        agent.wait(30)
        told.eventually(lambda: not pathlib.Path(f"/proc/{loader}").exists(), what=loader)
    assert pinned() == pins


def test_sighup_under_nohup(tmp_path: pathlib.Path) -> None:
    """Whoever has it ignored wants it so; test_end has what it does otherwise."""
    with Receiver() as receiver:
        prefix = ("sh", "-c", "trap '' HUP && exec \"$@\"", "sh")
        with Agent(tmp_path, ["-v", "--otlp", receiver.grpc_endpoint, "-l", "1"], prefix=prefix) as agent:
            agent.wait_for_stderr("attached")
            agent.process.send_signal(signal.SIGHUP)
            told.settle(receiver)
            assert agent.stop() == 0


def test_a_full_device(tmp_path: pathlib.Path) -> None:
    """A table alone ends: one line and status 1, as other tools do. So does the help."""
    with open("/dev/full", "wb") as full:
        for arguments in (["-l", "1"], ["--help"]):
            done = subprocess.run(
                [sys.executable, "-m", "otel_tcppktlat", *arguments],
                env=environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
            )
            line = "otel-tcppktlat: standard output: No space left on device\n"
            assert (done.returncode, done.stderr) == (1, line)


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """One of 128 KiB, and nearly full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], check=True)
    (folder / "ballast").write_bytes(bytes(96 << 10))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_behind_the_table(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The export goes on, and the rows wait until there is room again: none is lost, cut or printed twice."""
    pickups = 1000
    with Receiver() as receiver, Listener() as listener, (disk / "table").open("wb") as output:
        with subprocess.Popen(
            [
                sys.executable,
                "-m",
                "otel_tcppktlat",
                "--table",
                "-l",
                str(listener.port),
                "--otlp",
                receiver.grpc_endpoint,
            ],
            env=environment({"OTEL_METRIC_EXPORT_INTERVAL": "300"}),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        ) as agent:
            told.settle(receiver)
            connection = listener.connect()
            for _ in range(pickups):
                deliver(*connection)
            told.settle(receiver)
            assert told.check_balance(receiver)["observed"] == pickups
            assert (disk / "table").stat().st_size < pickups * 60
            (disk / "ballast").unlink()
            told.eventually(lambda: (disk / "table").read_text().count("\n") == pickups + 1)
            agent.send_signal(signal.SIGTERM)
            _, stderr = agent.communicate(timeout=30)
        assert agent.returncode == 0
        line = "otel-tcppktlat: standard output: No space left on device; the table waits, the export goes on\n"
        assert stderr == line
        header, *rows = (disk / "table").read_text().splitlines()
        assert header == HEADER
        assert len([parse(row) for row in rows]) == pickups


def test_nobody_reads_its_complaints(tmp_path: pathlib.Path) -> None:
    """Standard error is a pipe without a reader, and there is much to say: the export begins all the same."""
    with Receiver() as receiver, Listener() as listener:
        receiver.stop()
        read_fd, write_fd = os.pipe()
        os.close(read_fd)
        variables = {"OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5"}
        with subprocess.Popen(
            [sys.executable, "-m", "otel_tcppktlat", "-v", "-l", str(listener.port), "--otlp", receiver.grpc_endpoint],
            env=environment(variables),
            stdout=subprocess.DEVNULL,
            stderr=write_fd,
        ) as agent:
            try:
                os.close(write_fd)
                told.eventually(lambda: held(agent.pid, "link"))
                connection = listener.connect()
                deliver(*connection)
                time.sleep(1)
                receiver.start()
                told.settle(receiver)
                assert told.check_balance(receiver)["received"] <= 1
                deliver(*connection)
                told.settle(receiver)
                agent.send_signal(signal.SIGTERM)
                assert agent.wait(30) == 0
            finally:
                agent.kill()  # a Popen waits for it


def test_stopped_for_longer_than_the_ring_buffer_lasts(tmp_path: pathlib.Path) -> None:
    """SIGSTOP: events are lost, and counted; the histogram has all, and intervals go on right after SIGCONT."""
    pickups = RING_BYTES // _EVENT_BYTES + 2000
    with told.scene(tmp_path, "--span-rate", "1000", "0") as scene:
        scene.settle()
        scene.agent.process.send_signal(signal.SIGSTOP)
        sender, reader = scene.listener.connect()
        for _ in range(pickups):
            sender.sendall(b"x")
            assert reader.recv(1) == b"x"
        scene.agent.process.send_signal(signal.SIGCONT)
        scene.settle()
        assert told.check_balance(scene.receiver)["observed"] == pickups
        lost = told.number(scene.receiver, "tcppktlat.events.lost")
        assert lost >= 2000
        without_span = lost + sum(told.number(scene.receiver, name) for name in (told.SUPPRESSED, told.DROPPED))
        scene.receiver.wait_for(lambda seen: len(seen.spans()) + without_span == pickups, LONG_S)
        last = scene.receiver.points(told.RECEIVED)[-1].time_unix_ns
        for _ in range(10):
            deliver(sender, reader)
        scene.settle()
        assert told.check_balance(scene.receiver)["observed"] == pickups + 10
        assert told.number(scene.receiver, "tcppktlat.events.lost") == lost
        times = [point.time_unix_ns for point in scene.receiver.points(told.RECEIVED) if point.time_unix_ns > last]
        assert len(times) >= 3


def test_a_second_agent_counts_the_same(tmp_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(told.scene(tmp_path))
        receiver = stack.enter_context(Receiver())
        (tmp_path / "second").mkdir()
        arguments = ["-v", "-l", str(first.listener.port), "--otlp", receiver.grpc_endpoint]
        second = stack.enter_context(Agent(tmp_path / "second", arguments))
        second.wait_for_stderr("attached")
        connection = first.listener.connect()
        for _ in range(50):
            deliver(*connection)
        for each in (first.receiver, receiver):
            told.settle(each)
            assert told.check_balance(each) == {"received": 50, "observed": 50, "queued": 0}
        assert second.stop() == first.agent.stop() == 0


@pytest.mark.parametrize("side", ["-r", "-l"])
def test_two_agents_that_see_each_other(side: str, tmp_path: pathlib.Path) -> None:
    """Each traces the other's exports, a span for every read: of the answers ("-r"), or by the receiver ("-l").

    So each export of the one is traffic for the next of the other; it comes to no more of it, though.
    """
    half, variables = 12, {"OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Receiver()) for _ in range(2)]
        ports = [str(urlsplit(receiver.grpc_endpoint).port) for receiver in receivers]
        for number, receiver in enumerate(receivers):
            folder = tmp_path / str(number)
            folder.mkdir()
            arguments = ["-v", "--otlp", receiver.grpc_endpoint, side, ports[1 - number], "--span-rate", "100000", "0"]
            stack.enter_context(Agent(folder, arguments, variables))
        for receiver in receivers:
            receiver.wait_for(lambda seen: told.number(seen, told.RECEIVED) > 0, LONG_S)
            told.settle(receiver)
        told_at = []  # requests, segments and spans of both
        for _ in range(3):
            told_at.append(
                [
                    sum(len(receiver.requests) for receiver in receivers),
                    sum(told.number(receiver, told.RECEIVED) for receiver in receivers),
                    sum(len(receiver.spans()) for receiver in receivers),
                ]
            )
            count = len(receivers[0].points(told.RECEIVED))
            receivers[0].wait_for(lambda seen, count=count: len(seen.points(told.RECEIVED)) >= count + half, LONG_S)  # type: ignore[misc]
        first, second = (
            [b - a for a, b in zip(*pair, strict=True)] for pair in zip(told_at, told_at[1:], strict=False)
        )
        assert all(first) and all(after <= 2 * before for before, after in zip(first, second, strict=True)), told_at
        intervals = len(receivers[0].points(told.RECEIVED)) + len(receivers[1].points(told.RECEIVED))
        assert sum(len(receiver.requests) for receiver in receivers) <= 3 * intervals
