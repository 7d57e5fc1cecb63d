"""What the log says of requests: their ids; with --log-requests what they ask and get."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

import msgspec

from sglang.messages import unpack

if TYPE_CHECKING:
    from sglang.sampling_params import SamplingParams
    from sglang.server.tokenizer_manager import Generation
    from sglang.tokenizer import Tokenizer

logger = logging.getLogger("sglang.requests")
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the HTTP request that is being handled, as its X-Request-Id header has it."""

_SHORT = 500
"""Tokens of a text, at level 2."""


def add_request_id(record: logging.LogRecord) -> bool:
    """A logging filter: `%(request)s` in a format is the id, after a space, if there is one."""
    id = request_id.get()
    record.request = f" {id}" if id else ""
    return True


class RequestLog:
    """Two lines a request. `level` is --log-requests-level."""

    def __init__(self, level: int, tokenizer: Tokenizer | None) -> None:
        self._level, self._tokenizer = level, tokenizer

    def received(self, rid: str, sequences: list[tuple[list[int], SamplingParams]]) -> None:
        said = [f"prompt_tokens={[len(ids) for ids, _ in sequences]}"]
        if self._level >= 1:
            params = msgspec.to_builtins(sequences[0][1])  # those that are not the default
            said.append(f"sampling_params={params}")
        said += self._texts("prompts", [ids for ids, _ in sequences])
        logger.info("received %s: %s", rid, ", ".join(said))

    def ended(self, generation: Generation) -> None:
        sequences = generation.sequences
        left = "timeout" if generation.timed_out else "client left"
        said = [
            f"finish_reason={[s.end.reason if s.end else left for s in sequences]}",
            f"completion_tokens={[len(s.ids) // 4 for s in sequences]}",
            f"cached_tokens={[s.cached_tokens for s in sequences]}",
            f"seconds={time.monotonic() - generation.start:.3f}",
        ]
        first = min((s.first_at for s in sequences if s.first_at), default=None)
        if first is not None:
            said.append(f"first_token_seconds={first - generation.start:.3f}")
        said += self._texts("texts", [unpack(s.ids).tolist() for s in sequences])
        logger.info("ended %s: %s", generation.rid, ", ".join(said))

    def _texts(self, name: str, all_ids: list[list[int]]) -> list[str]:
        if self._level < 2:
            return []
        limit = _SHORT if self._level == 2 else None
        return [f"{name}={[self._text(ids[:limit], len(ids)) for ids in all_ids]}"]

    def _text(self, ids: list[int], length: int) -> str | list[int]:
        if self._tokenizer is None:
            return ids
        return self._tokenizer.decode(ids, False) + ("..." if len(ids) < length else "")
