"""SGLang's own endpoints: /generate, health, information, cache and aborts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, WithJsonSchema

import sglang
from sglang.messages import unpack
from sglang.sampling_params import SamplingParams
from sglang.server.errors import ApiError
from sglang.server.openai.schemas import (
    TEXTS,
    TOKEN_LISTS,
    Unsupported,
    parse_prompts,
    refuse_unsupported,
)
from sglang.server.openai.writing import dumps
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Prompt, Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence

HEALTH_SECONDS = 20.0
FLUSH_TRIES = 20
_UNSUPPORTED_PARAMS = ("regex", "json_schema", "ebnf", "structural_tag")


class GenerateBody(BaseModel):
    """Either `text` or `input_ids`. `sampling_params` has the fields of SamplingParams, and n; one
    for all prompts or a list with one for each."""

    model_config = ConfigDict(strict=True)

    text: Annotated[Any, WithJsonSchema(TEXTS)] = None
    input_ids: Annotated[Any, WithJsonSchema(TOKEN_LISTS)] = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool | None = False
    rid: str | None = None

    return_logprob: Unsupported = None
    input_embeds: Unsupported = None
    image_data: Unsupported = None
    lora_path: Unsupported = None
    custom_logit_processor: Unsupported = None


class AbortBody(BaseModel):
    model_config = ConfigDict(strict=True)

    rid: str | None = None
    abort_all: bool = False


class NativeWriter:
    """Streamed replies hold all of the text and ids so far, as SGLang's do."""

    def __init__(self, generation: Generation, is_single: bool, has_text: bool) -> None:
        self._generation, self._is_single, self._has_text = generation, is_single, has_text

    def _reply(self, sequence: Sequence) -> dict[str, Any]:
        end = sequence.end
        meta = {
            "id": self._generation.rid,
            "finish_reason": end.finish_reason() if end else None,
            "prompt_tokens": sequence.prompt_tokens,
            "completion_tokens": len(sequence.ids) // 4,
            "cached_tokens": sequence.cached_tokens,
        }
        if end is not None:
            meta["e2e_latency"] = time.monotonic() - self._generation.start
        text = {"text": sequence.text} if self._has_text else {}
        return {**text, "output_ids": unpack(sequence.ids).tolist(), "meta_info": meta}

    def opening(self) -> bytes:
        return b""

    def event(self, sequence: Sequence) -> bytes:
        reply = self._reply(sequence)
        if not self._is_single:
            reply["index"] = sequence.index
        return b"data: " + dumps(reply) + b"\n\n"

    def closing(self) -> bytes:
        return DONE

    def whole(self) -> bytes:
        replies = [self._reply(sequence) for sequence in self._generation.sequences]
        return dumps(replies[0] if self._is_single else replies)


def _prompts(body: GenerateBody) -> tuple[str, list[Prompt], bool]:
    """(the field's name, its prompts, whether it was a list of them)."""
    if (body.text is None) == (body.input_ids is None):
        raise ApiError("either text or input_ids must be given, and not both", "text")
    field = "text" if body.input_ids is None else "input_ids"
    value = getattr(body, field)
    try:
        prompts = parse_prompts(value)
    except ValueError as error:
        raise ApiError(f"{field} {error}", field) from None
    if isinstance(prompts[0], str) != (field == "text"):
        kind = "strings" if field == "text" else "lists of token ids"
        raise ApiError(f"{field} must hold {kind}", field)
    return field, prompts, prompts is value


def _sampling(
    service: Service, body: GenerateBody, num_prompts: int, names: dict[str, str]
) -> tuple[list[SamplingParams], int]:
    """(the parameters of each prompt, n)."""
    given = body.sampling_params or {}
    dicts = given if isinstance(given, list) else [given] * num_prompts
    if len(dicts) != num_prompts:
        message = f"sampling_params has {len(dicts)} entries for {num_prompts} prompts"
        raise ApiError(message, "sampling_params")
    ns = [1 if values.get("n") is None else values["n"] for values in dicts]
    n = ns[0]
    if type(n) is not int or n < 1 or any(other != n for other in ns):
        raise ApiError("n must be one integer >= 1 for all prompts", "n")
    params = []
    for values in dicts:
        unsupported = [
            k for k in ("regex", "json_schema", "ebnf", "structural_tag") if values.get(k)
        ]
        if unsupported:
            raise ApiError(f"{unsupported[0]} is not supported by this server", unsupported[0])
        params.append(service.sampling({k: v for k, v in values.items() if k != "n"}, names))
    return params, n


def native_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["native"])
    manager = service.manager

    @router.post("/generate")
    async def generate(body: GenerateBody) -> Response:
        """Continues prompts, in SGLang's own shape."""
        refuse_unsupported(body)
        field, prompts, is_batch = _prompts(body)
        names = {"prompt": field}
        params, n = _sampling(service, body, len(prompts), names)
        generation = service.generate(
            body.rid or new_id("gen"),
            list(zip(await service.encode_prompts(prompts), params, strict=True)),
            n=n,
            stream=bool(body.stream),
            names=names,
        )
        is_single = n == 1 and not is_batch
        writer = NativeWriter(generation, is_single, service.tokenizer is not None)
        return GenerationResponse(generation, writer, bool(body.stream))

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The server accepts requests."""
        if service.draining:
            raise ApiError("the server is shutting down", status=503)
        return {"status": "ok"}

    @router.get("/health_generate")
    async def health_generate() -> dict[str, str]:
        """The engine generates: a token, now."""
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        prompt = [service.model.bos_token_id or 0]
        generation = service.generate(new_id("health"), [(prompt, params)], stream=False, names={})
        try:
            await asyncio.wait_for(generation.finished(), HEALTH_SECONDS)
        except asyncio.TimeoutError:
            message = f"the engine generated no token within {HEALTH_SECONDS:.0f} s"
            raise ApiError(message, status=503) from None
        finally:
            generation.close()
        return {"status": "ok"}

    @router.get("/get_model_info")
    async def get_model_info() -> dict[str, Any]:
        model = service.model
        return {
            "model_path": model.path,
            "tokenizer_path": service.args.tokenizer_path or model.path,
            "served_model_name": model.name,
            "is_generation": True,
            "architecture": model.architecture,
            "dtype": model.dtype,
            "context_length": model.context_len,
            "vocab_size": model.vocab_size,
        }

    @router.get("/get_server_info")
    async def get_server_info() -> dict[str, Any]:
        """The launch flags, what the engine made of them, and counters."""
        return {
            **dataclasses.asdict(service.args),
            "version": sglang.__version__,
            "max_total_num_tokens": service.engine.max_total_tokens,
            "max_running_requests": service.engine.max_running_requests,
            "context_length": service.engine.context_len,
            "num_requests": manager.num_generations,
            "stats": msgspec.structs.asdict(await manager.stats()),
        }

    @router.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> dict[str, str]:
        """Forgets every cached prefix; refused while requests run."""
        # A request whose client has its whole reply may keep its seat for a step or two more.
        for _ in range(FLUSH_TRIES):
            if await manager.flush_cache():
                return {"status": "flushed"}
            if manager.num_generations:
                break
            await asyncio.sleep(0.05)
        raise ApiError("the cache is in use: requests are running", status=400)

    @router.post("/abort_request")
    async def abort_request(body: AbortBody) -> dict[str, bool]:
        """Ends a request, by the id in its replies, or all."""
        if body.abort_all:
            manager.abort_all()
            return {"aborted": True}
        if body.rid is None:
            raise ApiError("rid must be given, or abort_all", "rid")
        return {"aborted": manager.abort(body.rid)}

    return router
