"""The OpenAPI schema: what every endpoint answers, errors and streams included."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sglang.server.openai.replies import (
    ChatCompletionChunk,
    CompletionChunk,
    ErrorReply,
    Generated,
)

if TYPE_CHECKING:
    from sglang.server.service import Service

_REASONS = {
    400: "A field, or what several ask together, is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is longer than --max-body-mb allows.",
    500: "A bug.",
    503: "The queue is full, or the server is shutting down: try again.",
    504: "The request took longer than --request-timeout allows.",
}
_REF = "#/components/schemas/{model}"
_MODELS = (CompletionChunk, ChatCompletionChunk, Generated, ErrorReply)
"""Those that no route names as its reply."""

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """For a route's `responses`."""
    statuses = (401, 500, *statuses)
    content = {"application/json": {"schema": {"$ref": _REF.format(model="ErrorReply")}}}
    return {s: {"content": content, "description": _REASONS[s]} for s in sorted(statuses)}


def answers(reply: Any) -> Responses:
    """For a route that asks the engine."""
    return {200: {"model": reply}} | errors(400, 404, 413, 503, 504)


def generates(reply: Any, event: type[BaseModel]) -> Responses:
    """For a route that generates: `reply` whole, or a stream of `event`s."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {
            "anyOf": [{"$ref": _REF.format(model=m.__name__)} for m in (event, ErrorReply)]
        },
    }
    schema = {  # of one event
        "type": "object",
        "properties": {"data": {"anyOf": [data, {"const": "[DONE]"}]}},
        "required": ["data"],
    }
    described = answers(reply)
    described[200]["content"] = {"text/event-stream": {"schema": schema}}
    described[200]["description"] = (
        "The reply; with `stream` server-sent events, of which [DONE] is the last."
    )
    return described


def install_openapi(app: FastAPI, service: Service) -> None:
    """FastAPI's own says 422 for what is 400 here, and knows nothing of the gate."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, service)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(app: FastAPI, service: Service) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operation ids, which are set below
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, others = models_json_schema([(m, "serialization") for m in _MODELS], ref_template=_REF)
    for name, described in others["$defs"].items():
        schemas.setdefault(name, described)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    request_id = {"description": "The request's id.", "schema": {"type": "string"}}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            operation["operationId"] = re.sub(r"\W+", "_", method + path).strip("_")
            if method == "get":  # those that take POST too
                operation.pop("requestBody", None)
            operation["responses"].pop("422", None)
            for response in operation["responses"].values():
                response.setdefault("headers", {})["X-Request-Id"] = dict(request_id)
    if service.args.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        for path in ("/health", "/health_generate"):
            schema["paths"][path]["get"]["security"] = []
    highest_id = service.model.vocab_size - 1
    _fill_in(
        schemas,
        {
            "token-id": {"type": "integer", "minimum": 0, "maximum": highest_id},
            "model-name": {"enum": service.model_names},
        },
    )
    return schema


def _fill_in(node: Any, formats: dict[str, dict[str, Any]]) -> None:
    """What this server has, in place of a format's name."""
    if isinstance(node, dict) and node.get("format") in formats:
        described = formats[node.pop("format")]
        if "enum" in described:
            node.pop("type")
        node.update(described)
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            _fill_in(child, formats)
