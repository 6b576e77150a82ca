"""An ASGI application under uvicorn that keeps its loop busy: what it reads meanwhile waits, of whoever it is."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

tracer = trace.get_tracer("asynchronous")


async def late() -> None:
    """Sends itself a segment, and lets the loop do something else until it has been there for a while."""
    served: asyncio.Future[asyncio.StreamReader] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda reader, _: served.set_result(reader), "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    reader = await served
    writer.write(b"x" * 10)
    await writer.drain()
    time.sleep(0.03)
    with tracer.start_as_current_span("read"):
        await reader.readexactly(10)
    writer.close()
    server.close()


async def _app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    with tracer.start_as_current_span("handle"):
        if scope["path"] == "/late":
            await late()
        elif scope["path"] == "/thread":
            await asyncio.to_thread(in_thread)
    context = trace.get_current_span().get_span_context()
    headers = [(b"trace-id", f"{context.trace_id:032x}".encode()), (b"content-length", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok\n"})


def in_thread() -> None:
    """A library that blocks, in a thread of the pool: a span that begins there is sure."""
    import redis

    class Late(redis.Connection):
        def read_response(self, *arguments: Any, **named: Any) -> Any:
            time.sleep(0.03)
            return super().read_response(*arguments, **named)

    pool = redis.ConnectionPool(connection_class=Late, host="127.0.0.1", port=int(os.environ["REDIS_PORT"]), protocol=2)
    redis.Redis(connection_pool=pool).get("stock")


app = OpenTelemetryMiddleware(_app)
