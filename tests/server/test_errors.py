"""What a client hears of a bug of ours."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import FastAPI

from sglang.server.errors import install_error_handlers
from sglang.server.gate import Gate


def test_a_bug_is_answered_in_openais_shape_with_the_requests_id() -> None:
    app = FastAPI()
    install_error_handlers(app)
    app.add_middleware(Gate, api_key=None, max_body_bytes=1 << 20)
    sent = []

    @app.get("/bug")
    async def bug() -> None:
        raise KeyError("ours")

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "path": "/bug", "raw_path": b"/bug", "root_path": "", "scheme": "http", "query_string": b"",
        "headers": [(b"x-request-id", b"abc")], "client": ("127.0.0.1", 1), "server": ("a", 1),
    }  # fmt: skip
    with pytest.raises(KeyError):  # for the server's log
        asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 500
    assert [value for name, value in sent[0]["headers"] if name == b"x-request-id"] == [b"abc"]
    error = json.loads(sent[1]["body"])["error"]
    assert (error["type"], error["message"]) == ("server_error", "internal error: KeyError")
