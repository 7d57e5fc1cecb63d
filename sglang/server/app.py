"""The HTTP application: every endpoint, and errors in one shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from math import ceil

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import sglang
from sglang.server.errors import install_error_handlers
from sglang.server.gate import Gate, access_log
from sglang.server.native import native_router
from sglang.server.openai.chat import chat_router
from sglang.server.openai.completions import completions_router
from sglang.server.openai.embeddings import embeddings_router
from sglang.server.openai.replies import ModelCard, ModelList
from sglang.server.openapi import errors, install_openapi
from sglang.server.operations import control_router, health_router
from sglang.server.service import Service


def build_app(service: Service) -> FastAPI:
    app = FastAPI(title="nano-sglang", version=sglang.__version__)
    install_openapi(app, service)
    install_error_handlers(app)
    app.add_middleware(
        Gate, api_key=service.args.api_key, max_body_bytes=service.args.max_body_mb << 20
    )
    access_log.setLevel((service.args.log_level_http or service.args.log_level).upper())
    if service.args.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.args.allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.include_router(completions_router(service))
    app.include_router(chat_router(service))
    app.include_router(embeddings_router(service))
    app.include_router(native_router(service))
    app.include_router(health_router(service))
    app.include_router(control_router(service))

    def card() -> ModelCard:
        return ModelCard(
            id=service.model.name,
            created=service.created,
            root=service.model.path,
            max_model_len=service.model.context_len,
        )

    @app.get("/v1/models", tags=["OpenAI"], responses=errors())
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[card()])

    @app.get("/v1/models/{name:path}", tags=["OpenAI"], responses=errors(404))
    async def model(name: str) -> ModelCard:
        """The model, if that is its name."""
        service.check_model(name)
        return card()

    return app


class HTTPServer(uvicorn.Server):
    """uvicorn, on uvloop and httptools; the launcher handles signals."""

    def __init__(self, app: FastAPI, grace_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,  # the gate's knows the request's id
            timeout_keep_alive=75,  # longer than usual clients' pools keep a connection
            timeout_graceful_shutdown=ceil(grace_seconds),
            backlog=4096,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def wait_started(self, serving: asyncio.Future[None]) -> None:
        """`serving` is what runs `serve`. Raises what kept it from starting."""
        while not self.started:
            if serving.done():
                await serving
                raise OSError("the HTTP server did not start")
            await asyncio.sleep(0.01)
