"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Response

from sglang.server.errors import ApiError
from sglang.server.limits import LogprobsWanted
from sglang.server.openai import writing
from sglang.server.openai.logprobs import chat_logprobs
from sglang.server.openai.schemas import ChatMessage, ChatRequest
from sglang.server.openai.writing import dumps
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence
from sglang.tokenizer import Tokenizer


class ChatWriter:
    def __init__(
        self, request: ChatRequest, generation: Generation, model: str, tokenizer: Tokenizer
    ) -> None:
        self._generation, self._n, self._tokenizer = generation, request.n or 1, tokenizer
        self._wants_logprobs = bool(request.logprobs)
        self._keeps_stop = bool(request.no_stop_trim)
        self._wants_usage = request.include_usage
        self._head = {
            "id": generation.rid,
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        self._frames = [
            writing.frame(self._chunk(sequence, {"content": "\0"}))
            for sequence in (generation.sequences if request.stream else [])
        ]

    def _chunk(
        self,
        sequence: Sequence,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        **end: Any,
    ) -> dict[str, Any]:
        end = end or {"finish_reason": None}
        choice = {"index": sequence.index, "delta": delta, "logprobs": logprobs, **end}
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def _logprobs(self, sequence: Sequence) -> dict[str, Any] | None:
        """Of the tokens since the last call."""
        if not self._wants_logprobs:
            return None
        return chat_logprobs(self._tokenizer, sequence.take_logprobs(self._keeps_stop))

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(writing.event(self._chunk(s, delta)) for s in self._generation.sequences)

    def event(self, sequence: Sequence) -> bytes:
        text = sequence.take_text()
        said = b""
        if self._wants_logprobs:
            scored = sequence.take_logprobs(self._keeps_stop)
            if text or scored:
                logprobs = chat_logprobs(self._tokenizer, scored)
                said = writing.event(self._chunk(sequence, {"content": text}, logprobs))
        elif text:
            before, after = self._frames[sequence.index]
            said = b"".join((before, dumps(text), after))
        if sequence.end is None:
            return said
        return said + writing.event(self._chunk(sequence, {}, **writing.finish(sequence)))

    def closing(self) -> bytes:
        if not self._wants_usage:
            return DONE
        usage = writing.usage(self._generation, self._n)
        return writing.event({**self._head, "choices": [], "usage": usage}) + DONE

    def whole(self) -> bytes:
        choices = [
            {
                "index": sequence.index,
                "message": {"role": "assistant", "content": sequence.text},
                "logprobs": self._logprobs(sequence),
                **writing.finish(sequence),
            }
            for sequence in self._generation.sequences
        ]
        usage = writing.usage(self._generation, self._n)
        return dumps({**self._head, "choices": choices, "usage": usage})


def _for_template(index: int, message: ChatMessage) -> dict[str, Any]:
    """As chat templates want it: the content one string, the role one that templates know."""
    values = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        values["content"] = "".join(_part_text(index, part) for part in message.content)
    elif message.content is None and message.role != "assistant":
        raise ApiError(f"messages[{index}].content must not be null", "messages")
    values.setdefault("content", "")
    if message.role == "developer":
        values["role"] = "system"
    return values


def _part_text(index: int, part: dict[str, Any]) -> str:
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        message = (
            f'messages[{index}].content: only parts {{"type": "text", "text": ...}} are supported'
        )
        raise ApiError(message, "messages")
    return part["text"]


def _render(service: Service, request: ChatRequest) -> str:
    messages = [_for_template(i, message) for i, message in enumerate(request.messages)]
    continues = bool(request.continue_final_message)
    if continues and messages[-1]["role"] != "assistant":
        message = "continue_final_message wants a last message from the assistant"
        raise ApiError(message, "continue_final_message")
    try:
        prompt = service.need_tokenizer().render_chat(
            messages,
            add_generation_prompt=not continues and request.add_generation_prompt is not False,
            continue_final_message=continues,
            **(request.chat_template_kwargs or {}),
        )
        prompt.encode()
    except UnicodeEncodeError:
        raise ApiError(
            "messages hold half a surrogate pair: no valid Unicode", "messages"
        ) from None
    except (ValueError, TypeError) as error:
        raise ApiError(f"messages: the chat template refuses them: {error}", "messages") from None
    return prompt


def chat_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        """Answers the last message of a conversation."""
        request.refuse_unsupported()
        service.check_model(request.model)
        # The template writes the special tokens that it wants.
        ids = await service.encode(_render(service, request), special_tokens=False)
        wanted = request.max_completion_tokens
        limit_name = "max_tokens" if wanted is None else "max_completion_tokens"
        wanted = request.max_tokens if wanted is None else wanted
        names = {
            "max_new_tokens": limit_name,
            "min_new_tokens": "min_tokens",
            "prompt": "messages",
        }
        if request.response_format is not None:
            names["json_schema"] = "response_format"
        params = service.sampling(request.sampling(wanted), names)
        generation = service.generate(
            request.rid or new_id("chatcmpl"),
            [(ids, params)],
            n=request.n or 1,
            stream=bool(request.stream),
            names=names,
            logprobs=LogprobsWanted(request.top_logprobs or 0 if request.logprobs else -1),
        )
        writer = ChatWriter(request, generation, service.model.name, service.need_tokenizer())
        return GenerationResponse(generation, writer, bool(request.stream))

    return router
