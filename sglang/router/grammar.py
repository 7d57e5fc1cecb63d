"""Constrained decoding: which tokens a regex, a JSON schema or an EBNF grammar allows next.

On llguidance, which walks the vocabulary's trie through a lexer and an Earley parser: compiling is
lazy and a mask takes some 25 µs. Masks are made here, in the router, and travel in the plan.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang.json_schema import without_other_formats
from sglang.messages import GenerateRequest
from sglang.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from sglang.model_config import ModelConfig
    from sglang.server_args import ServerArgs

logger = logging.getLogger(__name__)

CACHED_GRAMMARS = 256
_MOST_CHARS = 1 << 17
"""Of a grammar: to check so many takes half a second, which all streams wait."""


class Grammar(ABC):
    """What one request may say, and how far it has come."""

    is_complete = False
    """Nothing may follow."""
    failed = False
    """It cannot go on: the grammar is too complex."""

    @abstractmethod
    def mask(self) -> np.ndarray:
        """int32[ceil(V / 32)]: bit t % 32 of word t // 32 is set where token t may be next. Costs
        nothing: `accept` has made it."""

    @abstractmethod
    def accept(self, token: int, room: int) -> list[int]:
        """Goes on by a token, and by those, `room` at most, that alone may follow it: returns
        these."""


class _Matcher(Grammar):
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._mask = matcher.compute_bitmask()

    def mask(self) -> np.ndarray:
        return np.frombuffer(self._mask, dtype=np.int32)

    def accept(self, token: int, room: int) -> list[int]:
        matcher = self._matcher
        forced: list[int] = []
        if matcher.consume_token(token) and room > 0 and not matcher.is_stopped():
            forced = matcher.compute_ff_tokens()[:room]
            if forced:
                matcher.consume_tokens(forced)
        self.is_complete = matcher.is_stopped()
        if matcher.is_error():
            self.failed = True
            cause = " ".join(matcher.get_error().split())[:300]
            logger.warning("a request ends before its time: its grammar cannot go on: %s", cause)
        if not self.is_complete:
            self._mask = matcher.compute_bitmask()
        return forced


def grammar_kind(params: SamplingParams) -> str | None:
    """The field of `params` that has a grammar. Raises ValueError if several have."""
    given = [kind for kind in ("regex", "json_schema", "ebnf") if getattr(params, kind) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]} cannot be combined with {given[0]}")
    return given[0] if given else None


def _compilable(kind: str, text: str) -> str:
    """llguidance's own form of a grammar."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match kind:
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "json_schema":
            # One spelling of white space: models that may write any write pages of it.
            overrides: Any = {
                "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "
            }  # fmt: skip
            schema = without_other_formats(json.loads(text))
            return LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
        case _:
            return LLMatcher.grammar_from_lark(any_to_lark(text))


def check_grammar(params: SamplingParams, backend: str) -> None:
    """Raises ValueError with a message that starts with the field's name. backend: as in
    --grammar-backend."""
    kind = grammar_kind(params)
    if kind is None:
        return
    if backend == "none":
        raise ValueError(f"{kind} is not served here: --grammar-backend is none")
    if params.min_new_tokens:
        raise ValueError(f"min_new_tokens cannot be combined with {kind}: a grammar has its end")
    if len(getattr(params, kind)) > _MOST_CHARS:
        raise ValueError(f"{kind} has more than {_MOST_CHARS} characters")
    if (error := _error_in(kind, getattr(params, kind))) is not None:
        raise ValueError(f"{kind} is not one that this server can follow: {error}")


@lru_cache(CACHED_GRAMMARS)
def _error_in(kind: str, text: str) -> str | None:
    from llguidance import LLMatcher

    try:
        error = LLMatcher.validate_grammar(_compilable(kind, text))
    except Exception as bad:  # ValueErrors of several kinds, and lark's own
        error = str(bad)
    if not error or error.startswith("WARNING"):
        return None
    return " ".join(error.split())[:300]


def load_tokenizer(args: ServerArgs, model: ModelConfig) -> LLTokenizer:
    """The model's vocabulary, as llguidance wants it."""
    from llguidance import LLTokenizer

    from sglang.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model, args)
    eos = list(model.eos_token_ids) or None
    return LLTokenizer(tokenizer.to_json(), n_vocab=model.vocab_size, eos_token=eos)


class Grammars:
    """Compiles the grammars of arriving requests, beside the loop, and remembers them."""

    def __init__(self, load_tokenizer: Callable[[], LLTokenizer]) -> None:
        self._load_tokenizer = cache(load_tokenizer)
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "grammar")
        self._pending: list[tuple[GenerateRequest, Future[Grammar]]] = []
        self.num_compiled = 0
        self.seconds = 0.0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def prepare(self) -> None:
        """Loads the vocabulary, which takes a second, before a request waits for it."""
        self._pool.submit(self._load_tokenizer)

    def submit(self, request: GenerateRequest) -> None:
        self._pending.append((request, self._pool.submit(self._make, request.params)))

    def done(self) -> Iterator[tuple[GenerateRequest, Grammar | None]]:
        """The requests whose grammars are there now, in the order of their arrival. None: there is
        none, which is in the log."""
        while self._pending and self._pending[0][1].done():
            request, grammar = self._pending.pop(0)
            if (error := grammar.exception()) is not None:
                logger.error("a grammar could not be made: %s", error)
            yield request, None if error is not None else grammar.result()

    def drop(self, handles: list[int]) -> list[GenerateRequest]:
        """Forgets pending requests (no handles: all) and returns them."""
        dropped = [r for r, _ in self._pending if not handles or r.handle in handles]
        self._pending = [p for p in self._pending if p[0] not in dropped]
        return dropped

    def _make(self, params: SamplingParams) -> Grammar:
        """On the pool's thread."""
        kind = grammar_kind(params)
        assert kind is not None
        key = (kind, getattr(params, kind))
        if key not in self._compiled:
            from llguidance import LLMatcher

            tokenizer = self._load_tokenizer()
            start = time.perf_counter()
            matcher = LLMatcher(tokenizer, _compilable(*key))
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            matcher.compute_bitmask()  # the lexer's states, which copies share, are made when used
            self.seconds += time.perf_counter() - start
            self.num_compiled += 1
            self._compiled[key] = matcher
            if len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return _Matcher(self._compiled[key].deep_copy())
