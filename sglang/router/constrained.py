"""The rows that a grammar constrains."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.messages import FinishReason
from sglang.router.request import Request, Rows


@dataclass
class Said:
    """What follows from a constrained row's new token."""

    forced: list[int]
    """Tokens that its grammar leaves no choice of. The row has them already."""
    end: FinishReason | None
    stop_token: int | None
    """The last forced one, if the request stops at it."""


class ConstrainedRows:
    """A grammar takes in each new token of its row, which is not planned before that: it is then
    that its next mask is known. What that costs need not be paid at the commit of the token."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._tokens: dict[Request, int] = {}  # not taken in yet; the longest waiting first

    def add_token(self, request: Request, token: int) -> None:
        self._tokens[request] = token
        self._rows.unread[request.row] = True

    def next(self) -> Request | None:
        """Whose token `take_in` should take in next."""
        return next(iter(self._tokens), None)

    def forget(self, request: Request) -> None:
        self._tokens.pop(request, None)

    def take_in(self, request: Request) -> Said:
        rows, row, grammar = self._rows, request.row, request.grammar
        assert grammar is not None
        token = self._tokens.pop(request)
        rows.unread[row] = False
        known = int(rows.known[row])
        # Forced tokens have no logprobs, and penalties would not count them.
        jumps = request.top_logprobs < 0 and not request.has_penalties
        forced = grammar.accept(token, int(rows.limit[row]) - known if jumps else 0)
        stop = next((token for token in forced if token in request.stop_tokens), None)
        if stop is not None:
            forced = forced[: forced.index(stop) + 1]
        if forced:
            rows.tokens[row, known : known + len(forced)] = forced
            rows.known[row] = rows.prefill_len[row] = known + len(forced)
        end: FinishReason | None = None
        if grammar.failed and stop is None:
            end = "abort"
        elif grammar.is_complete or stop is not None:
            end = "stop"
        elif rows.known[row] >= rows.limit[row]:
            end = "length"
        return Said(forced, end, stop)
