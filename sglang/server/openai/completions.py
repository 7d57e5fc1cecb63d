"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Response

from sglang.server.openai import writing
from sglang.server.openai.schemas import CompletionRequest
from sglang.server.openai.writing import dumps
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence

NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
DEFAULT_MAX_TOKENS = 16


class CompletionWriter:
    def __init__(
        self, request: CompletionRequest, generation: Generation, model: str, echoes: list[str]
    ) -> None:
        """echoes: what precedes the text of each sequence."""
        self._generation, self._n, self._echoes = generation, request.n or 1, echoes
        self._wants_usage = request.include_usage
        self._head = {
            "id": generation.rid,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._frames = [
            writing.frame(self._chunk(self._choice(sequence, "\0")))
            for sequence in (generation.sequences if request.stream else [])
        ]

    @staticmethod
    def _choice(sequence: Sequence, text: str) -> dict[str, Any]:
        end = writing.finish(sequence) if sequence.end else {"finish_reason": None}
        return {"index": sequence.index, "text": text, "logprobs": None, **end}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def opening(self) -> bytes:
        sequences = self._generation.sequences
        return b"".join(
            writing.event(self._chunk(self._choice(sequence, echo)))
            for sequence, echo in zip(sequences, self._echoes, strict=True)
            if echo
        )

    def event(self, sequence: Sequence) -> bytes:
        text = sequence.take_text()
        if sequence.end is None:
            if not text:
                return b""
            before, after = self._frames[sequence.index]
            return b"".join((before, dumps(text), after))
        return writing.event(self._chunk(self._choice(sequence, text)))

    def closing(self) -> bytes:
        if not self._wants_usage:
            return DONE
        usage = writing.usage(self._generation, self._n)
        return writing.event({**self._head, "choices": [], "usage": usage}) + DONE

    def whole(self) -> bytes:
        sequences = self._generation.sequences
        choices = [
            self._choice(sequence, echo + sequence.text)
            for sequence, echo in zip(sequences, self._echoes, strict=True)
        ]
        usage = writing.usage(self._generation, self._n)
        return dumps({**self._head, "choices": choices, "usage": usage})


def completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        """Continues one prompt or several."""
        request.refuse_unsupported()
        service.check_model(request.model)
        tokenizer = service.need_tokenizer()
        n = request.n or 1
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        params = service.sampling(request.sampling(max_tokens), NAMES)
        prompts = await service.encode_prompts(request.prompt)
        generation = service.generate(
            request.rid or new_id("cmpl"),
            [(ids, params) for ids in prompts],
            n=n,
            stream=bool(request.stream),
            names=NAMES,
        )
        echoes = [""] * len(generation.sequences)
        if request.echo:
            echoes = [
                prompt if isinstance(prompt, str) else tokenizer.decode(prompt, False)
                for prompt in request.prompt
                for _ in range(n)
            ]
        writer = CompletionWriter(request, generation, service.model.name, echoes)
        return GenerationResponse(generation, writer, bool(request.stream))

    return router
