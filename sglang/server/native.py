"""SGLang's own endpoints: /generate, health, information, cache and aborts."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

import sglang
from sglang.messages import unpack
from sglang.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from sglang.server.errors import ApiError
from sglang.server.limits import NO_LOGPROBS, LogprobsWanted
from sglang.server.openai.logprobs import NativeLogprobs
from sglang.server.openai.schemas import (
    TEXTS,
    TOKEN_LISTS,
    Unsupported,
    check_unicode,
    parse_prompts,
    refuse_unsupported,
)
from sglang.server.openai.writing import dumps
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Prompt, Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence
from sglang.tokenizer import Tokenizer

HEALTH_SECONDS = 20.0
FLUSH_TRIES = 20


class GenerateBody(BaseModel):
    """Either `text` or `input_ids`. `sampling_params` has the fields of SamplingParams, and n; one
    for all prompts or a list with one for each."""

    model_config = ConfigDict(strict=True)

    text: Annotated[Any, WithJsonSchema(TEXTS)] = None
    input_ids: Annotated[Any, WithJsonSchema(TOKEN_LISTS)] = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool | None = False
    rid: str | None = None

    return_logprob: bool | None = None
    top_logprobs_num: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    logprob_start_len: int | None = Field(None, ge=-1)
    """With `return_logprob`: prompt tokens from here on have theirs too; -1: none has."""
    return_text_in_logprobs: bool | None = None

    input_embeds: Unsupported = None
    image_data: Unsupported = None
    lora_path: Unsupported = None
    custom_logit_processor: Unsupported = None


class AbortBody(BaseModel):
    model_config = ConfigDict(strict=True)

    rid: str | None = None
    abort_all: bool = False


class ProfileBody(BaseModel):
    model_config = ConfigDict(strict=True)

    output_dir: str | None = None
    """Where the trace goes: an existing folder (default: the one for temporary files)."""
    num_steps: Unsupported = None
    profile_by_stage: Unsupported = None


class TokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    text: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    tokens: list[int]
    skip_special_tokens: bool = False


class NativeWriter:
    """Streamed replies hold all of the text and ids so far, as SGLang's do."""

    def __init__(
        self,
        generation: Generation,
        is_single: bool,
        tokenizer: Tokenizer | None,
        logprobs: NativeLogprobs | None,
    ) -> None:
        self._generation, self._is_single = generation, is_single
        self._has_text, self._logprobs = tokenizer is not None, logprobs

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
        if self._logprobs is not None:
            meta |= self._logprobs.of(sequence)
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
        if values.get("structural_tag"):
            message = "structural_tag is not supported by this server"
            raise ApiError(message, "structural_tag")
        params.append(service.sampling({k: v for k, v in values.items() if k != "n"}, names))
    return params, n


def _logprobs_wanted(body: GenerateBody) -> LogprobsWanted:
    if not body.return_logprob:
        for name in ("top_logprobs_num", "logprob_start_len"):
            if (getattr(body, name) or -1) > 0:
                raise ApiError(f"{name} needs return_logprob to be true", name)
        return NO_LOGPROBS
    start = -1 if body.logprob_start_len is None else body.logprob_start_len
    return LogprobsWanted(body.top_logprobs_num or 0, start)


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
        ids = await service.encode_prompts(prompts)
        wanted = _logprobs_wanted(body)
        generation = service.generate(
            body.rid or new_id("gen"),
            list(zip(ids, params, strict=True)),
            n=n,
            stream=bool(body.stream),
            names=names,
            logprobs=wanted,
        )
        logprobs = None
        if wanted.top >= 0:
            has_text = service.tokenizer is not None and body.return_text_in_logprobs
            tokenizer = service.tokenizer if has_text else None
            logprobs = NativeLogprobs(tokenizer, ids, n, wanted)
        is_single = n == 1 and not is_batch
        writer = NativeWriter(generation, is_single, service.tokenizer, logprobs)
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

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        text = manager.metrics.render(await manager.stats())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """A text's token ids."""
        try:
            check_unicode(body.text)
        except ValueError as error:
            raise ApiError(f"text {error}", "text") from None
        service.need_tokenizer()
        ids = await service.encode(body.text, body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.model.context_len}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """The text of token ids."""
        tokenizer = service.need_tokenizer()
        if any(not 0 <= id < service.model.vocab_size for id in body.tokens):
            raise ApiError(f"tokens must be in [0, {service.model.vocab_size})", "tokens")
        return {"text": tokenizer.decode(body.tokens, body.skip_special_tokens)}

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
            "event_loop_lag_ms": service.lag.figures(),
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

    folder = Path(tempfile.gettempdir())

    @router.api_route("/start_profile", methods=["GET", "POST"])
    async def start_profile(body: ProfileBody | None = None) -> dict[str, str]:
        """Begins to note who does what when: router, launch thread, GPU, reply thread."""
        nonlocal folder
        body = body or ProfileBody()
        refuse_unsupported(body)
        asked = Path(body.output_dir or tempfile.gettempdir())
        if not asked.is_dir():
            raise ApiError(f"output_dir {str(asked)!r} is not a folder", "output_dir")
        try:
            manager.start_profile()
        except ValueError as error:
            raise ApiError(str(error)) from None
        folder = asked
        return {"status": "profiling"}

    @router.api_route("/stop_profile", methods=["GET", "POST"])
    async def stop_profile() -> dict[str, str]:
        """Writes the trace, for https://ui.perfetto.dev, and says where it is."""
        try:
            path = await manager.stop_profile(service.args.tp_size, folder)
        except ValueError as error:
            raise ApiError(str(error)) from None
        return {"status": "stopped", "trace": str(path)}

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
