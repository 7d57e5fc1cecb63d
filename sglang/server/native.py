"""SGLang's own endpoints: /generate, /tokenize and /detokenize."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from sglang.messages import unpack
from sglang.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from sglang.server.errors import ApiError
from sglang.server.limits import NO_LOGPROBS, LogprobsWanted
from sglang.server.openai.logprobs import NativeLogprobs
from sglang.server.openai.replies import Generated
from sglang.server.openai.schemas import (
    BIASES,
    LIMITS,
    STOPS,
    TEXTS,
    TOKEN_ID,
    TOKEN_LISTS,
    Text,
    TokenIds,
    Unsupported,
    check_unicode,
    parse_prompts,
    refuse_unsupported,
)
from sglang.server.openai.writing import dumps
from sglang.server.openapi import errors, generates
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Prompt, Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence
from sglang.tokenizer import Tokenizer

_NULL = {"type": "null"}


def _sampling_schema() -> dict[str, Any]:
    """Of SamplingParams, as clients may spell it, with n."""
    described = msgspec.json.schema(SamplingParams)["$defs"]["SamplingParams"]["properties"]
    described |= {
        "n": {"type": "integer"},
        "stop": STOPS,
        "stop_token_ids": {"type": "array", "items": TOKEN_ID},
        "logit_bias": BIASES,
        "json_schema": {"type": ["string", "object"]},
    }
    fields = {
        name: {"anyOf": [{**field, **LIMITS.get(name, {})}, _NULL]}
        for name, field in described.items()
    }
    return {"type": "object", "properties": fields, "additionalProperties": False}


_SAMPLING = _sampling_schema()
_NumTop = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
_Start = Annotated[int, Field(ge=-1, lt=2**31)]


class GenerateBody(BaseModel):
    """Either `text` or `input_ids`. `sampling_params`, `rid` and what is said of logprobs: one for
    all prompts, or a list with one for each."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["input_ids"]}]},
    )

    text: Annotated[Any, WithJsonSchema(TEXTS)] = None
    input_ids: Annotated[Any, WithJsonSchema(TOKEN_LISTS)] = None
    sampling_params: Annotated[
        dict[str, Any] | list[dict[str, Any]] | None,
        WithJsonSchema({"anyOf": [_SAMPLING, {"type": "array", "items": _SAMPLING}, _NULL]}),
    ] = None
    stream: bool | None = False
    rid: Text | list[Text] | None = None

    return_logprob: bool | list[bool] | None = None
    top_logprobs_num: _NumTop | list[_NumTop] | None = None
    logprob_start_len: _Start | list[_Start] | None = None
    """With `return_logprob`: prompt tokens from here on have theirs too; -1: none has."""
    return_text_in_logprobs: bool | None = None

    input_embeds: Unsupported = None
    image_data: Unsupported = None
    video_data: Unsupported = None
    audio_data: Unsupported = None
    session_params: Unsupported = None
    return_hidden_states: Unsupported = None
    lora_path: Unsupported = None
    custom_logit_processor: Unsupported = None
    token_ids_logprob: Unsupported = None


class TokenizeBody(BaseModel):
    """Either `text` or, as other servers call it, `prompt`."""

    model_config = ConfigDict(
        strict=True, json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["prompt"]}]}
    )

    text: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    tokens: TokenIds
    skip_special_tokens: bool | None = None


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    text: str


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
            "id": sequence.rid,
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


def _each(body: GenerateBody, field: str, num_prompts: int) -> list[Any]:
    given = getattr(body, field)
    values = given if isinstance(given, list) else [given] * num_prompts
    if len(values) != num_prompts:
        raise ApiError(f"{field} has {len(values)} entries for {num_prompts} prompts", field)
    return values


def _sampling(
    service: Service, body: GenerateBody, num_prompts: int, names: dict[str, str]
) -> tuple[list[SamplingParams], int]:
    """(the parameters of each prompt, n)."""
    dicts = [given or {} for given in _each(body, "sampling_params", num_prompts)]
    ns = [1 if values.get("n") is None else values["n"] for values in dicts]
    n = ns[0]
    if type(n) is not int or n < 1 or any(other != n for other in ns):
        raise ApiError("n must be one integer >= 1 for all prompts", "n")
    without_n = ({k: v for k, v in values.items() if k != "n"} for values in dicts)
    return [service.sampling(values, names) for values in without_n], n


def _logprobs_wanted(body: GenerateBody, num_prompts: int) -> list[LogprobsWanted]:
    wants, tops, starts = (
        _each(body, name, num_prompts)
        for name in ("return_logprob", "top_logprobs_num", "logprob_start_len")
    )
    for name, values in (("top_logprobs_num", tops), ("logprob_start_len", starts)):
        if not any(wants) and any((value or -1) > 0 for value in values):
            raise ApiError(f"{name} needs return_logprob to be true", name)
    return [
        LogprobsWanted(top or 0, -1 if start is None else start) if wanted else NO_LOGPROBS
        for wanted, top, start in zip(wants, tops, starts, strict=True)
    ]


def _rids(body: GenerateBody, num_prompts: int, is_batch: bool) -> tuple[str, list[str] | None]:
    """(the request's, those of its prompts), as SGLang names them."""
    if isinstance(body.rid, list):
        return new_id("gen"), _each(body, "rid", num_prompts)
    rid = body.rid or new_id("gen")
    return rid, [f"{rid}_{i}" for i in range(num_prompts)] if is_batch else None


def native_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["native"])

    @router.post("/generate", responses=generates(Generated | list[Generated], Generated))
    async def generate(body: GenerateBody) -> Response:
        """Continues prompts, in SGLang's own shape."""
        refuse_unsupported(body)
        field, prompts, is_batch = _prompts(body)
        names = {"prompt": field}
        params, n = _sampling(service, body, len(prompts), names)
        ids = await service.encode_prompts(prompts)
        wanted = _logprobs_wanted(body, len(prompts))
        rid, rids = _rids(body, len(prompts), is_batch)
        with service.generate(
            rid,
            list(zip(ids, params, strict=True)),
            n=n,
            stream=bool(body.stream),
            names=names,
            logprobs=wanted,
            rids=rids,
        ) as generation:
            logprobs = None
            if any(one.top >= 0 for one in wanted):
                has_text = service.tokenizer is not None and body.return_text_in_logprobs
                tokenizer = service.tokenizer if has_text else None
                logprobs = NativeLogprobs(tokenizer, ids, n, wanted)
            is_single = n == 1 and not is_batch
            writer = NativeWriter(generation, is_single, service.tokenizer, logprobs)
            return GenerationResponse(generation, writer, bool(body.stream))

    @router.post("/tokenize", responses=errors(400, 413))
    async def tokenize(body: TokenizeBody) -> Tokens:
        """A text's token ids."""
        if (body.text is None) == (body.prompt is None):
            raise ApiError("either text or prompt must be given, and not both", "text")
        field, text = ("prompt", body.prompt) if body.text is None else ("text", body.text)
        assert text is not None
        try:
            check_unicode(text)
        except ValueError as error:
            raise ApiError(f"{field} {error}", field) from None
        service.need_tokenizer()
        ids = await service.encode(text, body.add_special_tokens is not False)
        return Tokens(tokens=ids, count=len(ids), max_model_len=service.model.context_len)

    @router.post("/detokenize", responses=errors(400, 413))
    async def detokenize(body: DetokenizeBody) -> Detokenized:
        """The text of token ids."""
        tokenizer = service.need_tokenizer()
        if any(not 0 <= id < service.model.vocab_size for id in body.tokens):
            raise ApiError(f"tokens must be in [0, {service.model.vocab_size})", "tokens")
        return Detokenized(text=tokenizer.decode(body.tokens, bool(body.skip_special_tokens)))

    return router
