"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sglang.server.limits import ContextOverflow


class ApiError(Exception):
    """Ends a request with `status`. `param` is the field at fault, as the client spells it."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = headers
        self.message, self.param, self.status, self.code = message, param, status, code


def bad_value(error: ValueError, names: dict[str, str] | None = None) -> ApiError:
    """From an error whose message starts with the field's name. `names` says how the client spells
    it, where that differs."""
    field, space, rest = str(error).partition(" ")
    param = (names or {}).get(field.rstrip(":"), field.rstrip(":"))
    message = field.replace(field.rstrip(":"), param) + space + rest
    for ours, theirs in (names or {}).items():
        if "_" in ours:  # not an English word
            message = message.replace(ours, theirs)
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
    return ApiError(message, param if param.replace("_", "").isalnum() else None, code=code)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    message = message.encode(errors="replace").decode()  # it may quote half a surrogate pair
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    message: str,
    status: int,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(message, status, param, code), status, headers)


def describe_validation(errors: Sequence[Any]) -> tuple[str, str | None]:
    """(message, field) of pydantic's errors: the first field at fault, and all that it might have
    been."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", None
    path = first["loc"][1:]
    if not path:
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    field = str(path[0])
    reasons = []
    for error in errors:
        if error["loc"][1:2] == path[:1]:
            reason = error["msg"].removeprefix("Value error, ")
            reason = reason.replace("Input should be", "must be", 1)
            if reason not in reasons:
                reasons.append(reason[:1].lower() + reason[1:])
    # Where inside the field: indices and names, without the names of a union's alternatives.
    where = field
    for part in path[1:] if len(reasons) == 1 else ():
        if isinstance(part, int):
            where += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool"):
            where += f".{part}"
    return f"{where}: " + ", or ".join(reasons[:4]), field


def install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error.message, error.status, error.param, error.code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        message, field = describe_validation(error.errors())
        return error_response(message, 400, field)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path} here"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        return error_response(message, error.status_code, headers=dict(error.headers or {}))
