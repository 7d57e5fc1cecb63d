"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Response

from sglang.sampling_params import SamplingParams
from sglang.server.errors import ApiError
from sglang.server.openai.replies import Embeddings
from sglang.server.openai.schemas import EmbeddingRequest
from sglang.server.openapi import answers
from sglang.server.responses import GenerationResponse
from sglang.server.service import Service, new_id
from sglang.server.tokenizer_manager import Generation

NAMES = {"prompt": "input"}


def unit_vector(values: bytes, dimensions: int | None) -> np.ndarray:
    """float32[H] -> its first `dimensions` values, scaled to length 1."""
    vector = np.frombuffer(values, dtype=np.float32)[:dimensions]
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class EmbeddingWriter:
    """Never streamed."""

    def __init__(self, request: EmbeddingRequest, generation: Generation, model: str) -> None:
        self._request, self._generation, self._model = request, generation, model

    def opening(self) -> bytes:
        raise NotImplementedError

    event = closing = opening

    def whole(self) -> bytes:
        if any(not s.embedding for s in self._generation.sequences):
            raise ApiError("the request was aborted", status=503)
        data = [
            {"object": "embedding", "index": s.index, "embedding": self._encode(s.embedding)}
            for s in self._generation.sequences
        ]
        tokens = sum(sequence.prompt_tokens for sequence in self._generation.sequences)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = {"object": "list", "data": data, "model": self._model, "usage": usage}
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def _encode(self, values: bytes) -> Any:
        vector = unit_vector(values, self._request.dimensions)
        if self._request.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector


def embeddings_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", responses=answers(Embeddings))
    async def embeddings(request: EmbeddingRequest) -> Response:
        """Texts as vectors of length 1: what the model makes of the last token, or of all."""
        service.check_model(request.model)
        size = service.model.hidden_size
        if request.dimensions is not None and request.dimensions > size:
            message = f"dimensions must be at most {size}, which is what the model has"
            raise ApiError(message, "dimensions")
        params = SamplingParams(max_new_tokens=0)
        prompts = await service.encode_prompts(request.input)
        with service.generate(
            new_id("embd"),
            [(ids, params) for ids in prompts],
            stream=False,
            names=NAMES,
            pooling=request.pooling or "last",
        ) as generation:
            writer = EmbeddingWriter(request, generation, service.model.name)
            return GenerationResponse(generation, writer, stream=False)

    return router
