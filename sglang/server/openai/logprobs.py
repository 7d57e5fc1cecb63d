"""Logprobs in the shapes of OpenAI's two endpoints and of SGLang's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang.messages import PromptLogprobs, TokenLogprob, unpack
from sglang.server.limits import LogprobsWanted
from sglang.server.tokenizer_manager import Sequence
from sglang.tokenizer import Tokenizer

Scored = list[tuple[int, "TokenLogprob | None"]]
"""Token ids, with None for the first token of a prompt."""
FLOOR = -9999.0
"""JSON has no infinity; OpenAI says this."""


def prompt_tokens(ids: list[int], scored: list[PromptLogprobs], start: int) -> Scored:
    """A prompt's tokens from position `start` on."""
    known: dict[int, TokenLogprob] = {}
    for part in scored:
        logprobs = np.frombuffer(part.logprobs, dtype=np.float32).tolist()
        top = np.frombuffer(part.top_logprobs, dtype=np.float32).reshape(len(logprobs), -1).tolist()
        top_ids = unpack(part.top_ids).reshape(len(logprobs), -1).tolist()
        for i, values in enumerate(zip(logprobs, top_ids, top, strict=True)):
            known[part.start + i] = TokenLogprob(*values)
    return [(ids[at], known.get(at)) for at in range(start, len(ids))]


def chat_logprobs(tokenizer: Tokenizer, scored: Scored) -> dict[str, Any]:
    def entry(id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(id)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, FLOOR), "bytes": list(raw)}

    content = []
    for id, said in scored:
        assert said is not None
        top = zip(said.top_ids, said.top_logprobs, strict=True)
        content.append(
            {**entry(id, said.logprob), "top_logprobs": [entry(i, value) for i, value in top]}
        )
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of one sequence, in pieces."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, skip_special_tokens: bool) -> None:
        """skip_special_tokens: the reply's text is without them."""
        self._tokenizer, self._num_top, self._offset = tokenizer, num_top, 0
        self._stream = tokenizer.stream(skip_special_tokens)

    def take(self, scored: Scored, prompt: Scored, echo: str) -> dict[str, Any]:
        """prompt: its tokens, and `echo` its text, where the reply begins with them."""
        tokens, values, tops = [], [], []
        offsets = self._places(prompt, echo)
        self._offset += len(echo)
        for id, _ in scored:
            offsets.append(self._offset)
            self._offset += len(self._stream.push([id]))
        for id, said in [*prompt, *scored]:
            tokens.append(self._name(id))
            values.append(None if said is None else max(said.logprob, FLOOR))
            tops.append(self._top(id, said))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self._num_top else None,
            "text_offset": offsets,
        }

    def _places(self, prompt: Scored, echo: str) -> list[int]:
        stream, places, at = self._tokenizer.stream(skip_special_tokens=False), [], 0
        for id, _ in prompt:
            places.append(at)
            piece = stream.push([id])
            # What the tokenizer begins a prompt with is in no text.
            at += len(piece) if echo.startswith(piece, at) else 0
        return places

    def _top(self, id: int, said: TokenLogprob | None) -> dict[str, float] | None:
        """With the chosen token, be it among the most likely ones or not."""
        if said is None:
            return None
        top = {
            self._name(i): max(v, FLOOR)
            for i, v in zip(said.top_ids, said.top_logprobs, strict=True)
        }
        return {self._name(id): max(said.logprob, FLOOR), **top}

    def _name(self, id: int) -> str:
        """As OpenAI spells a part of a character: bytes:\\xe2\\x80."""
        raw = self._tokenizer.token_bytes(id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class NativeLogprobs:
    """[logprob, token id, text or None] a token; None for the logprob of a prompt's first one."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompts: list[list[int]],
        n: int,
        wanted: list[LogprobsWanted],
    ) -> None:
        """tokenizer: None for no texts. wanted: of each prompt."""
        self._tokenizer, self._prompts, self._n, self._wanted = tokenizer, prompts, n, wanted

    def of(self, sequence: Sequence) -> dict[str, Any]:
        """All that is known by now, for `meta_info`."""
        prompt = sequence.index // self._n
        wanted = self._wanted[prompt]
        if wanted.top < 0:
            return {}
        output = list(zip(unpack(sequence.ids).tolist(), sequence.logprobs, strict=True))
        meta = {"input_token_logprobs": [], **self._lists("output", output, wanted.top)}
        if wanted.prompt_from >= 0:
            ids = self._prompts[prompt]
            scored = prompt_tokens(ids, sequence.prompt_logprobs, wanted.prompt_from)
            meta |= self._lists("input", scored, wanted.top)
        return meta

    def _lists(self, which: str, scored: Scored, num_top: int) -> dict[str, Any]:
        values = [self._entry(id, None if said is None else said.logprob) for id, said in scored]
        lists: dict[str, Any] = {f"{which}_token_logprobs": values}
        if num_top:
            lists[f"{which}_top_logprobs"] = [
                said
                and [
                    self._entry(i, v) for i, v in zip(said.top_ids, said.top_logprobs, strict=True)
                ]
                for _, said in scored
            ]
        return lists

    def _entry(self, id: int, logprob: float | None) -> list[Any]:
        text = self._tokenizer.token_text(id) if self._tokenizer is not None else None
        return [None if logprob is None else max(logprob, FLOOR), id, text]
