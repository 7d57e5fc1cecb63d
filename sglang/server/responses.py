"""HTTP responses that follow a generation: streamed as server-sent events, or whole."""

from __future__ import annotations

import asyncio
from typing import Protocol

from fastapi import Response
from orjson import dumps
from starlette.types import Receive, Scope, Send

from sglang.server.errors import error_body, error_response
from sglang.server.tokenizer_manager import Generation, GenerationClosed, Sequence

DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
_JSON_HEADERS = [(b"content-type", b"application/json")]
_CLIENT_CLOSED_REQUEST = 499
_TOO_LONG = ("the request took longer than --request-timeout allows", 504, None, "timeout")


class Writer(Protocol):
    """The shape of one endpoint's replies. Its events are whole: b"data: ...\\n\\n"."""

    def opening(self) -> bytes:
        """Events before the first token."""
        ...

    def event(self, sequence: Sequence) -> bytes:
        """Events for what a sequence has said since the last call; b"" if that shows nothing. The
        token path: no dict, no pydantic, parts prepared beforehand."""
        ...

    def closing(self) -> bytes:
        """Events when every sequence has ended."""
        ...

    def whole(self) -> bytes:
        """The reply that is not streamed: a JSON object."""
        ...


class GenerationResponse(Response):
    """Frees what the generation holds when it ends or its client goes away, whichever is first.

    Plain ASGI, since at hundreds of streams the server's event loop is the limit.
    """

    def __init__(self, generation: Generation, writer: Writer, stream: bool) -> None:
        super().__init__()
        self.raw_headers = _STREAM_HEADERS if stream else _JSON_HEADERS
        self._generation, self._writer, self._stream = generation, writer, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await (self._send_stream(send) if self._stream else self._send_whole(send))
        except GenerationClosed:
            if self._generation.timed_out:
                await error_response(*_TOO_LONG)(scope, receive, send)
            else:  # there is nobody to tell; the server wants a response
                await _send(send, _CLIENT_CLOSED_REQUEST, [], b"")
        finally:
            watcher.cancel()
            self._generation.close()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.close()

    async def _send_whole(self, send: Send) -> None:
        await self._generation.finished()
        body = self._writer.whole()
        length = (b"content-length", str(len(body)).encode())
        await _send(send, self.status_code, [*self.raw_headers, length], body)

    async def _send_stream(self, send: Send) -> None:
        generation, event = self._generation, self._writer.event
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        body = self._writer.opening()
        while True:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            try:
                news = await generation.news()
            except GenerationClosed:
                if generation.timed_out:
                    body = b"data: " + dumps(error_body(*_TOO_LONG)) + b"\n\n" + DONE
                    await send({"type": "http.response.body", "body": body, "more_body": False})
                return
            body = event(news[0]) if len(news) == 1 else b"".join(map(event, news))
            if not generation.is_open:
                break
        body += self._writer.closing()
        await send({"type": "http.response.body", "body": body, "more_body": False})


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
