"""Who asks gets what was measured of himself, exactly, and can do nothing else with it."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import pathlib
import select
import socket

import pytest

from otel_tcppktlat.serving.broker import LEAST_FROM_NS, MOST_OF_A_USER
from otel_tcppktlat.serving.connection import Connection
from otel_tcppktlat.serving.protocol import MOST_GREETING_BYTES
from serving.callers import MS, Caller
from support.agent import LONG_S, Agent
from telemetry.told import eventually

Serving = tuple[Agent, pathlib.Path]
SOMEBODY, SOMEBODY_ELSE = 54321, 54322


def test_each_sees_itself_alone(serving: Serving) -> None:
    """Two users' processes that read late at the same time, and each a second series."""
    with Caller(serving[1], SOMEBODY) as one, Caller(serving[1], SOMEBODY_ELSE) as other:
        for caller in (one, other):
            caller.tell(Caller.connect)
        one.tell(Caller.read, 0, 0.02)
        other.tell(Caller.read, 0.03, 0.03)
        for caller, segments, late_ms in ((one, 2, [20]), (other, 2, [30, 30])):
            ((port, count, sum_ns),), untold = caller.tell(Caller.refresh)
            assert (port, count, untold) == (caller.port, segments, 0)
            heard = caller.tell(Caller.late)
            assert [event[:3] for event in heard] == [(caller.pid, caller.pid, caller.port)] * len(late_ms)
            assert all(ms >= least_ms for (*_, ms), least_ms in zip(heard, late_ms, strict=True))
            assert sum_ns >= sum(late_ms) * MS


def test_totals_are_the_process_own_since_it_began(serving: Serving) -> None:
    """What it read before it asked, too; no more and no less, however often it asks."""
    with Caller(serving[1], SOMEBODY) as caller:
        caller.tell(Caller.read, *[0] * 20)
        caller.tell(Caller.connect)
        assert [row[:2] for row in caller.tell(Caller.totals)[0]] == [(caller.port, 20)]
        for expected in (25, 30, 35):
            caller.tell(Caller.read, *[0] * 5)
            assert [row[:2] for row in caller.tell(Caller.refresh)[0]] == [(caller.port, expected)]
        caller.tell(Caller.hang_up)
        caller.tell(Caller.connect)
        assert [row[:2] for row in caller.tell(Caller.totals)[0]] == [(caller.port, 35)]
        assert caller.tell(Caller.late) == []


def test_a_threshold_has_a_least(serving: Serving) -> None:
    with Caller(serving[1]) as caller:
        caller.tell(Caller.connect, 0)
        caller.tell(Caller.read, *[0] * 50, 0.001)
        caller.tell(Caller.refresh)
        events = caller.tell(Caller.late_ns)
        assert events and all(wait_ns >= LEAST_FROM_NS for wait_ns in events)


def test_the_descriptor_can_only_be_read(serving: Serving) -> None:
    """Not written, not shrunk, and not by opening it once more; not even by root."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(serving[1]))
        sock.sendall(json.dumps({"version": 1, "from_ns": MS, "pause_ns": 0}).encode() + b"\n")
        _, (fd,), _, _ = socket.recv_fds(sock, 65536, 1)
        size = os.fstat(fd).st_size
        with pytest.raises(OSError) as caught:
            os.write(fd, b"x")
        assert caught.value.errno == errno.EBADF
        with pytest.raises(PermissionError):
            mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        reading = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        before = reading[:]
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        for attempt in (
            lambda: os.write(again, b"x"),
            lambda: os.ftruncate(again, 0),
            lambda: os.ftruncate(again, 2 * size),
            lambda: mmap.mmap(again, size, prot=mmap.PROT_READ | mmap.PROT_WRITE),
        ):
            with pytest.raises(PermissionError):
                attempt()
        assert reading[:] == before and os.fstat(fd).st_size == size
        os.close(again)
        os.close(fd)


def test_nobody_can_name_another_process(serving: Serving) -> None:
    """The kernel says who calls; what the greeting says of it counts for nothing."""
    with Caller(serving[1]) as victim, Caller(serving[1], SOMEBODY) as curious:
        victim.tell(Caller.read, 0.02)
        said = {"version": 1, "from_ns": 0, "pause_ns": 0, "pid": victim.pid, "tgid": victim.pid}
        answer = curious.tell(Caller.greet, said)
        assert "bounds_s" in answer
        victim.tell(Caller.read, 0.02)
        curious.tell(Caller.connect)
        assert curious.tell(Caller.refresh) == ([], 0)
        assert curious.tell(Caller.late) == []


def test_a_program_that_was_executed_is_another_one(serving: Serving) -> None:
    """Its socket may live on, with whoever has a copy: it shows nothing of what runs there now."""
    with Caller(serving[1]) as caller:
        caller.tell(Caller.connect)
        caller.tell(Caller.read, 0.02)
        assert len(caller.tell(Caller.refresh)[0]) == 1
        reads_after_exec = caller.tell(Caller.execute)
        assert reads_after_exec == b"10 10"
        assert caller.tell(Caller.what_the_copy_sees) == ([1], 1)


def test_a_child_is_not_seen_through_its_parents_socket(serving: Serving) -> None:
    with Caller(serving[1]) as caller:
        caller.tell(Caller.connect)
        caller.tell(Caller.read, 0.02)
        caller.tell(Caller.read_in_a_child)
        assert [row[1] for row in caller.tell(Caller.refresh)[0]] == [1]
        assert [tgid for tgid, *_ in caller.tell(Caller.late)] == [caller.pid]


def test_a_process_that_has_ended_is_hung_up_on(serving: Serving) -> None:
    """Although a child of it holds its socket: its number may soon be another process's."""
    told, tells = os.pipe()
    process = os.fork()
    if not process:
        connection = Connection(str(serving[1]), MS, 0, 20)
        if not os.fork():
            with contextlib.suppress(OSError):
                while True:
                    connection.hear()
            os.write(tells, b"hung up")
        os._exit(0)
    os.waitpid(process, 0)
    os.close(tells)
    assert select.select([told], [], [], LONG_S)[0] and os.read(told, 100) == b"hung up"
    os.close(told)


def test_a_second_connection_takes_over(serving: Serving) -> None:
    with Caller(serving[1]) as caller:
        caller.tell(Caller.connect)
        caller.tell(Caller.keep)
        caller.tell(Caller.connect)
        assert caller.tell(Caller.kept_is_hung_up)
        caller.tell(Caller.read, 0.02)
        caller.tell(Caller.refresh)
        assert len(caller.tell(Caller.late)) == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "no line of otel-tcppktlat's"),
        (b"[]\n", "no line of otel-tcppktlat's"),
        (b'{"version": 2, "from_ns": 1}\n', "different versions"),
        (b'{"version": 1}\n', "from_ns"),
        (b'{"version": 1, "from_ns": true, "pause_ns": 1}\n', "from_ns"),
        (b'{"version": 1, "from_ns": -1, "pause_ns": 1}\n', "from_ns"),
        (b'{"version": 1, "from_ns": 1}\n', "pause_ns"),
        (b'{"version": 1, "from_ns": 1, "pause_ns": 1}\nr', "a line is the first"),
        (b"x" * MOST_GREETING_BYTES, "a line is the first"),
        (b"\xff\xfe\n", "no line of otel-tcppktlat's"),
        (b"[" * 200 + b"\n", "no line of otel-tcppktlat's"),
    ],
)
def test_what_is_no_greeting_is_refused(serving: Serving, said: bytes, reason: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(serving[1]))
        sock.sendall(said)
        assert reason in json.loads(sock.recv(4096))["error"]
        assert sock.recv(1) == b""


def descriptors(agent: Agent) -> int:
    return len(os.listdir(f"/proc/{agent.pid}/fd"))


def test_a_flood_of_callers_harms_nobody(serving: Serving) -> None:
    """One user takes all that he gets, and says nothing; others are served meanwhile, and it ends as it began."""
    agent, path = serving
    before = descriptors(agent)
    with Caller(path, SOMEBODY) as flood, Caller(path, SOMEBODY_ELSE) as other:
        flood.tell(Caller.flood, 2 * MOST_OF_A_USER)
        other.tell(Caller.connect)
        other.tell(Caller.read, 0.02)
        assert [row[1] for row in other.tell(Caller.refresh)[0]] == [1]
        assert len(other.tell(Caller.late)) == 1
        assert 0 < flood.tell(Caller.until_hung_up) <= MOST_OF_A_USER
        flood.tell(Caller.connect)
        flood.tell(Caller.hang_up)
        other.tell(Caller.hang_up)
    eventually(lambda: descriptors(agent) == before, what="descriptors are left")
    assert agent.process.poll() is None


def test_whoever_asks_too_much_or_never_listens(serving: Serving) -> None:
    """He gets what the agent has time for, and everybody else as well."""
    with Caller(serving[1], SOMEBODY) as greedy, Caller(serving[1], SOMEBODY_ELSE) as other:
        greedy.tell(Caller.connect, 0)
        other.tell(Caller.connect)
        greedy.tell(Caller.ask_without_listening)
        greedy.tell(Caller.read, *[0.001] * 300)  # more than the ring has room for
        other.tell(Caller.read, 0.02)
        assert [row[1] for row in other.tell(Caller.refresh)[0]] == [1]
        eventually(lambda: [row[1] for row in greedy.tell(Caller.refresh)[0]] == [300])  # older answers come first
        found, lost, untold = greedy.tell(Caller.all_late)
        assert found + lost + untold == 300 and found
        greedy.tell(Caller.say, b"x")  # no byte of the protocol's
        assert greedy.tell(Caller.hear_the_end)


def test_the_agent_is_nobody_as_ever(serving: Serving) -> None:
    status = serving[0].status()
    assert set(status["Uid"].split()) == {"65534"} and int(status["CapPrm"], 16) == 0


def test_one_that_ends_well_leaves_all_that_it_knows(folder: pathlib.Path) -> None:
    """Totals of the last moment; and another one may serve there."""
    path = folder / "its/agent.sock"
    with Agent(folder, ["-v", "--serve", str(path)]) as agent, Caller(path, SOMEBODY) as caller:
        agent.wait_for_stderr("otel-tcppktlat: attached")
        caller.tell(Caller.connect)
        caller.tell(Caller.read, *[0] * 7)
        assert agent.stop() == 0
        assert caller.tell(Caller.hear_the_end)
        assert [row[1] for row in caller.tell(Caller.totals)[0]] == [7]
    with Agent(folder, ["-v", "--serve", str(path)]) as agent:
        agent.wait_for_stderr("otel-tcppktlat: attached")


def refused(folder: pathlib.Path, path: pathlib.Path, *, prefix: tuple[str, ...] = ()) -> str:
    with Agent(folder, ["--serve", str(path)], prefix=prefix) as agent:
        assert agent.process.wait(60) == 1
        (line,) = agent.stderr.splitlines()
        return line


def test_a_path_that_is_taken(serving: Serving, folder: pathlib.Path) -> None:
    assert "another agent serves there" in refused(folder, serving[1])
    Connection(str(serving[1]), MS, 0, 20).close()  # which goes on
    (folder / "file").write_text("precious")
    assert "no socket" in refused(folder, folder / "file") and (folder / "file").read_text() == "precious"
    assert "--serve" in refused(folder, folder / ("x" * 120))


def test_what_a_killed_agent_left_is_replaced(folder: pathlib.Path) -> None:
    path = folder / "agent.sock"
    for _ in range(2):
        with Agent(folder, ["-v", "--serve", str(path)]) as agent:
            agent.wait_for_stderr("otel-tcppktlat: attached")
            Connection(str(path), MS, 0, 20).close()
            agent.process.kill()
        assert path.is_socket()


def test_another_pid_namespace_is_refused(folder: pathlib.Path) -> None:
    """There, process ids are not those that the kernel's programs see: somebody would be shown somebody else."""
    prefix = ("unshare", "--pid", "--fork", "--mount-proc")
    assert "hostPID" in refused(folder, folder / "agent.sock", prefix=prefix)


def test_who_is_another_user_now_is_refused(serving: Serving) -> None:
    """As a program would be that runs with its owner's rights, and that its user has executed over the connection."""
    with Caller(serving[1]) as caller:
        assert "another one now" in caller.tell(Caller.greet_as_another_user, SOMEBODY)["error"]
