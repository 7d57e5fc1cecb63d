"""A request, and its seat while it runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from sglang.messages import GenerateRequest, Pooling, RowSpec, pack, unpack
from sglang.router.grammar import Grammar
from sglang.router.radix_cache import Node

NO_TOKEN = -1


class Request:
    """One sequence to generate, from arrival to its last token.

    While it waits it holds its tokens; while it runs they are in its row of `Rows`.
    """

    def __init__(
        self,
        message: GenerateRequest,
        eos: tuple[int, ...],
        seed: int,
        grammar: Grammar | None = None,
    ) -> None:
        params = message.params
        self.handle = message.handle
        self.params = params
        self.tokens = unpack(message.input_ids)
        self.prompt_len = len(self.tokens)
        assert isinstance(params.max_new_tokens, int)
        self.limit = self.prompt_len + params.max_new_tokens
        """Tokens, prompt and output, at which it has its full length."""
        self.stop_tokens = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos)})
        self.seed = seed
        self.top_logprobs = message.top_logprobs
        self.prompt_logprobs_from = message.prompt_logprobs_from
        """Of the prompt tokens from here on the logprobs are still wanted; -1: of none."""
        self.pooling: Pooling | None = message.pooling
        self.grammar = grammar
        self.arrival = 0
        """Requests arrive in this order; a preempted one keeps its place."""
        self.overdue_at = 0
        """When so many requests have been admitted, no policy passes it over any more."""
        self.announced = False
        """The detokenizer knows of it."""
        self.row = -1
        self.node: Node | None = None
        """The tree node whose path it has locked, while it runs."""
        self.cached = 0
        """Tokens of its beginning that the tree held when it was admitted, or got from it since."""
        self.matched: tuple[int, int] = (-1, 0)
        """(tree version, match length): so that waiting costs no walks of an unchanged tree."""

    @property
    def scores_prompt(self) -> bool:
        """Logprobs of some of its prompt's tokens are still wanted."""
        return 0 <= self.prompt_logprobs_from < self.prompt_len

    @property
    def reads_prompt(self) -> bool:
        """More of its prompt than the last token's result is wanted."""
        return self.scores_prompt or self.pooling == "mean"

    def reusable(self) -> np.ndarray:
        """The tokens that need not be computed if their KV is cached: those whose logits or hidden
        states nobody wants."""
        if self.pooling == "mean":
            return self.tokens[:0]
        if self.scores_prompt:
            return self.tokens[: max(self.prompt_logprobs_from - 1, 0)]
        return self.tokens[:-1]

    @property
    def has_penalties(self) -> bool:
        params = self.params
        penalties = params.frequency_penalty, params.presence_penalty, params.repetition_penalty
        return penalties != (0.0, 0.0, 1.0)

    def row_spec(self) -> RowSpec:
        """What the workers must know of it as it takes its row."""
        params = self.params
        suppress_until = self.prompt_len + params.min_new_tokens if params.min_new_tokens else 0
        return RowSpec(
            row=self.row,
            cached_len=self.cached,
            seed=self.seed,
            temperature=_workable(params.temperature),
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            min_p=params.min_p,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            repetition_penalty=max(params.repetition_penalty, 1e-6),  # one over it is float32
            logit_bias=params.logit_bias,
            suppress_until=suppress_until,
            suppress=self.stop_tokens if suppress_until else [],
            top_logprobs=self.top_logprobs,
            prompt_len=self.prompt_len,
            history=pack(self.tokens) if self.has_penalties else b"",
            prompt_logprobs_from=self.prompt_logprobs_from if self.scores_prompt else -1,
            prompt=pack(self.tokens[: self.prompt_len]) if self.scores_prompt else b"",
            pooling=self.pooling,
        )

    def __repr__(self) -> str:
        return f"Request({self.handle}, prompt {self.prompt_len}, limit {self.limit})"


def _workable(temperature: float) -> float:
    """Logits over it are float32: next to 0 is greedy, and large ones are all alike."""
    return 0.0 if temperature < 1e-6 else min(temperature, 1e6)


class Rows:
    """The seats of running requests, one column a fact, so that a decode step costs NumPy calls and
    no Python a request. The worker's device state is indexed by the same row.

        tokens  | prompt .......... | output ... | known on the device only |
                0                prompt_len     known                 planned + 1
        KV      | written, or will be by flying steps ....... |
                0          prefill_len                     planned

    `planned < prefill_len`: prefill, a chunk at a time. After that every step adds one token; its
    input is the last sampled token, which may not be known here yet.
    """

    def __init__(self, num_rows: int, max_len: int) -> None:
        def column(dtype: DTypeLike = np.int32) -> np.ndarray:
            return np.zeros(num_rows, dtype=dtype)

        self.num_rows = num_rows
        self.requests: list[Request | None] = [None] * num_rows
        self.tokens = np.empty((num_rows, max_len), dtype=np.int32)
        self.slots = np.empty((num_rows, max_len), dtype=np.int32)  # append-only while open
        self.known = column()
        """Tokens committed."""
        self.prefill_len = column()
        """Tokens known when the row opened, or when a grammar last forced some."""
        self.planned = column()
        """Tokens whose KV is written once the steps sent so far have ended."""
        self.shared = column()
        """Of these, at the beginning, slots that the tree held when the row opened."""
        self.admission = column(np.int64)
        """Running requests were admitted in this order; the last one is preempted first."""
        self.flying = column()
        """Steps sent and not committed that hold this row."""
        self.limit = column()
        self.handle = column()
        self.open = column(bool)
        self.leaving = column(bool)
        """In no further plan; settled when the last flying step is committed."""
        self.ended = column(bool)
        """Leaving for good: results that still come are dropped. (Preempted: they count.)"""
        self.constrained = column(bool)
        """By a grammar: not planned while flying, as its mask needs the last token..."""
        self.unread = column(bool)
        """...nor before the grammar has taken that in."""
        self.stop_tokens = np.full((num_rows, 4), NO_TOKEN, dtype=np.int32)
        self._free = list(range(num_rows))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def running(self) -> np.ndarray:
        """bool[R]: rows that may be planned."""
        return self.open & ~self.leaving

    def request(self, row: int) -> Request:
        """Who sits there."""
        request = self.requests[row]
        assert request is not None
        return request

    def open_row(self, request: Request, cached_slots: np.ndarray) -> int:
        row = request.row = self._free.pop()
        n = len(request.tokens)
        self.requests[row] = request
        self.tokens[row, :n] = request.tokens
        self.slots[row, : len(cached_slots)] = cached_slots
        self.known[row] = self.prefill_len[row] = n
        self.planned[row] = self.shared[row] = len(cached_slots)
        self.flying[row] = 0
        self.limit[row] = request.limit
        self.handle[row] = request.handle
        self.open[row], self.leaving[row], self.ended[row] = True, False, False
        self.constrained[row], self.unread[row] = request.grammar is not None, False
        missing = len(request.stop_tokens) - self.stop_tokens.shape[1]
        if missing > 0:
            wider = np.full((self.num_rows, missing), NO_TOKEN, dtype=np.int32)
            self.stop_tokens = np.concatenate([self.stop_tokens, wider], axis=1)
        self.stop_tokens[row] = NO_TOKEN
        self.stop_tokens[row, : len(request.stop_tokens)] = request.stop_tokens
        return row

    def masks(self, sampled: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
        """(indices of the constrained ones among these rows, what their grammars allow)."""
        at = self.constrained[sampled].nonzero()[0].tolist()
        return at, [self.request(sampled[i]).grammar.mask() for i in at]  # type: ignore

    def close_row(self, row: int) -> None:
        request = self.request(row)
        assert self.open[row] and self.flying[row] == 0
        request.tokens = self.tokens[row, : self.known[row]].copy()
        request.row = -1
        self.requests[row] = None
        self.open[row] = self.leaving[row] = False
        self._free.append(row)
