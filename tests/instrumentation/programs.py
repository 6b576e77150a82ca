"""Real programs around an instrumented application: gunicorn, PostgreSQL, Redis, and what it may ask over HTTP."""

from __future__ import annotations

import contextlib
import http.server
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from backends.servers import Server, free_port
from otel_tcppktlat.demo.receiver import Receiver
from support.agent import CA_VARIABLES, REPOSITORY, Agent
from telemetry.told import DURATION, eventually, latest

AnyApplication = TypeVar("AnyApplication", bound="Application")
HERE = pathlib.Path(__file__).parent
BIN = pathlib.Path(sys.executable).parent


class Redis(Server):
    """redis-server in memory."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.port = free_port()
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        super().__init__("redis", command, f"127.0.0.1:{self.port}", folder)


class Postgres(Server):
    """PostgreSQL with a fresh cluster, as the user that Debian's package makes, or whoever runs the test."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.port, data = free_port(), folder / "data"
        folder.mkdir(parents=True, exist_ok=True)
        user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        shutil.chown(folder, user)
        (self.binaries,) = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if os.geteuid() == 0 else []
        initdb = [*as_user, str(self.binaries / "initdb"), "--no-sync", "--auth=trust", "--username=test", str(data)]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off"}
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [*as_user, str(self.binaries / "postgres"), "-D", str(data), *options]
        super().__init__("postgres", command, f"127.0.0.1:{self.port}", folder)

    def _answers(self) -> bool:
        ask = [str(self.binaries / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(ask).returncode == 0  # it takes connections before it is ready

    @property
    def address(self) -> str:
        """As libpq takes it."""
        return f"host=127.0.0.1 port={self.port} user=test dbname=postgres sslmode=disable gssencmode=disable"


class Upstream:
    """An HTTP server that sends a page's headers, and its body a moment later; a context manager."""

    LATER_S = 0.02

    def __init__(self) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.flush()
                time.sleep(Upstream.LATER_S)
                self.wfile.write(b"x" * 1000)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> Upstream:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def environment(agent: object, receiver: str, **more: str) -> dict[str, str]:
    """Of an application that `opentelemetry-instrument` runs, with its telemetry over HTTP to a receiver."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("OTEL_") and name not in CA_VARIABLES
    }
    variables = {
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OTEL_SERVICE_NAME": "shop",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver,
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_PYTHON_TCPPKTLAT_SOCKET": str(agent),
        "OTEL_PYTHON_TCPPKTLAT_LOAD": "false",
    }
    return {**kept, **variables, **more}


def by_instance(receiver: Receiver, port: int) -> Counter[str]:
    """Segments that a server's side has read on this port, by instance of the service: each process is one."""
    found: Counter[str] = Counter()
    points = [point for point in receiver.points(DURATION) if point.attributes["server.port"] == port]
    served = [point for point in points if point.attributes["tcppktlat.role"] == "server"]
    for instance in {point.resource["service.instance.id"] for point in served}:
        mine = [point for point in served if point.resource["service.instance.id"] == instance]
        found[instance] = sum(point.count or 0 for point in latest(mine).values())
    return found


class Application:
    """A Python program under `opentelemetry-instrument`; a context manager that ends it. `said` is all it prints."""

    def __init__(
        self,
        folder: pathlib.Path,
        command: Sequence[str],
        variables: Mapping[str, str],
        instrument: bool = True,
        prefix: Sequence[str] = (),
    ) -> None:
        self._path = folder / "application.log"
        self._log = self._path.open("wb")
        words = [*prefix, *(["opentelemetry-instrument"] if instrument else []), *command]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, env=variables)

    @property
    def said(self) -> str:
        return self._path.read_text()

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        """Until it has printed this."""
        end_s = time.monotonic() + timeout_s
        while text not in self.said:
            assert self.process.poll() is None and time.monotonic() < end_s, self.said
            time.sleep(0.02)

    def wait_until_said(self, text: str, times: int) -> None:
        """Until it has printed this so often."""
        eventually(lambda: self.said.count(text) >= times, what=self.said)

    def wait_for_connection(self, agent: Agent) -> None:
        """Until it is connected to this agent."""
        eventually(lambda: agent.stderr.count(f"serving process {self.process.pid}\n") > 0, what=self.said)

    def go_on(self) -> None:
        """Lets it read a line."""
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Sends a signal; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def __enter__(self: AnyApplication) -> AnyApplication:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log.close()


class Script(Application):
    """applications/script.py with these steps; it reads on `port`."""

    def __init__(
        self, folder: pathlib.Path, variables: Mapping[str, str], steps: Sequence[str], prefix: Sequence[str] = ()
    ) -> None:
        self.port = free_port()
        command = ["python", str(HERE / "applications/script.py"), *steps]
        super().__init__(folder, command, {**variables, "PORT": str(self.port)}, prefix=prefix)


class Gunicorn(Application):
    """gunicorn with an application of applications/ (MODULE:NAME), and so many workers of a kind."""

    def __init__(
        self,
        folder: pathlib.Path,
        application: str,
        worker: str,
        variables: Mapping[str, str],
        *options: str,
        workers: int = 1,
        instrument: bool = True,
        prefix: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        command = ["gunicorn", "--worker-class", worker, "--workers", str(workers), *options]
        command += ["--bind", f"127.0.0.1:{self.port}", "--chdir", str(HERE / "applications"), application]
        super().__init__(folder, command, variables, instrument, prefix)
        self._workers = workers

    def wait_until_measured(self, receiver: Receiver) -> None:
        """Until a histogram tells of a request: a worker connects to the agent beside its work."""

        def measured() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                sock.recv(65536)
            return any(point.attributes.get("server.port") == self.port for point in receiver.points(DURATION))

        eventually(measured, what=self.said)

    def wait_until_ready(self) -> None:
        """Until each worker has started."""
        end_s = time.monotonic() + 60
        while self.said.count("Booting worker with pid") < self._workers:
            assert self.process.poll() is None and time.monotonic() < end_s, self.said
            time.sleep(0.02)
