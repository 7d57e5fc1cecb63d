"""The detokenizer: token ids in, text that will never change out, one message a step each way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import zmq

from sglang.addresses import Addresses, connect, connect_outbox
from sglang.messages import (
    AbortRequest,
    Decoder,
    PromptLogprobs,
    StreamDelta,
    StreamEnd,
    StreamFinished,
    StreamOpened,
    TextBatch,
    TokenBatch,
    TokenLogprob,
    encode,
    pack,
    unpack,
)
from sglang.processes import start_heartbeat

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.server_args import ServerArgs
    from sglang.tokenizer import Tokenizer


class StopFinder:
    """Finds stop strings in a text that arrives in pieces of any size.

    The match that is complete first wins, the longest of several that end together; so the result
    does not depend on where the pieces are cut.
    """

    def __init__(self, stops: list[str], keep: bool = False) -> None:
        """keep: the matched string stays in the text."""
        self._stops = sorted(stops, key=len, reverse=True)
        self._keep = keep
        self._held = ""
        """A suffix of the text so far, the longest that a stop string starts with."""

    def push(self, piece: str) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string found or None). After a match, no more."""
        text = self._held + piece
        first_end, found = len(text) + 1, None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and at + len(stop) < first_end:
                first_end, found = at + len(stop), stop
        if found is not None:
            self._held = ""
            return text[: first_end if self._keep else first_end - len(found)], found
        shown = min((self.first_prefix(text, stop) for stop in self._stops), default=len(text))
        self._held = text[shown:]
        return text[:shown], None

    def finish(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def first_prefix(text: str, stop: str) -> int:
        """Where the longest suffix of `text` begins that `stop` starts with; else len(text)."""
        at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
        while at >= 0:
            if stop.startswith(text[at:]):
                return at
            at = text.find(stop[0], at + 1)
        return len(text)


class _Stream:
    """One request, as the detokenizer knows it."""

    __slots__ = (
        "decoder", "embedding", "ids", "logprobs", "num_tokens", "opened", "prompt_logprobs",
        "stops", "told",
    )  # fmt: skip

    def __init__(self, opened: StreamOpened, tokenizer: Tokenizer | None, lazy: bool) -> None:
        self.opened = opened
        self.num_tokens = 0
        self.logprobs: list[TokenLogprob] = []
        """Of tokens that no delta has told yet."""
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.embedding = b""
        self.told = False
        """The tokenizer manager has had a first delta."""
        self.stops = StopFinder(opened.stop, opened.no_stop_trim) if opened.stop else None
        self.ids: list[int] | None = [] if lazy and self.stops is None else None
        """Lazy: the tokens so far; their text is wanted at the end only."""
        self.decoder = None
        if tokenizer is not None and self.ids is None:
            self.decoder = tokenizer.stream(opened.skip_special_tokens)

    def read(self, tokens: list[int], ends: bool) -> tuple[str, str | None, int]:
        """(text that may be shown now, the stop string found or None, the tokens it took to find
        it). Where there are stop strings a token is read at a time: how many come together depends
        on how busy this process is, and nothing in a reply may."""
        if self.decoder is None:
            return "", None, len(tokens)
        if self.stops is None:
            text = self.decoder.push(tokens)
            return text + self.decoder.finish() if ends else text, None, len(tokens)
        text, matched = "", None
        for count, token in enumerate(tokens, 1):
            piece, matched = self.stops.push(self.decoder.push([token]))
            text += piece
            if matched is not None:
                return text, matched, count
        if ends:
            piece, matched = self.stops.push(self.decoder.finish())
            text += piece if matched is not None else piece + self.stops.finish()
        return text, matched, len(tokens)


class Detokenizer:
    """Holds the open streams. No I/O. `tokenizer` None: replies have token ids and no text.

    lazy: nobody reads along, so a request is decoded once, at its end, and has one delta; unless it
    has stop strings.
    """

    def __init__(self, tokenizer: Tokenizer | None, lazy: bool = False) -> None:
        self._tokenizer = tokenizer
        self._lazy = lazy
        self._streams: dict[int, _Stream] = {}

    def step(self, batch: TokenBatch) -> tuple[list[StreamDelta], list[int]]:
        """(the news of every stream, the handles that a stop string ended and the router has not).

        Tokens of unknown handles are what was in flight when a stop string ended them.
        """
        for opened in batch.opened:
            self._streams[opened.handle] = _Stream(opened, self._tokenizer, self._lazy)
        news: dict[int, list[int]] = {}
        for handle, token in zip(
            unpack(batch.handles).tolist(), unpack(batch.tokens).tolist(), strict=True
        ):
            if handle in news:
                news[handle].append(token)
            else:
                news[handle] = [token]
        finished: dict[int, StreamFinished] = {}
        for end in batch.finished:
            finished[end.handle] = end
            news.setdefault(end.handle, [])
        if batch.logprobs:
            self._take_logprobs(batch)
        for scored in batch.prompt_logprobs:
            if (stream := self._streams.get(scored.owner)) is not None:
                stream.prompt_logprobs.append(scored)
        for embedding in batch.embeddings:
            if (stream := self._streams.get(embedding.owner)) is not None:
                stream.embedding = embedding.values

        deltas: list[StreamDelta] = []
        stopped: list[int] = []
        for handle, tokens in news.items():
            stream = self._streams.get(handle)
            if stream is None:
                continue
            delta = self._advance(stream, tokens, finished.get(handle))
            if delta is None:
                continue
            if delta.end is not None:
                del self._streams[handle]
                if handle not in finished:
                    stopped.append(handle)
            deltas.append(delta)
        return deltas, stopped

    def _advance(
        self, stream: _Stream, tokens: list[int], finished: StreamFinished | None
    ) -> StreamDelta | None:
        """A stream's new tokens, and its end if the router has ended it."""
        opened = stream.opened
        # The stop token itself is no text, unless asked for.
        hidden = finished is not None and finished.matched_token is not None
        shown = tokens[:-1] if hidden and not opened.no_stop_trim else tokens
        matched: int | str | None = None
        if stream.ids is not None:
            if finished is None:
                stream.ids += tokens
                return None
            text = ""
            if self._tokenizer is not None:
                text = self._tokenizer.decode(stream.ids + shown, opened.skip_special_tokens)
            tokens = stream.ids + tokens
        else:
            text, matched, num_read = stream.read(shown, ends=finished is not None)
            if matched is not None:
                tokens = tokens[:num_read]
                del stream.logprobs[num_read:]
        stream.num_tokens += len(tokens)

        delta = StreamDelta(opened.handle, text, pack(tokens), None, stream.logprobs)
        stream.logprobs = []
        if not stream.told:
            stream.told = True
            delta.prompt_logprobs, delta.embedding = stream.prompt_logprobs, stream.embedding
            delta.prompt_tokens, delta.cached_tokens = opened.prompt_len, opened.cached_len
        if matched is not None or finished is not None:
            reason = "stop" if matched is not None else finished.reason  # type: ignore[union-attr]
            if matched is None:
                matched = finished.matched_token  # type: ignore[union-attr]
            delta.end = StreamEnd(
                reason, matched, opened.prompt_len, stream.num_tokens, opened.cached_len
            )
        return delta

    def _take_logprobs(self, batch: TokenBatch) -> None:
        handles = unpack(batch.handles)
        for index in sorted(batch.logprobs):
            if (stream := self._streams.get(int(handles[index]))) is not None:
                stream.logprobs.append(batch.logprobs[index])


def run_detokenizer(args: ServerArgs, model: ModelConfig, addresses: Addresses) -> None:
    """Serves until its process is ended."""
    context = zmq.Context()
    router = connect_outbox(context, addresses.router)
    tokenizer_manager = connect_outbox(context, addresses.tokenizer_manager)
    tokenizer = None
    if not args.skip_tokenizer_init:
        from sglang.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(model, args)
    news = connect(addresses.detokenizer)
    detokenizer = Detokenizer(tokenizer)
    decoder = Decoder(TokenBatch)
    start_heartbeat()
    while True:
        deltas, stopped = detokenizer.step(decoder.decode(news.recv_bytes()))
        if stopped:
            router.send(encode(AbortRequest(stopped, silent=True)))
        if deltas:
            tokenizer_manager.send(encode(TextBatch(deltas)))
