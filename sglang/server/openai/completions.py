"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Response

from sglang.server.limits import LogprobsWanted
from sglang.server.openai import writing
from sglang.server.openai.logprobs import CompletionLogprobs, prompt_tokens
from sglang.server.openai.replies import Completion, CompletionChunk
from sglang.server.openai.schemas import CompletionRequest
from sglang.server.openai.writing import dumps
from sglang.server.openapi import generates
from sglang.server.responses import DONE, GenerationResponse
from sglang.server.service import Service, new_id
from sglang.server.tokenizer_manager import Generation, Sequence
from sglang.tokenizer import Tokenizer

NAMES = {
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"
}  # fmt: skip
DEFAULT_MAX_TOKENS = 16


class CompletionWriter:
    def __init__(
        self,
        request: CompletionRequest,
        generation: Generation,
        model: str,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
    ) -> None:
        """prompts: their token ids."""
        self._request, self._generation, self._tokenizer = request, generation, tokenizer
        self._prompts, self._n = prompts, request.num_samples
        self._wants_usage = request.include_usage
        self._head = {
            "id": generation.rid,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._logprobs: list[CompletionLogprobs] = []
        if request.logprobs is not None:
            skips = request.skip_special_tokens is not False
            self._logprobs = [
                CompletionLogprobs(tokenizer, request.logprobs, skips) for _ in generation.sequences
            ]
        self._unsaid = set(range(len(generation.sequences))) if request.echo else set()
        """Sequences whose prompt is still to be echoed."""
        self._frames = [
            writing.frame(self._chunk(self._choice(sequence, "\0", None)))
            for sequence in (generation.sequences if request.stream else [])
        ]

    @staticmethod
    def _choice(sequence: Sequence, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        end = writing.finish(sequence) if sequence.end else {"finish_reason": None}
        return {"index": sequence.index, "text": text, "logprobs": logprobs, **end}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._wants_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def _news(self, sequence: Sequence) -> dict[str, Any]:
        """A choice with what the sequence has said since the last call."""
        echoes = sequence.index in self._unsaid
        self._unsaid.discard(sequence.index)
        echo = self._echo(sequence) if echoes else ""
        text = echo + sequence.take_text()
        if not self._logprobs:
            return self._choice(sequence, text, None)
        scored = sequence.take_logprobs(bool(self._request.no_stop_trim))
        ids = self._prompts[sequence.index // self._n]
        prompt = prompt_tokens(ids, sequence.prompt_logprobs, 0) if echoes else []
        logprobs = self._logprobs[sequence.index].take(scored, prompt, echo)
        return self._choice(sequence, text, logprobs)

    def _echo(self, sequence: Sequence) -> str:
        prompt = self._request.prompt[sequence.index // self._n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, False)

    def opening(self) -> bytes:
        if self._logprobs:  # those of the prompt come with its first token
            return b""
        sequences = [self._generation.sequences[i] for i in sorted(self._unsaid)]
        return b"".join(writing.event(self._chunk(self._news(s))) for s in sequences)

    def event(self, sequence: Sequence) -> bytes:
        if sequence.end is None and not self._logprobs:
            text = sequence.take_text()
            if not text:
                return b""
            before, after = self._frames[sequence.index]
            return b"".join((before, dumps(text), after))
        return writing.event(self._chunk(self._news(sequence)))

    def closing(self) -> bytes:
        if not self._wants_usage:
            return DONE
        usage = writing.usage(self._generation, self._n)
        return writing.event({**self._head, "choices": [], "usage": usage}) + DONE

    def whole(self) -> bytes:
        choices = [self._news(sequence) for sequence in self._best()]
        for index, choice in enumerate(choices):
            choice["index"] = index
        usage = writing.usage(self._generation, self._n)
        return dumps({**self._head, "choices": choices, "usage": usage})

    def _best(self) -> list[Sequence]:
        """Of each prompt's samples the n with the highest mean logprob (`best_of`)."""
        sequences, n, keep = self._generation.sequences, self._n, self._request.n or 1
        if keep == n:
            return sequences
        return [
            sequence
            for start in range(0, len(sequences), n)
            for sequence in sorted(sequences[start : start + n], key=_mean_logprob)[-keep:][::-1]
        ]


def _mean_logprob(sequence: Sequence) -> float:
    logprobs = [said.logprob for said in sequence.logprobs]
    return sum(logprobs) / max(len(logprobs), 1)


def completions_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", responses=generates(Completion, CompletionChunk))
    async def completions(request: CompletionRequest) -> Response:
        """Continues one prompt or several."""
        request.refuse_unsupported()
        service.check_model(request.model)
        tokenizer = service.need_tokenizer()
        max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        formatted = {} if request.response_format is None else {"json_schema": "response_format"}
        params = service.sampling(request.sampling(max_tokens), {**NAMES, **formatted})
        prompts = await service.encode_prompts(request.prompt)
        with service.generate(
            request.rid or new_id("cmpl"),
            [(ids, params) for ids in prompts],
            n=request.num_samples,
            stream=bool(request.stream),
            names=NAMES,
            logprobs=_logprobs_wanted(request),
        ) as generation:
            writer = CompletionWriter(request, generation, service.model.name, tokenizer, prompts)
            return GenerationResponse(generation, writer, bool(request.stream))

    return router


def _logprobs_wanted(request: CompletionRequest) -> LogprobsWanted:
    if request.logprobs is None:
        return LogprobsWanted(top=0 if request.num_samples > (request.n or 1) else -1)
    return LogprobsWanted(request.logprobs, 0 if request.echo else -1)
