"""Stop strings across token borders, and what the detokenizer says of a stream."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.messages import StreamFinished, StreamOpened, TokenBatch, TokenLogprob, pack, unpack
from sglang.server.detokenizer import Detokenizer, StopFinder
from tests.vocabularies import KINDS, TEXTS


def expected(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """Character by character: the first match that is complete, the longest of those."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if keep else end - len(longest)], longest
    return text, None


@given(
    text=st.text("ab⛔c", max_size=30),
    stops=st.lists(st.text("ab⛔", min_size=1, max_size=5), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
    keep=st.booleans(),
)
def test_pieces_of_any_size_give_what_the_whole_text_gives(text, stops, cuts, keep):
    borders = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    finder = StopFinder(stops, keep)
    shown, found = "", None
    for start, end in pairwise(borders):
        piece, found = finder.push(text[start:end])
        shown += piece
        assert expected(text, stops, keep)[0].startswith(shown), "a stop string leaked"
        if found:
            break
    if not found:
        shown += finder.finish()
    assert (shown, found) == expected(text, stops, keep)


def test_only_what_a_stop_string_may_start_with_is_held_back():
    finder = StopFinder(["###", "end."])
    assert finder.push("one #") == ("one ", None)
    assert finder.push("x") == ("#x", None)
    assert finder.push(" en") == (" ", None)
    assert finder.push("d of##") == ("end of", None)
    assert finder.push("#!") == ("", "###")


@st.composite
def streams(draw, kind: str) -> tuple[list[int], list[str], list[int]]:
    """(tokens of a text, or any tokens; stop strings, some of which occur in their text; where the
    steps are cut)."""
    tokenizer = KINDS[kind]
    any_tokens = st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=30)
    ids = draw(st.one_of(TEXTS.map(tokenizer.encode).filter(bool), any_tokens))
    text = tokenizer.decode(ids)
    stops = draw(st.lists(st.text("aou 你🤗é", min_size=1, max_size=3), max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        stop = text[start : start + draw(st.integers(1, 6))]
        stops += [stop] if stop else []
    return ids, stops, draw(st.lists(st.integers(0, 40), max_size=8))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), keep=st.booleans(), lazy=st.booleans(), ends_on_token=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_joined_deltas_are_the_text_up_to_the_stop_for_any_tokens_stops_and_steps(
    kind, data, keep, lazy, ends_on_token
):
    """Emoji, Chinese and bytes that are no character included, in every kind of vocabulary."""
    tokenizer = KINDS[kind]
    ids, stops, cuts = data.draw(streams(kind))
    matched_token = ids[-1] if ends_on_token else None
    shown = ids[:-1] if ends_on_token and not keep else ids
    text, stop = expected(tokenizer.decode(shown), stops, keep)

    def tokens_of_reply(borders: list[int]) -> list[int]:
        detokenizer, said, taken, end = Detokenizer(tokenizer, lazy), "", [], None
        for start, after in pairwise(borders):
            chunk = ids[start:after]
            batch = TokenBatch(pack([7] * len(chunk)), pack(chunk))
            if start == 0:
                batch.opened = [opened(7, stops, no_stop_trim=keep)]
            if after == len(ids):
                reason = "stop" if ends_on_token else "length"
                batch.finished = [StreamFinished(7, reason, matched_token)]
            deltas, ended = detokenizer.step(batch)
            for delta in deltas:
                assert end is None, "something after the end"
                said, end = said + delta.text, delta.end
                taken += unpack(delta.token_ids).tolist()
                assert text.startswith(said), "a stop string, or half a character, leaked"
            if end is not None:
                assert ended == ([7] if after < len(ids) else [])
                break
        assert said == text and taken == ids[: len(taken)]
        assert end is not None and end.completion_tokens == len(taken)
        assert end.matched == (stop if stop is not None else matched_token)
        return taken

    together = tokens_of_reply([0, *sorted({c for c in cuts if 0 < c < len(ids)}), len(ids)])
    alone = tokens_of_reply(list(range(len(ids) + 1)))
    assert together == alone


class Letters:
    """A tokenizer whose token i is the character chr(i); 0 is the special end-of-sequence token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("</s>" if i == 0 else chr(i) for i in ids if i or not skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True):
        return _LetterStream(self, skip_special_tokens)


class _LetterStream:
    def __init__(self, tokenizer: Letters, skip: bool) -> None:
        self.tokenizer, self.skip = tokenizer, skip

    def push(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, self.skip)

    def finish(self) -> str:
        return ""


def opened(handle: int, stop=(), skip=True, no_stop_trim=False) -> StreamOpened:
    return StreamOpened(handle, list(stop), skip, no_stop_trim, prompt_len=5, cached_len=2)


def run(detokenizer: Detokenizer, text: str, opening: StreamOpened, finish: StreamFinished):
    """Feeds a text, a character a step; returns (deltas, handles to abort)."""
    deltas, stopped = [], []
    for i, char in enumerate(text):
        last = i == len(text) - 1
        batch = TokenBatch(
            pack([opening.handle]),
            pack([ord(char) if char != "$" else 0]),
            [opening] if i == 0 else [],
            [finish] if last else [],
            {0: TokenLogprob(-float(i), [], [])},
        )
        news, ended = detokenizer.step(batch)
        deltas += news
        stopped += ended
    return deltas, stopped


@pytest.mark.parametrize("lazy", [False, True])
def test_a_stream_ends_on_a_stop_string_though_the_router_goes_on(lazy):
    finish = StreamFinished(7, "length")
    deltas, stopped = run(Detokenizer(Letters(), lazy), "say STOP now", opened(7, ["STOP"]), finish)
    assert "".join(d.text for d in deltas) == "say "
    assert stopped == [7]
    end = deltas[-1].end
    assert (end.reason, end.matched, end.completion_tokens) == ("stop", "STOP", 8)
    assert sum(d.end is not None for d in deltas) == 1
    assert b"".join(d.token_ids for d in deltas) == pack([ord(c) for c in "say STOP"])


def test_a_reply_has_no_tokens_behind_its_stop_string_however_many_come_at_once():
    text = "say STOP now"
    batch = TokenBatch(pack([7] * len(text)), pack([ord(c) for c in text]), [opened(7, ["STOP"])])
    batch.logprobs = {i: TokenLogprob(-float(i), [], []) for i in range(len(text))}
    (delta,), stopped = Detokenizer(Letters()).step(batch)
    assert (delta.text, delta.end.completion_tokens, stopped) == ("say ", 8, [7])
    assert unpack(delta.token_ids).tolist() == [ord(c) for c in "say STOP"]
    assert [p.logprob for p in delta.logprobs] == [-float(i) for i in range(8)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("skip", "no_stop_trim", "text"),
    [(True, False, "hi"), (False, False, "hi"), (True, True, "hi"), (False, True, "hi</s>")],
)
def test_the_stop_token_is_a_token_but_no_text_unless_asked_for(lazy, skip, no_stop_trim, text):
    finish = StreamFinished(7, "stop", matched_token=0)
    opening = opened(7, skip=skip, no_stop_trim=no_stop_trim)
    deltas, stopped = run(Detokenizer(Letters(), lazy), "hi$", opening, finish)
    assert "".join(d.text for d in deltas) == text
    assert stopped == []
    end = deltas[-1].end
    assert (end.reason, end.matched, end.completion_tokens) == ("stop", 0, 3)
    assert (deltas[0].prompt_tokens, deltas[0].cached_tokens) == (5, 2)
    assert len(deltas) == (1 if lazy else 3)
    assert [p.logprob for d in deltas for p in d.logprobs] == [0.0, -1.0, -2.0]


def test_what_was_held_back_is_shown_when_the_request_ends_without_a_match():
    finish = StreamFinished(7, "length")
    deltas, _ = run(Detokenizer(Letters()), "a ST", opened(7, ["STOP"]), finish)
    assert [d.text for d in deltas] == ["a", " ", "", "ST"]
    assert deltas[-1].end.reason == "length"


def test_a_stop_string_completed_by_the_last_token_is_the_reason():
    finish = StreamFinished(7, "length")
    deltas, stopped = run(Detokenizer(Letters()), "a STOP", opened(7, ["STOP"]), finish)
    assert deltas[-1].end.reason == "stop" and deltas[-1].end.matched == "STOP"
    assert stopped == [], "the router has ended it already"


def test_an_abort_before_the_first_token_still_ends_the_stream():
    batch = TokenBatch(b"", b"", [opened(3)], [StreamFinished(3, "abort")])
    deltas, stopped = Detokenizer(Letters()).step(batch)
    assert [(d.handle, d.text, d.end.reason) for d in deltas] == [(3, "", "abort")]
    assert stopped == []


def test_without_a_tokenizer_there_are_ids_and_no_text():
    deltas, _ = run(Detokenizer(None), "abc", opened(1), StreamFinished(1, "length"))
    assert [d.text for d in deltas] == ["", "", ""]
    assert [int(unpack(d.token_ids)[0]) for d in deltas] == [97, 98, 99]


def test_streams_of_one_step_do_not_mix():
    rng = random.Random(0)
    texts = {h: "".join(rng.choices("abcde", k=rng.randint(1, 20))) for h in range(1, 40)}
    detokenizer, said = Detokenizer(Letters()), dict.fromkeys(texts, "")
    for step in range(20):
        alive = [h for h in texts if step < len(texts[h])]
        batch = TokenBatch(
            pack(alive),
            pack([ord(texts[h][step]) for h in alive]),
            [opened(h) for h in alive] if step == 0 else [],
            [StreamFinished(h, "length") for h in alive if step == len(texts[h]) - 1],
        )
        for delta in detokenizer.step(batch)[0]:
            said[delta.handle] += delta.text
    assert said == texts
