"""Every struct that crosses a process boundary, in the order in which it flows.

    tokenizer manager ──GenerateRequest, AbortRequest──▶ router ──StepPlan──▶ model workers
            ▲                                            │    ◀──StepResult── (rank 0)
            └──TextBatch── detokenizer ◀──TokenBatch─────┘

Integer arrays travel as the raw bytes of little-endian int32 NumPy arrays (`pack`, `unpack`); the
rest is msgpack. No pickle. A request is known by its `handle`, an int32 that the tokenizer manager
gives it: the user's request id never leaves that process.
"""

from __future__ import annotations

from array import array
from typing import Literal

import msgspec
import numpy as np

from sglang.sampling_params import SamplingParams


def pack(values) -> bytes:
    """int32[n] (or a sequence of ints) -> bytes."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values, dtype=np.int32).tobytes()
    return array("i", values).tobytes()


def unpack(data: bytes) -> np.ndarray:
    """bytes -> int32[n], read-only."""
    return np.frombuffer(data, dtype=np.int32)


Pooling = Literal["last", "mean"]
"""The final hidden state of a prompt's last token, or the mean of all its tokens'."""


class Message(msgspec.Struct, tag=True, array_like=True):
    """One frame on a socket: `encode(message)`, and `Decoder(A | B)` where it arrives."""


# --- tokenizer manager -> router -----------------------------------------------------------------


class GenerateRequest(Message):
    """One sequence to generate. `n > 1` is several of these: the radix tree shares the prompt."""

    handle: int
    input_ids: bytes
    """int32[prompt_len], at least one token."""
    params: SamplingParams
    """max_new_tokens is set, and prompt_len + max_new_tokens fits the context and the KV pool."""
    top_logprobs: int = -1
    """-1: no logprobs; k >= 0: the sampled token's logprob and the k most likely tokens'."""
    prompt_logprobs_from: int = -1
    """-1: none; p >= 0: also the logprobs of the prompt tokens from position p on."""
    pooling: Pooling | None = None
    """With max_new_tokens = 0: an embedding of the prompt is what is wanted."""


class AbortRequest(Message):
    """Stop these requests. A request that the router still knows ends with finish reason "abort",
    unless `silent`: then nothing more is said of it, as the detokenizer has ended it already, on a
    stop string."""

    handles: list[int]
    """Empty: every request."""
    silent: bool = False


class FlushCache(Message):
    """Forget every cached prefix. Answered by FlushCacheReply; refused while requests run."""


class GetStats(Message):
    """Answered by Stats."""


class StartProfile(Message):
    """Begin to note who does what when. The router tells the model workers."""


class StopProfile(Message):
    """Write it down: each process a file in the server's folder (sglang/spans.py)."""


# --- router -> tokenizer manager -----------------------------------------------------------------


class EngineReady(Message):
    """Sent once, when weights are loaded and the router accepts requests."""

    max_total_tokens: int
    """KV slots: prompt + output tokens that all running requests and the cache share."""
    max_running_requests: int
    context_len: int


class FlushCacheReply(Message):
    ok: bool


class Stats(Message):
    running: int
    queued: int
    used_tokens: int
    """KV slots held by running requests or the cache that cannot be evicted now."""
    cached_tokens: int
    """KV slots held by the radix tree."""
    max_total_tokens: int
    steps: int
    prompt_tokens: int
    """Prompt tokens of all requests admitted so far..."""
    hit_tokens: int
    """...and how many of them came from the radix cache."""
    generated_tokens: int
    preemptions: int
    evicted_tokens: int
    forced_tokens: int = 0
    """Generated tokens that a grammar left no choice of: prefilled, not decoded."""
    grammars: int = 0
    """Grammars compiled, and how long that took."""
    grammar_seconds: float = 0.0


# --- router -> model workers (every rank gets the same bytes) ------------------------------------


class RowSpec(Message):
    """A row that opens: a running request takes its seat on the device."""

    row: int
    cached_len: int
    """Tokens whose KV the radix cache already holds, in the plan's `cached_slots`."""
    seed: int
    """uint32; with the position it determines every random draw of this row."""
    temperature: float
    top_p: float
    top_k: int
    """0: whole vocabulary."""
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    suppress_until: int
    """Below this sequence length (prompt + output) the `suppress` tokens are not sampled."""
    suppress: list[int]
    top_logprobs: int
    """-1: none."""
    prompt_len: int
    history: bytes
    """int32 tokens so far, prompt first; empty unless the row has penalties (they need counts)."""
    prompt_logprobs_from: int = -1
    """-1: none; p >= 0: of the prompt's tokens from position p on (the first token has none)."""
    prompt: bytes = b""
    """int32; empty unless there are prompt logprobs."""
    pooling: Pooling | None = None


class StepPlan(Message):
    """One forward step of T tokens. The int32 payload, a second frame, holds in this order

        rows          [num_rows]            decode rows first
        q_lens        [num_prefill]         new tokens of each prefill row (num_rows - num_decode)
        sample        [num_prefill]         1 if the row's last token is its prompt's last: sample
        slots         [T]                   where each new token's KV goes
        cached_slots  [sum of cached_len]   of the rows that open, in their order
        prefill_ids   [num_prefill_tokens]  T - num_decode
        masks         [len(masked), W]      the tokens that a grammar allows: bit t % 32 of word
                                            t // 32, with W = ceil(vocabulary / 32)

    New tokens follow those that the row has: the workers know its length. A decode row's input is
    `last_token[row]`, on the device.
    """

    step: int
    opened: list[RowSpec]
    num_rows: int
    num_decode: int
    num_prefill_tokens: int
    masked: list[int] = []
    """Which of the rows that sample (an index into StepResult.tokens) a grammar constrains."""


# --- model workers -> router ---------------------------------------------------------------------


class WorkerReady(Message):
    """Weights loaded, KV pool allocated, graphs captured. Every rank says so; only rank 0 says more
    later."""

    rank: int
    num_slots: int
    """KV slots in the pool."""
    max_running_requests: int
    """Rows of device state."""
    chunked_prefill_size: int
    """New prompt tokens in a step at most."""


class Logprobs(Message):
    """Logprobs of one row's sampled token."""

    row: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(Message):
    """Logprobs of n prompt tokens, from position `start` on, with k alternatives each."""

    owner: int
    """The row, where a worker says it; the handle, from the router on."""
    start: int
    logprobs: bytes
    """float32[n]"""
    top_ids: bytes
    """int32[n * k]"""
    top_logprobs: bytes
    """float32[n * k]"""


class Embedding(Message):
    """Of a whole prompt, not normalized."""

    owner: int
    """The row, where a worker says it; the handle, from the router on."""
    values: bytes
    """float32[hidden_size]"""


class StepResult(Message):
    """tokens: int32, one for each row that samples, in plan order (decode rows, then prefill rows
    whose `sample` is 1)."""

    step: int
    tokens: bytes
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []
    embeddings: list[Embedding] = []


# --- router -> detokenizer -----------------------------------------------------------------------

FinishReason = Literal["stop", "length", "abort"]


class StreamOpened(Message):
    """What the detokenizer must know of a request; precedes its first token."""

    handle: int
    stop: list[str]
    skip_special_tokens: bool
    no_stop_trim: bool
    prompt_len: int
    cached_len: int


class StreamFinished(Message):
    """The last word on a request, by the router."""

    handle: int
    reason: FinishReason
    matched_token: int | None = None
    """The stop or end-of-sequence token, for reason "stop". It is the last of the request's tokens,
    and not shown as text unless `no_stop_trim`."""


class TokenLogprob(Message):
    """One generated token's logprob with its most likely alternatives."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class TokenBatch(Message):
    """What one step produced: `tokens[i]` is a new token of request `handles[i]`."""

    handles: bytes
    tokens: bytes
    opened: list[StreamOpened] = []
    finished: list[StreamFinished] = []
    logprobs: dict[int, TokenLogprob] = {}
    """By index into `tokens`, for the requests that asked."""
    prompt_logprobs: list[PromptLogprobs] = []
    embeddings: list[Embedding] = []


# --- detokenizer -> tokenizer manager ------------------------------------------------------------


class StreamEnd(Message):
    """How a request ended, and what it used."""

    reason: FinishReason
    matched: int | str | None
    """The stop token id or the stop string that ended it."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def finish_reason(self) -> dict[str, int | str | None]:
        """In SGLang's shape."""
        match self.reason:
            case "stop":
                return {"type": "stop", "matched": self.matched}
            case "length":
                return {"type": "length", "length": self.completion_tokens}
            case "abort":
                return {"type": "abort", "message": "aborted"}


class StreamDelta(Message):
    """News of one request: the text never holds half a character nor the beginning of what may turn
    out to be a stop string; joined, the deltas are the whole text."""

    handle: int
    text: str
    token_ids: bytes
    """int32 tokens since the last delta (text may lag behind them)."""
    end: StreamEnd | None = None
    logprobs: list[TokenLogprob] = []
    prompt_tokens: int = 0
    """Set, with cached_tokens, in a request's first delta."""
    cached_tokens: int = 0
    prompt_logprobs: list[PromptLogprobs] = []
    embedding: bytes = b""
    """float32[hidden_size] in the only delta of a request that wants one."""


class TextBatch(Message):
    """All the deltas of one step."""

    deltas: list[StreamDelta]


ToRouter = GenerateRequest | AbortRequest | FlushCache | GetStats | StartProfile | StopProfile
ToTokenizerManager = EngineReady | FlushCacheReply | Stats | TextBatch
ToWorker = StepPlan | StartProfile | StopProfile
FromWorker = WorkerReady | StepResult

encode = msgspec.msgpack.Encoder().encode
Decoder = msgspec.msgpack.Decoder
