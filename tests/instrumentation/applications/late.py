"""A shop that reads late, now and then: what it asked for lies in its receive queue meanwhile."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Generator
from typing import Any

import flask
import psycopg
import redis
import requests
from opentelemetry import trace

LATE_S = 0.03

app = flask.Flask(__name__)


class LateRedis(redis.Connection):
    """Has something else to do before it reads an answer."""

    def read_response(self, *arguments: Any, **named: Any) -> Any:
        if "late" in flask.request.args:
            time.sleep(LATE_S)
        return super().read_response(*arguments, **named)


class LatePostgres(psycopg.Connection[Any]):
    """Has something else to do when an answer has come."""

    def wait(self, gen: Generator[Any, Any, Any], interval: float = 0.0, timeout: float | None = None) -> Any:
        try:
            wanted = next(gen)
            while True:
                events = select.POLLIN * (wanted & 1) | select.POLLOUT * (wanted >> 1 & 1)
                poll = select.poll()
                poll.register(self.fileno(), events)
                ((_, happened),) = poll.poll()
                ready = (happened & select.POLLIN > 0) | (happened & select.POLLOUT > 0) << 1
                if ready & 1 and "late" in flask.request.args:
                    time.sleep(LATE_S)
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


_redis = redis.Redis(
    connection_pool=redis.ConnectionPool(
        connection_class=LateRedis, host="127.0.0.1", port=int(os.environ["REDIS_PORT"]), protocol=2
    )
)


@app.after_request
def tell_trace(response: flask.Response) -> flask.Response:
    context = trace.get_current_span().get_span_context()
    response.headers["Trace-Id"] = f"{context.trace_id:032x}"
    response.headers["Span-Id"] = f"{context.span_id:016x}"
    return response


@app.get("/redis")
def from_redis() -> str:
    return str(_redis.get("stock"))


@app.get("/postgres")
def from_postgres() -> str:
    with LatePostgres.connect(os.environ["POSTGRES"], autocommit=True) as connection:
        return str(connection.execute("select 42").fetchone())


@app.get("/requests")
def from_upstream() -> str:
    """The body comes after the headers: its span has ended then, and it is the server's that reads."""
    answer = requests.get(os.environ["UPSTREAM"], stream=True, timeout=20)
    if "late" in flask.request.args:
        time.sleep(2 * LATE_S)
    return str(len(answer.content))


@app.post("/body")
def its_own_body() -> str:
    if "late" in flask.request.args:
        time.sleep(2 * LATE_S)
    return str(len(flask.request.get_data()))


@app.get("/hog")
def hog() -> str:
    """Asks, and keeps all greenlets of its thread from reading the answer."""
    connection = _redis.connection_pool.get_connection()
    connection.send_command("GET", "stock")  # type: ignore[no-untyped-call]
    end_s = time.monotonic() + LATE_S
    while time.monotonic() < end_s:
        pass
    return str(connection.read_response())


@app.get("/busy")
def busy() -> str:
    time.sleep(float(flask.request.args.get("s", LATE_S)))
    return "idle"
