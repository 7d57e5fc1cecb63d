"""What every HTTP request passes: its id, the API key, the limit of its size and the access log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.server.errors import error_response
from sglang.server.request_log import request_id

logger = logging.getLogger(__name__)
access_log = logging.getLogger("sglang.access")
OPEN_PATHS = ("/health", "/health_generate")
"""They tell nothing, and those who watch a server have no key."""


class Gate:
    """Plain ASGI: it costs a stream's events next to nothing."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key = api_key.encode() if api_key else None
        self._max_body_bytes = max_body_bytes
        self._door = asyncio.Lock()
        """One request at a time comes in, and then it is the streams' turn: of a burst, whose texts
        are parsed and tokenized in the event loop, they notice little."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.monotonic(), 0
        headers = dict(scope["headers"])
        id = headers.get(b"x-request-id", b"")[:128] or uuid.uuid4().hex.encode()
        request_id.set(id.decode("latin-1"))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id)]
            await send(message)

        length = headers.get(b"content-length", b"0")
        app = self._app
        if not self._may_pass(scope, headers):
            app = error_response("the API key is missing or wrong", 401, code="invalid_api_key")
        elif length.isdigit() and int(length) > self._max_body_bytes:
            app = error_response(self._too_long(), 413)
        if scope["method"] == "POST":
            async with self._door:
                await asyncio.sleep(0)
        try:
            await app(scope, self._counted(receive), send_with_id)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not status:
                late = error_response("the server is shutting down", 503)
                await late(scope, receive, send_with_id)
        except Exception as error:  # a bug of ours
            logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if not status:
                bug = error_response(f"internal error: {type(error).__name__}", 500)
                await bug(scope, receive, send_with_id)
            raise
        finally:
            if access_log.isEnabledFor(logging.INFO):
                client = ":".join(map(str, scope.get("client") or ()))
                seconds = time.monotonic() - start
                line = (client, scope["method"], scope["path"], status or 500, seconds)
                access_log.info("%s %s %s %d %.3f s", *line)

    def _too_long(self) -> str:
        return f"the body is too long: --max-body-mb allows {self._max_body_bytes} bytes"

    def _counted(self, receive: Receive) -> Receive:
        """A body that comes in chunks does not say its length beforehand."""
        length = 0

        async def counted() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > self._max_body_bytes:
                raise HTTPException(413, self._too_long())
            return message

        return counted

    def _may_pass(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
