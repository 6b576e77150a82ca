"""The agent in a pid namespace of its own, without BTF. For a guest with headers: `python -m tests.kernel` runs it."""

from __future__ import annotations

import os
import pathlib

from agent.test_namespaces import AGENT, BECOME, OWN_IDS, UNSHARE, end, in_a_pid_namespace, rows
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import Agent, Pair
from telemetry import told
from telemetry.told import eventually

START_S = 300  # it has to compile with the kernel's headers, which takes a guest minutes


def test_there_is_no_btf() -> None:
    assert not pathlib.Path("/sys/kernel/btf/vmlinux").exists()


def test_what_it_says_and_counts(tmp_path: pathlib.Path) -> None:
    """It measures as elsewhere, ids are the host's, and its own connections are traffic."""
    with Receiver() as receiver, Pair() as pair:
        port = receiver.grpc_endpoint.rpartition(":")[2]
        arguments = ["--table", "--otlp", receiver.grpc_endpoint]
        with in_a_pid_namespace(tmp_path, arguments, {"OTEL_TRACES_EXPORTER": "none"}) as agent:
            agent.wait_for_stderr("attached", START_S)
            pair.wait(0.01)
            pair.wait(0.01)
            eventually(lambda: len(rows(agent, pair.port)) == 2, what=agent.stderr)
            eventually(lambda: any(row.split()[5:6] == [port] for row in agent.stdout.splitlines()), what=agent.stdout)
            told.settle(receiver, 300)
            end(agent)
        assert {row[0] for row in rows(agent, pair.port)} == {str(os.getpid())}
        (its_own,) = {row.split()[0] for row in agent.stdout.splitlines() if row.split()[5:6] == [port]}
        books = told.check_balance(receiver)
        assert "own" not in books and books["observed"] >= 3
        (line,) = (line for line in agent.stderr.splitlines() if OWN_IDS in line)
        assert "shown as the host's" in line and "and its own connections count as traffic; in the host's" in line
        assert int(its_own) > 1  # there it is process 1


def test_an_id_cannot_be_translated(tmp_path: pathlib.Path) -> None:
    with Agent(tmp_path, [*UNSHARE, *AGENT[:-1], "-p", "1"], None, BECOME) as agent:
        assert agent.process.wait(START_S * 10) == 1
        expected = "without BTF (/sys/kernel/btf/vmlinux), -p works in the host's pid namespace only"
        assert agent.stderr == f"otel-tcppktlat: {expected}\n"
