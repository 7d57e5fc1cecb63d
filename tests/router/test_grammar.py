"""Grammars on the demo model's vocabulary."""

from __future__ import annotations

import json
import random
import re
import time

import numpy as np
import pytest

from sglang.messages import GenerateRequest, pack
from sglang.model_config import ModelConfig
from sglang.router.grammar import Grammar, Grammars, check_grammar, load_tokenizer
from sglang.sampling_params import SamplingParams
from sglang.server_args import ServerArgs
from sglang.tokenizer import Tokenizer

ARGS = ServerArgs(device="cpu")
PERSON = {
    "type": "object",
    "properties": {
        "first name": {"type": "string", "pattern": "^[A-Z][a-zé漢]{1,8}$"},
        "née": {"enum": ["tomorrow", "tomorrows", "yesterday 🎉"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["first name", "née", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json_schema": json.dumps(PERSON),
    "regex": r"The (capital|captain) of (France|Francia) is (Paris|Parma)\.",
    "ebnf": 'root ::= ("yes" | "yesterday") " and " ("🎉🎉" | "漢字") "!"',
}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.load(ARGS)


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    return Tokenizer.load(model, ARGS)


@pytest.fixture(scope="module")
def grammars(model) -> Grammars:
    return Grammars(lambda: load_tokenizer(ARGS, model))


def request(**params) -> GenerateRequest:
    return GenerateRequest(1, pack([1]), SamplingParams(**params))


def wait(grammars: Grammars) -> list[tuple[GenerateRequest, Grammar | None]]:
    deadline = time.monotonic() + 20
    done = []
    while grammars.num_pending and time.monotonic() < deadline:
        done += grammars.done()
        time.sleep(0.001)
    return done


def make(grammars: Grammars, kind: str) -> Grammar:
    grammars.submit(request(**{kind: GRAMMARS[kind]}))
    ((_, grammar),) = wait(grammars)
    assert grammar is not None
    return grammar


def allowed(grammar: Grammar) -> np.ndarray:
    bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def walk(grammar: Grammar, rng: random.Random, eos: tuple[int, ...], room: int) -> list[int]:
    """Random allowed tokens to the grammar's end; what is forced comes by itself if there is room.
    Each forced token is one that its grammar's twin, to which nothing is forced, allows."""
    tokens: list[int] = []
    while not grammar.is_complete:
        token = rng.choice(allowed(grammar).tolist())
        if token in eos:
            break
        forced = grammar.accept(token, room)
        assert len(forced) <= room
        tokens += [token, *forced]
        assert not grammar.failed and len(tokens) < 300
    return tokens


@pytest.mark.parametrize("kind", GRAMMARS)
def test_forced_tokens_are_what_alone_may_follow_and_lead_to_the_same_texts(
    grammars, tokenizer, model, kind
):
    rng = random.Random(0)
    num_forced = 0
    for _ in range(30):
        jumping, twin = make(grammars, kind), make(grammars, kind)
        tokens: list[int] = []
        while not jumping.is_complete:
            token = rng.choice(allowed(jumping).tolist())
            if token in model.eos_token_ids:
                break
            forced = jumping.accept(token, 100)
            for each in (token, *forced):
                assert each in allowed(twin), "a forced token that the grammar does not allow"
                assert twin.accept(each, 0) == []
            if forced and not jumping.is_complete:
                assert (jumping.mask() == twin.mask()).all(), "a forced token left a choice out"
            tokens += [token, *forced]
            num_forced += len(forced)
        assert twin.is_complete == jumping.is_complete
        check_text(kind, tokenizer.decode(tokens))
    assert num_forced > 30


@pytest.mark.parametrize("kind", GRAMMARS)
def test_no_more_is_forced_than_there_is_room_for(grammars, tokenizer, model, kind):
    rng = random.Random(1)
    for room in (0, 1, 2):
        tokens = walk(make(grammars, kind), rng, model.eos_token_ids, room)
        check_text(kind, tokenizer.decode(tokens))


def check_text(kind: str, text: str) -> None:
    match kind:
        case "json_schema":
            person = json.loads(text)
            assert set(person) == set(PERSON["required"]) and 0 <= person["age"] <= 120
            assert re.fullmatch("[A-Z][a-zé漢]{1,8}", person["first name"])
        case "regex":
            assert re.fullmatch(GRAMMARS["regex"], text)
        case "ebnf":
            assert re.fullmatch("(yes|yesterday) and (🎉🎉|漢字)!", text)


def test_requests_do_not_share_how_far_their_grammars_have_come(grammars):
    one, other = make(grammars, "regex"), make(grammars, "regex")
    before = other.mask().copy()
    one.accept(int(allowed(one)[0]), 10)
    assert (other.mask() == before).all()


def test_a_grammar_that_is_given_up_says_why(grammars, tokenizer, caplog):
    grammars.submit(request(regex="(a?){3000}a{3000}"))
    ((_, grammar),) = wait(grammars)
    a = tokenizer.encode("a", False)[0]
    while grammar is not None and not grammar.failed and not grammar.is_complete:
        grammar.accept(a, 0)
    assert grammar is None or "its grammar cannot go on: " in caplog.text


def test_a_grammar_is_compiled_once(grammars):
    make(grammars, "regex")
    count = grammars.num_compiled
    make(grammars, "regex")
    assert grammars.num_compiled == count and grammars.seconds > 0


def test_a_vocabulary_that_cannot_be_used_ends_its_request_only(caplog):
    def fail():
        raise ValueError("no such vocabulary")

    grammars = Grammars(fail)
    grammars.prepare()
    grammars.submit(request(regex="a"))
    ((_, grammar),) = wait(grammars)
    assert grammar is None and "no such vocabulary" in caplog.text


def test_pending_requests_can_be_dropped(grammars):
    grammars.submit(request(regex="dropped"))
    assert [r.params.regex for r in grammars.drop([1])] == ["dropped"]
    assert grammars.num_pending == 0


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"regex": "("}, "regex is not one that this server can follow"),
        ({"json_schema": "{"}, "json_schema is not one"),
        ({"json_schema": '{"type": "strin"}'}, "json_schema is not one"),
        ({"json_schema": '{"not": {"type": "string"}}'}, r'Unimplemented keys: \["not"\]'),
        ({"ebnf": "root :="}, "ebnf is not one"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf cannot be combined with regex"),
        ({"regex": "a", "min_new_tokens": 1}, "min_new_tokens cannot be combined with regex"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said_at_once(params, part):
    with pytest.raises(ValueError, match=part):
        check_grammar(SamplingParams(**params), "llguidance")


def test_without_a_backend_grammars_are_refused():
    with pytest.raises(ValueError, match="json_schema is not served here: --grammar-backend"):
        check_grammar(SamplingParams(json_schema="{}"), "none")
    check_grammar(SamplingParams(), "none")
