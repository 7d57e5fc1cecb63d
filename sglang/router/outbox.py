"""What the router has to tell the detokenizer: one message a step."""

from __future__ import annotations

import numpy as np

from sglang.messages import (
    Embedding,
    FinishReason,
    Logprobs,
    PromptLogprobs,
    StreamFinished,
    StreamOpened,
    TokenBatch,
    TokenLogprob,
    pack,
)
from sglang.router.request import Request


class Outbox:
    """Collects; `take` hands over. A request is announced before anything else is said of it."""

    def __init__(self) -> None:
        self._batch = TokenBatch(b"", b"")

    def take(self) -> TokenBatch | None:
        """The news since the last call, if any. What has only been announced waits for a token."""
        out = self._batch
        if not (out.handles or out.finished or out.prompt_logprobs):
            return None
        self._batch = TokenBatch(b"", b"")
        return out

    def announce(self, request: Request) -> None:
        params = request.params
        request.announced = True
        self._batch.opened.append(
            StreamOpened(
                request.handle,
                params.stop,
                params.skip_special_tokens,
                params.no_stop_trim,
                request.prompt_len,
                request.cached,
            )
        )

    def add_tokens(
        self,
        rows: np.ndarray,
        handles: np.ndarray,
        tokens: np.ndarray,
        logprobs: list[Logprobs],
    ) -> None:
        """rows, handles, tokens [k]; logprobs, of those rows that asked, are known by row."""
        out = self._batch
        start = len(out.handles) // 4
        out.handles += pack(handles)
        out.tokens += pack(tokens)
        if logprobs:
            index = {int(row): start + i for i, row in enumerate(rows)}
            for lp in logprobs:
                if lp.row in index:
                    told = TokenLogprob(lp.logprob, lp.top_ids, lp.top_logprobs)
                    out.logprobs[index[lp.row]] = told

    def add_forced(self, request: Request, tokens: list[int]) -> None:
        """Tokens that were not sampled."""
        self._batch.handles += pack([request.handle] * len(tokens))
        self._batch.tokens += pack(tokens)

    def add_prompt_logprobs(self, request: Request, scored: PromptLogprobs) -> None:
        scored.owner = request.handle
        self._batch.prompt_logprobs.append(scored)

    def add_embedding(self, request: Request, embedding: Embedding) -> None:
        embedding.owner = request.handle
        self._batch.embeddings.append(embedding)

    def finish(self, request: Request, reason: FinishReason, token: int | None = None) -> None:
        if not request.announced:
            self.announce(request)
        self._batch.finished.append(StreamFinished(request.handle, reason, token))
