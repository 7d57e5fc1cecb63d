"""The parts of replies that completions and chat have in common."""

from __future__ import annotations

from typing import Any

import orjson

from sglang.server.tokenizer_manager import Generation, Sequence

dumps = orjson.dumps


def usage(generation: Generation, n: int) -> dict[str, Any]:
    """A prompt counts once, however many samples it has."""
    prompts = generation.sequences[::n]
    prompt = sum(s.prompt_tokens for s in prompts)
    completion = sum(s.end.completion_tokens for s in generation.sequences if s.end is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in prompts)},
    }


def finish(sequence: Sequence) -> dict[str, Any]:
    """`matched_stop`, as SGLang has it: the stop string or token that ended the sequence."""
    assert sequence.end is not None
    return {"finish_reason": sequence.end.reason, "matched_stop": sequence.end.matched}


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + dumps(body) + b"\n\n"


def frame(body: dict[str, Any]) -> tuple[bytes, bytes]:
    """Splits the event of `body` around the place of its text, the last string that is "\\0"."""
    before, _, after = event(body).rpartition(dumps("\0"))
    return before, after
