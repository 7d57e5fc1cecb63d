"""What a request may ask of this server."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
import numpy as np

from sglang.messages import GenerateRequest, Pooling
from sglang.sampling_params import DEFAULT_NEW_TOKENS, SamplingParams


@dataclass(frozen=True)
class LogprobsWanted:
    """As GenerateRequest has it."""

    top: int = -1
    prompt_from: int = -1


NO_LOGPROBS = LogprobsWanted()


class ContextOverflow(ValueError):
    """A prompt and its output do not fit."""


@dataclass(frozen=True)
class Limits:
    """Errors are ValueErrors whose message starts with the field's name: "prompt",
    "max_new_tokens" or another field of SamplingParams."""

    vocab_size: int
    context_len: int
    max_total_tokens: int
    """KV slots."""

    def request(
        self,
        handle: int,
        ids: list[int],
        params: SamplingParams,
        logprobs: LogprobsWanted = NO_LOGPROBS,
        pooling: Pooling | None = None,
    ) -> GenerateRequest:
        """The message to the router, with `max_new_tokens` set, if it can ever be served."""
        params.verify(self.vocab_size)
        packed = self._pack_ids(ids)
        room = min(self.context_len, self.max_total_tokens) - len(ids)
        if len(ids) > self.context_len or (room <= 0 and params.max_new_tokens != 0):
            raise ContextOverflow(
                f"prompt has {len(ids)} tokens and leaves no room for output: {self._limit()}"
            )
        if not isinstance(params.max_new_tokens, int):
            if params.min_new_tokens > room:
                raise ValueError(
                    f"min_new_tokens must be <= {room}, which is what the prompt of {len(ids)} "
                    f"tokens leaves, got {params.min_new_tokens}"
                )
            most = room
            if params.max_new_tokens is msgspec.UNSET:
                most = min(max(DEFAULT_NEW_TOKENS, params.min_new_tokens), room)
            params = msgspec.structs.replace(params, max_new_tokens=most)
        elif params.max_new_tokens > room:
            raise ContextOverflow(
                f"max_new_tokens is {params.max_new_tokens}, and the prompt has {len(ids)} tokens: "
                f"{self._limit()}"
            )
        return GenerateRequest(handle, packed, params, logprobs.top, logprobs.prompt_from, pooling)

    def _pack_ids(self, ids: list[int]) -> bytes:
        if not ids:
            raise ValueError("prompt must not be empty")
        try:
            packed = struct.pack(f"{len(ids)}i", *ids)  # twice as fast as `pack` for many
        except (TypeError, struct.error):  # not all are integers, or of 32 bits
            raise ValueError(
                f"prompt token ids must be integers in [0, {self.vocab_size})"
            ) from None
        largest = ids[np.frombuffer(packed, dtype=np.uint32).argmax()]  # one below 0 counts as such
        if not 0 <= largest < self.vocab_size:
            raise ValueError(f"prompt token ids must be in [0, {self.vocab_size}), got {largest}")
        return packed

    def _limit(self) -> str:
        """With the words that clients look for, to shorten a conversation."""
        if self.context_len <= self.max_total_tokens:
            return f"the model's maximum context length is {self.context_len} tokens"
        return f"the KV pool (--max-total-tokens) holds {self.max_total_tokens} tokens"
