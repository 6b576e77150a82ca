"""The agent beside namespaces that are not its own, and in a pid namespace that is."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from otel_tcppktlat.demo.receiver import Receiver
from support.agent import LONG_S, Agent, Pair
from telemetry import told
from telemetry.told import eventually

OWN_IDS = "in a pid namespace of its own"
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
BECOME = ["-c", "import os, sys; os.execvp(sys.argv[3], sys.argv[3:])"]  # instead of -m otel_tcppktlat
AGENT = [sys.executable, "-m", "otel_tcppktlat", "-v"]
# Prints its port, its pid and its second thread's id, as it sees them. Each thread reads from a connection of its own.
READERS = """
import os, socket, threading
server = socket.create_server(("127.0.0.1", 0))
accepted, connections = threading.Event(), []
def echo(sock):
    while data := sock.recv(1000):
        sock.sendall(data)
def second():
    print(server.getsockname()[1], os.getpid(), threading.get_native_id(), flush=True)
    accepted.wait()
    echo(connections[1])
threading.Thread(target=second).start()
for _ in range(2):
    connections.append(server.accept()[0])
accepted.set()
echo(connections[0])
"""


def rows(agent: Agent, port: int) -> list[list[str]]:
    """The table's rows of this local port."""
    return [row.split() for row in agent.stdout.splitlines() if row.split()[3:4] == [str(port)]]


NAMESPACES = ("tcppktlat-reader", "tcppktlat-sender")
SEND = """
import socket, sys, time
for _ in range(50):
    try:
        sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
        break
    except OSError:
        time.sleep(0.1)
for _ in range(5):
    sock.sendall(bytes(100))
    assert sock.recv(1000)
"""
ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
sock, _ = server.accept()
while data := sock.recv(1000):
    sock.sendall(data)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two network namespaces with a link between them."""
    with contextlib.ExitStack() as stack:
        for namespace in NAMESPACES:
            ip("netns", "add", namespace)
            stack.callback(ip, "netns", "delete", namespace)
        reader, sender = NAMESPACES
        ip("-n", reader, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", sender)
        for last, namespace in enumerate(NAMESPACES, 1):
            ip("-n", namespace, "address", "add", f"10.78.0.{last}/24", "dev", "veth0")
            ip("-n", namespace, "link", "set", "veth0", "up")
        yield


@pytest.mark.usefixtures("network")
def test_other_network_namespaces(tmp_path: pathlib.Path) -> None:
    """The agent is in neither; it tells the addresses and ports that they use there."""
    inside = [["ip", "netns", "exec", namespace, sys.executable, "-c"] for namespace in NAMESPACES]
    with Agent(tmp_path, ["-v"]) as agent:
        agent.wait_for_stderr("attached")
        with subprocess.Popen([*inside[0], ECHO, "10.78.0.1"], stdout=subprocess.PIPE, text=True) as echo:
            assert echo.stdout
            port = int(echo.stdout.readline())
            subprocess.run([*inside[1], SEND, "10.78.0.1", str(port)], check=True)
        eventually(lambda: len(rows(agent, port)) == 5, what=agent.stderr)
        assert {tuple(row[2:6:2]) for row in rows(agent, port)} == {("10.78.0.1", "10.78.0.2")}
        assert {row[0] for row in rows(agent, port)} == {str(echo.pid)}


def in_a_pid_namespace(folder: pathlib.Path, arguments: Sequence[str], environment: dict[str, str]) -> Agent:
    """The agent as the first process of a pid namespace."""
    return Agent(folder, [*UNSHARE, *AGENT, *arguments], environment, BECOME)


def end(agent: Agent) -> None:
    """unshare passes no signal on."""
    (child,) = pathlib.Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert agent.process.wait(30) == 0


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_its_own_connections(tmp_path: pathlib.Path, protocol: str) -> None:
    """All that it reads from the collector is its own, though the programs know it by another pid."""
    with Receiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        port = endpoint.rpartition(":")[2]
        with in_a_pid_namespace(tmp_path, ["-r", port], environment) as agent:
            agent.wait_for_stderr("attached")
            receiver.wait_for(lambda seen: told.books(seen).get("own", 0) >= 3, LONG_S)
            end(agent)
        books = told.books(receiver)
        assert books["received"] == books["own"] + books["queued"], books
        lines = [line for line in agent.stderr.splitlines() if OWN_IDS in line]
        assert len(lines) == 1 and "host's" in lines[0] and "count as traffic" not in lines[0]


@dataclass
class Readers:
    """Two threads that read, and an agent beside them, all in one pid namespace."""

    agent: Agent
    port: int
    threads: list[str]  # by the host's ids; the first is the process


def host_ids(process: int, second: int) -> list[str]:
    """A process of another pid namespace, and a thread of it, by the ids that they have here."""
    for path in pathlib.Path("/proc").glob("[0-9]*/task/[0-9]*/status"):
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in path.read_text(errors="replace").splitlines() if ":" in line)
            within = (status["NStgid"].split()[1:], status["NSpid"].split()[1:])
            if within == ([str(process)], [str(second)]) and READERS in path.with_name("cmdline").read_text():
                return [status["Tgid"].strip(), status["Pid"].strip()]
    raise AssertionError((process, second))


@contextlib.contextmanager
def readers(folder: pathlib.Path, option: str) -> Iterator[Readers]:
    """`option` is the shell's text for the agent; $process and $thread are the ids that the second thread has there."""
    script = f"""
{sys.executable} -c "$READERS" >{folder}/readers &
while ! read port process thread 2>/dev/null <{folder}/readers; do sleep 0.05; done
exec {" ".join(AGENT)} -l $port {option}
"""
    with Agent(folder, [*UNSHARE, "sh", "-c", script], {"READERS": READERS}, BECOME) as agent:
        agent.wait_for_stderr("attached")
        port, process, thread = map(int, (folder / "readers").read_text().split())
        yield Readers(agent, port, host_ids(process, thread))


@pytest.mark.parametrize(("option", "count"), [("-p $process", 6), ("-t $thread", 3)])
def test_ids_as_the_user_sees_them(tmp_path: pathlib.Path, option: str, count: int) -> None:
    """-p and -t take the namespace's ids; the rows show the host's."""
    with readers(tmp_path, option + " -w") as them:
        with Pair() as outside, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", them.port))) for _ in range(2)]
            for client in clients:
                for _ in range(3):
                    client.sendall(bytes(100))
                    assert client.recv(1000)
            outside.wait(0)
        process, second = them.threads
        eventually(lambda: len(them.agent.stdout.splitlines()) > count, what=them.agent.stderr)
        end(them.agent)
        shown = [tuple(row[:2]) for row in map(str.split, them.agent.stdout.splitlines()[1:])]
        assert shown == [(process, process)] * (count - 3) + [(process, second)] * 3


@pytest.mark.parametrize("option", ["-p", "-t"])
def test_an_id_that_nobody_has_there(tmp_path: pathlib.Path, option: str) -> None:
    with Agent(tmp_path, [*UNSHARE, *AGENT[:-1], option, "1000"], None, BECOME) as agent:
        assert agent.process.wait(60) == 1
        assert agent.stderr == f"otel-tcppktlat: {option}: this pid namespace has no process or thread 1000\n"
