"""What every HTTP request passes: its id, the API key and the limit of its size."""

from __future__ import annotations

import hmac
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.server.errors import error_response

OPEN_PATHS = ("/health", "/health_generate")
"""They tell nothing, and those who watch a server have no key."""


class Gate:
    """Plain ASGI: it costs a stream's events next to nothing."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key = api_key.encode() if api_key else None
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:128] or uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        if not self._may_pass(scope, headers):
            body = error_response("the API key is missing or wrong", 401, code="invalid_api_key")
            return await body(scope, receive, send_with_id)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            body = error_response(
                f"the body has {int(length)} bytes: --max-body-mb allows {self._max_body_bytes}",
                413,
            )
            return await body(scope, receive, send_with_id)
        return await self._app(scope, receive, send_with_id)

    def _may_pass(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
