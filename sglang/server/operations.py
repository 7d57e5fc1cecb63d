"""SGLang's endpoints for those who run a server: health, information, metrics, cache, profiles."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

import sglang
from sglang.sampling_params import SamplingParams
from sglang.server.errors import ApiError
from sglang.server.openai.schemas import Unsupported, refuse_unsupported
from sglang.server.openapi import errors
from sglang.server.service import Service, new_id

HEALTH_SECONDS = 20.0
FLUSH_TRIES = 20


class AbortBody(BaseModel):
    model_config = ConfigDict(strict=True)

    rid: str | None = None
    abort_all: bool | None = None


class ProfileBody(BaseModel):
    model_config = ConfigDict(strict=True)

    output_dir: str | None = None
    """Where the trace goes: an existing folder (default: the one for temporary files)."""
    num_steps: Unsupported = None
    profile_by_stage: Unsupported = None


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Status(BaseModel):
    status: str


class Trace(Status):
    trace: str
    """The file."""


class Aborted(BaseModel):
    aborted: bool


class ModelInfo(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool
    architecture: str
    dtype: str
    context_length: int
    vocab_size: int
    hidden_size: int


class ServerInfo(BaseModel):
    """And every launch flag."""

    model_config = ConfigDict(extra="allow")

    version: str
    max_total_num_tokens: int
    max_running_requests: int
    context_length: int
    num_requests: int
    stats: dict[str, int | float]


def health_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])
    manager = service.manager

    @router.get("/health", responses=errors(503))
    async def health() -> Health:
        """The server accepts requests."""
        if service.draining:
            raise ApiError("the server is shutting down", status=503)
        return Health()

    @router.get("/health_generate", responses=errors(503))
    async def health_generate() -> Health:
        """The engine generates: a token, now, for this request or for another."""
        await health()
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        prompt = [service.model.bos_token_id or 0]
        # However long the queue is: a server that has much to do is not ill.
        generation = manager.generate(new_id("health"), [(prompt, params)], wants_deltas=False)
        generation.is_counted = False
        asked, finished = time.monotonic(), asyncio.ensure_future(generation.finished())
        try:
            while not finished.done() and manager.news_at < asked:
                if time.monotonic() > asked + HEALTH_SECONDS:
                    message = f"the engine generated no token within {HEALTH_SECONDS:.0f} s"
                    raise ApiError(message, status=503)
                await asyncio.wait({finished}, timeout=0.1)
        finally:
            finished.cancel()
            generation.close()
        return Health()

    @router.get("/metrics", response_class=PlainTextResponse, responses=errors())
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        text = manager.metrics.render(await manager.stats())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @router.get("/model_info", responses=errors())
    @router.get("/get_model_info", responses=errors())
    async def get_model_info() -> ModelInfo:
        """What is served."""
        model = service.model
        return ModelInfo(
            model_path=model.path,
            tokenizer_path=service.args.tokenizer_path or model.path,
            served_model_name=model.name,
            is_generation=True,
            architecture=model.architecture,
            dtype=model.dtype,
            context_length=model.context_len,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
        )

    @router.get("/server_info", responses=errors(), response_model=ServerInfo)
    @router.get("/get_server_info", responses=errors(), response_model=ServerInfo)
    async def get_server_info() -> dict[str, Any]:
        """The launch flags, what the engine made of them, and counters."""
        return {
            **{k: v for k, v in dataclasses.asdict(service.args).items() if k != "api_key"},
            "version": sglang.__version__,
            "max_total_num_tokens": service.engine.max_total_tokens,
            "max_running_requests": service.engine.max_running_requests,
            "context_length": service.engine.context_len,
            "num_requests": manager.num_generations,
            "event_loop_lag_ms": service.lag.figures(),
            "stats": msgspec.structs.asdict(await manager.stats()),
        }

    return router


def control_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])
    manager = service.manager
    folder = Path(tempfile.gettempdir())

    @router.api_route("/flush_cache", methods=["GET", "POST"], responses=errors(400))
    async def flush_cache() -> Status:
        """Forgets every cached prefix; refused while requests run."""
        # A request whose client has its whole reply may keep its seat for a step or two more.
        for _ in range(FLUSH_TRIES):
            if await manager.flush_cache():
                return Status(status="flushed")
            if manager.num_generations:
                break
            await asyncio.sleep(0.05)
        raise ApiError("the cache is in use: requests are running", status=400)

    @router.api_route("/start_profile", methods=["GET", "POST"], responses=errors(400, 413))
    async def start_profile(body: ProfileBody | None = None) -> Status:
        """Begins to note who does what when: router, launch thread, GPU, reply thread."""
        nonlocal folder
        body = body or ProfileBody()
        refuse_unsupported(body)
        asked = Path(body.output_dir or tempfile.gettempdir())
        try:
            is_folder = asked.is_dir()
        except (OSError, ValueError):  # it is no path at all
            is_folder = False
        if not is_folder:
            raise ApiError(f"output_dir {str(asked)!r} is not a folder", "output_dir")
        try:
            manager.start_profile()
        except ValueError as error:
            raise ApiError(str(error)) from None
        folder = asked
        return Status(status="profiling")

    @router.api_route("/stop_profile", methods=["GET", "POST"], responses=errors(400))
    async def stop_profile() -> Trace:
        """Writes the trace, for https://ui.perfetto.dev, and says where it is."""
        try:
            path = await manager.stop_profile(service.args.tp_size, folder)
        except (ValueError, OSError) as error:
            raise ApiError(str(error)) from None
        return Trace(status="stopped", trace=str(path))

    @router.post("/abort_request", responses=errors(400, 413))
    async def abort_request(body: AbortBody) -> Aborted:
        """Ends a request, by the id in its replies, or all."""
        if body.abort_all:
            manager.abort_all()
            return Aborted(aborted=True)
        if body.rid is None:
            raise ApiError("rid must be given, or abort_all", "rid")
        return Aborted(aborted=manager.abort(body.rid))

    return router
