"""Whose waits they are: filters, several readers, processes that exec and end, and more series than fit."""

from __future__ import annotations

import ctypes as ct
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from kernel.traced import Child, Load, Traced, accept, eventually, read_all, waits
from otel_tcppktlat.probe.layout import ProcessKey, SeriesKey
from otel_tcppktlat.probe.probe import Delta, Harvest
from support.tun import Conversation, TunPeer

EXECUTABLE = os.path.basename(os.path.realpath(sys.executable)).encode()
SHORT_PROCESSES = 500


def reading(conversation: Conversation) -> Callable[[], object]:
    """A function that reads ten bytes, in a child."""
    return lambda: conversation.socket.recv(10)


def counts(*harvests: Harvest) -> dict[int, int]:
    """Observations by process; 0 stands for the overflow series."""
    found: dict[int, int] = {}
    for delta in (delta for harvest in harvests for delta in harvest.deltas):
        tgid = delta.series.key.process.tgid if delta.series else 0
        found[tgid] = found.get(tgid, 0) + waits([delta]).count
    return found


def in_kernel(traced: Traced) -> list[int]:
    """The processes of the series that the kernel holds, without this one."""
    found = [SeriesKey.from_buffer_copy(key).process.tgid for key, _ in traced.probe._series.items()]
    return [tgid for tgid in found if tgid != os.getpid()]


def processes(traced: Traced) -> list[int]:
    """The processes that the kernel watches, without this one."""
    found = [ProcessKey.from_buffer_copy(key).tgid for key, _ in traced.probe._processes.items()]
    return [tgid for tgid in found if tgid != os.getpid()]


@pytest.mark.parametrize("of_the_child", [False, True])
def test_filter_of_a_process(load: Load, peer: TunPeer, of_the_child: bool) -> None:
    conversation = accept(peer)
    child = Child(reading(conversation))
    with load.once(pid=child.pid if of_the_child else os.getpid()) as traced:
        for _ in range(3):
            conversation.send(10)
            child.run()
        for _ in range(2):
            conversation.send(10)
            conversation.socket.recv(10)
        ours, theirs = ("filtered", "observed") if of_the_child else ("observed", "filtered")
        assert traced.books == {"received": 5, ours: 2, theirs: 3}
        assert counts(traced.harvest()) == ({child.pid: 3} if of_the_child else {os.getpid(): 2})
        assert len(traced.rows) == (3 if of_the_child else 2)
    child.end()


def test_filter_of_a_thread(load: Load, peer: TunPeer) -> None:
    conversation = accept(peer)
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    def read() -> None:
        for _ in range(3):
            go.acquire()
            conversation.socket.recv(10)
            done.release()

    thread = threading.Thread(target=read)
    thread.start()
    with load.once(tid=thread.native_id) as traced:
        for _ in range(3):
            conversation.send(10)
            go.release()
            done.acquire()
            conversation.send(10)
            conversation.socket.recv(10)
        assert traced.books == {"received": 6, "observed": 3, "filtered": 3}
        assert counts(traced.harvest()) == {os.getpid(): 3}
        assert {row.tid for row in traced.rows} == {thread.native_id}
    thread.join()


def test_filter_of_the_remote_port(load: Load, peer: TunPeer) -> None:
    traced = load(rport=40002)
    for _ in range(3):
        conversation = accept(peer)
        conversation.send(10)
        conversation.send(10)
        assert conversation.socket.recv(10)
    assert conversation.peer_port == 40003
    assert traced.books == {"received": 2, "observed": 1}


def test_own_reads_are_left_out(load: Load, peer: TunPeer) -> None:
    traced = load(own_tgid=os.getpid())
    conversation = accept(peer)
    child = Child(reading(conversation))
    for count in (1, 12, 300):  # all ways through the programs
        conversation.send_many([10] * count)
        assert read_all(conversation.socket) == 10 * count
        conversation.send(10)
        child.run()
    harvest = traced.harvest()
    assert traced.books == {"received": 316, "own": 313, "observed": 3}
    assert counts(harvest) == {child.pid: 3} and {event.tgid for _, event in harvest.exemplars} == {child.pid}
    assert {row.tgid for row in traced.rows} == {child.pid}
    child.end()


def test_several_readers_of_one_socket(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    children = [Child(reading(conversation)) for _ in range(3)]
    for index in range(30):
        conversation.send(10)
        children[index % 3].run()
    conversation.send(10)
    conversation.socket.recv(10)
    harvest = traced.harvest()
    assert counts(harvest) == {**{child.pid: 10 for child in children}, os.getpid(): 1}
    assert traced.books == {"received": 31, "observed": 31}
    for delta in harvest.deltas:
        assert delta.series is not None and delta.series.identity.executable == EXECUTABLE
    for child in children:
        child.end()


def test_threads_share_their_process_series(traced: Traced, peer: TunPeer) -> None:
    conversation = accept(peer)
    for _ in range(3):
        conversation.send(10)
        thread = threading.Thread(target=reading(conversation))
        thread.start()
        thread.join()
    assert counts(traced.harvest()) == {os.getpid(): 3}
    assert in_kernel(traced) == [] and len({row.tid for row in traced.rows}) == 3


def test_exec_begins_a_series_of_its_own(traced: Traced, peer: TunPeer) -> None:
    """The same process, before and after: two series, each with its executable's name."""
    conversation = accept(peer)
    conversation.send(10)
    program = "import os, sys; os.read(0, 10); os.write(1, b'x'); os.execv('/usr/bin/head', ['head', '-c', '10'])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=conversation.socket.fileno(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.read(1) == b"x"
        conversation.send(10)
        assert len(process.stdout.read()) == 10
    harvest = traced.harvest()
    assert counts(harvest) == {process.pid: 2}
    named = {delta.series.identity.executable: waits([delta]).count for delta in harvest.deltas if delta.series}
    assert named == {EXECUTABLE: 1, b"head": 1}
    comms = {delta.series.identity.comm for delta in harvest.deltas if delta.series}
    assert comms == {os.path.basename(sys.executable).encode()[:15], b"head"}
    assert traced.life["processes_gone"] == 2


def test_series_of_a_process_that_is_gone(traced: Traced, peer: TunPeer) -> None:
    """Its counts come to us, its place is free within three harvests, and what it was called we still know."""
    conversation = accept(peer)
    child = Child(reading(conversation))
    conversation.send(10)
    child.run()
    assert in_kernel(traced) == [child.pid] and not traced.life.get("processes_gone")
    child.end()
    harvests = [traced.harvest() for _ in range(3)]
    assert counts(*harvests) == {child.pid: 1} and in_kernel(traced) == [] == processes(traced)
    assert [delta.series.identity.executable for delta in harvests[0].deltas if delta.series] == [EXECUTABLE]
    assert not traced.probe.gone()


def fill(traced: Traced, peer: TunPeer, children: list[tuple[Conversation, Child]]) -> None:
    for conversation, child in children:
        conversation.send(10)
        child.run()
    assert traced.books["observed"] == len(children)


def test_more_series_than_there_is_room_for(load: Load, peer: TunPeer) -> None:
    """What exceeds the map goes to the overflow series, and to one of its own as soon as a place is free."""
    traced = load(max_series=4)  # two of them are the overflow series and the sink
    conversations = [accept(peer) for _ in range(5)]
    children = [(conversation, Child(reading(conversation))) for conversation in conversations]
    fill(traced, peer, children)
    pids = [child.pid for _, child in children]
    assert traced.books["series_overflowed"] == 3
    harvest = traced.harvest()
    assert counts(harvest) == {pids[0]: 1, pids[1]: 1, 0: 3}
    assert sum(series is None for series, _ in harvest.exemplars) >= 1
    for _, child in children[:2]:
        child.end()
    harvests = [traced.harvest() for _ in range(3)]
    assert counts(*harvests) == {} and in_kernel(traced) == []
    traced.begin()
    fill(traced, peer, children[2:])
    assert traced.books["series_overflowed"] == 1
    assert counts(traced.harvest()) == {pids[2]: 1, pids[3]: 1, 0: 1}
    for _, child in children[2:]:
        child.end()
    for _ in range(3):
        traced.harvest()
    assert in_kernel(traced) == [] and processes(traced) == []


def short_process(function: Callable[[], object]) -> int:
    """Runs the function in a child, and returns when that has ended: what its pid was."""
    child = os.fork()
    if not child:
        function()
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_many_short_processes_leave_nothing(traced: Traced, peer: TunPeer) -> None:
    """While intervals end all the time: no count is lost, and no series or process stays."""
    conversation = accept(peer)
    deltas: list[Delta] = []
    over = threading.Event()

    def harvest() -> None:
        while not over.is_set():
            deltas.extend(traced.harvest().deltas)

    harvester = threading.Thread(target=harvest)
    harvester.start()
    pids = set()
    for _ in range(SHORT_PROCESSES):
        conversation.send(10)
        pids.add(short_process(reading(conversation)))
    over.set()
    harvester.join()
    for _ in range(3):
        deltas += traced.harvest().deltas
    found = waits(deltas)
    assert found.count == SHORT_PROCESSES and traced.books == {"received": SHORT_PROCESSES, "observed": SHORT_PROCESSES}
    assert {delta.series.key.process.tgid for delta in deltas if delta.series} == pids
    assert in_kernel(traced) == [] and processes(traced) == []


def fork_as(pid: int, function: Callable[[], object]) -> bool:
    """Runs the function in a child that has this pid, which must be free; False if somebody else was faster."""
    pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    return short_process(lambda: function() if os.getpid() == pid else None) == pid


def test_a_pid_that_is_used_again(traced: Traced, peer: TunPeer) -> None:
    """Before the first one's series is given back: each has a series of its own, and both are given back."""
    conversation = accept(peer)
    pid = 0
    for _ in range(50):  # others fork as well
        traced.begin()
        conversation.send(10)
        pid = short_process(reading(conversation))
        conversation.send(10)
        if fork_as(pid, reading(conversation)):
            break
        assert read_all(conversation.socket) == 10
    harvests = [traced.harvest() for _ in range(4)]
    deltas = [delta for harvest in harvests for delta in harvest.deltas]
    keys = {bytes(delta.series.key.process) for delta in deltas if delta.series}
    assert counts(*harvests) == {pid: 2} and len(keys) == 2
    assert in_kernel(traced) == [] and processes(traced) == []


def test_threads_that_rename_themselves(traced: Traced, peer: TunPeer) -> None:
    """Each row has the name of its moment; the series stays one, by the executable's name and the process's first."""
    conversation = accept(peer)
    names = [f"worker {number}" for number in range(30)]

    def read() -> None:
        for name in names:
            conversation.send(10)
            pathlib.Path("/proc/thread-self/comm").write_text(name)
            conversation.socket.recv(10)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    rows = traced.poll()
    assert [row.comm.decode() for row in rows] == names and {row.tid for row in rows} == {thread.native_id}
    (delta,) = traced.harvest().deltas
    assert delta.series is not None and waits([delta]).count == 30
    assert delta.series.identity.executable == EXECUTABLE


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_addresses_as_part_of_the_key(load: Load, peer: TunPeer, family: str) -> None:
    traced = load(key_address=True)
    conversation = accept(peer, family)
    conversation.send(10)
    assert conversation.socket.recv(10)
    (delta,) = traced.harvest().deltas
    assert delta.series is not None
    local = bytes([10, 77, 0, 1]) if family == "ipv4" else bytes.fromhex("fd77" + "00" * 13 + "01")
    assert bytes(delta.series.key.address) == local.ljust(16, b"\0")
    assert ct.sizeof(delta.series.key.address) == 16


@pytest.mark.parametrize("kind", ["accept", "connect"])
def test_data_read_after_the_connection_has_ended(load: Load, peer: TunPeer, kind: str) -> None:
    """A closed socket has no port and no bind bucket any more; its data is what it was."""
    traced = load() if kind == "accept" else load(lport=None, rport=40001)
    conversation = accept(peer) if kind == "accept" else peer.connect()
    conversation.send(10)
    conversation.send(10)
    conversation.rst()
    assert conversation.socket.recv(15)
    eventually(lambda: traced.books.get("observed") == 1, "a pickup")
    (delta,) = traced.harvest().deltas
    service = conversation.local_port if kind == "accept" else conversation.peer_port
    assert delta.series is not None
    assert (delta.series.key.role, delta.series.key.port) == (int(kind == "connect"), service)
    assert traced.rows[0].local_port == conversation.local_port
    conversation.socket.close()
    assert traced.books == {"received": 2, "observed": 1, "unread": 1}
