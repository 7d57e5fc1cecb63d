"""Text and token ids: whatever comes in deltas is what comes at once."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from sglang.model_config import ModelConfig
from sglang.models.gguf_tokenizer import build_tokenizer
from sglang.server_args import ServerArgs
from sglang.tokenizer import Tokenizer
from tests.vocabularies import KINDS, TEXTS, byte_level


def in_chunks(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    at = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    deltas = [stream.push(ids[a:b]) for a, b in pairwise(at)]
    return [*deltas, stream.finish()]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 100)), skip=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_joined_deltas_are_the_text_for_any_text_and_chunks(kind, text, cuts, skip):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    deltas = in_chunks(tokenizer, ids, cuts, skip)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(0, 100)), skip=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_joined_deltas_are_the_text_for_any_tokens(kind, data, cuts, skip):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(in_chunks(tokenizer, ids, cuts, skip)) == text
    if kind == "byte_level":  # with byte fallback, its own decoder spells a bad run differently
        assert text == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_no_delta_holds_half_a_character_and_none_is_late(kind):
    tokenizer, text = KINDS[kind], "The 你 🤗 é 👩‍👩‍👧‍👦 ok"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text.split())
    stream, shown = tokenizer.stream(), ""
    for i, id in enumerate(ids):
        shown += stream.push([id])
        assert "\ufffd" not in shown
        assert tokenizer.decode(ids[: i + 1]).rstrip("\ufffd") == shown  # nothing else is late
    assert shown == text and stream.finish() == ""


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
def test_a_text_that_ends_within_a_character_says_so(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("The 🤗")[:-1]
    stream = tokenizer.stream()
    assert stream.push(ids) == "The "
    assert set(stream.finish()) == {"\ufffd"}


def test_only_the_first_space_of_a_text_is_stripped():
    for kind in ("byte_fallback", "metaspace"):
        tokenizer = KINDS[kind]
        the = tokenizer._backend.token_to_id("▁The")
        stream = tokenizer.stream()
        start = tokenizer._backend.token_to_id("<s>")
        assert [stream.push([id]) for id in (start, the, start, the)] == ["", "The", "", " The"]
        assert tokenizer.token_text(the) == " The"


def test_special_tokens_are_shown_only_if_asked_for():
    for tokenizer in KINDS.values():
        ids = tokenizer.encode("<s>a</s>")
        assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<s>a</s>"
        assert tokenizer.decode(ids).strip() == "a"
        assert tokenizer.token_text(ids[0]) == "<s>"


def test_text_that_is_no_unicode_is_a_value_error():
    with pytest.raises(ValueError, match="not valid Unicode"):
        KINDS["byte_level"].encode("a \ud83e b")


def test_token_bytes_joined_are_the_text():
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = KINDS[kind]
        ids = tokenizer.encode("The 🤗 你")
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == "The 🤗 你"


# --- chat templates ------------------------------------------------------------------------------

CHATML = """\
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=1) }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
USER = {"role": "user", "content": "Hi <é> "}


def chat(template: str = CHATML, **special: str) -> Tokenizer:
    return Tokenizer(byte_level(), {"default": template}, special)


def test_templates_render_as_in_transformers():
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>")
    theirs.chat_template = CHATML + "{{ bos_token }}{{ strftime_now('%Y') }}"
    ours = chat(theirs.chat_template, bos_token="<s>")
    messages = [USER, {"role": "assistant", "content": " sure, \n"}]
    tools = [{"type": "function", "function": {"name": "<f>", "description": "é"}}]
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        assert ours.render_chat(messages, tools, prompt) == wanted
    wanted = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.render_chat(messages, continue_final_message=True) == wanted
    assert wanted.endswith("sure,")


def test_templates_get_the_date_and_further_variables():
    tokenizer = chat("{{ strftime_now('%Y') }}{{ enable_thinking }}{{ messages[0].content }}")
    year = str(datetime.now().year)
    assert tokenizer.render_chat([USER], enable_thinking=False) == f"{year}FalseHi <é> "


def test_a_template_that_refuses_or_fails_is_a_value_error():
    with pytest.raises(ValueError, match="no role tool"):
        chat().render_chat([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="no chat template"):
        KINDS["byte_level"].render_chat([USER])
    with pytest.raises(ValueError, match="chat template, line 2"):
        chat("\n{% if %}")
    with pytest.raises(ValueError, match="refuses"):
        chat("{{ messages[7].content.x }}").render_chat([USER])
    with pytest.raises(ValueError, match="needs a last message with text"):
        chat().render_chat([], continue_final_message=True)


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(ValueError, match="unsafe"):
        chat("{{ messages.__class__.__mro__ }}").render_chat([USER])
    with pytest.raises(ValueError, match="unsafe"):
        chat("{{ messages.append(1) }}").render_chat([USER])


# --- loading -------------------------------------------------------------------------------------


def save(folder, **config) -> ModelConfig:
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 700, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64,
        }
    )  # fmt: skip
    model.path = str(folder)
    return model


def test_templates_are_found_wherever_they_are_kept(tmp_path):
    config = save(tmp_path, chat_template="{{ bos_token }}A", bos_token={"content": "<s>"})
    args = ServerArgs()
    assert Tokenizer.load(config, args).render_chat([USER]) == "<s>A"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    save(tmp_path, chat_template=named)
    tokenizer = Tokenizer.load(config, args)
    assert tokenizer.render_chat([USER]) == "D" and tokenizer.render_chat([USER], [{}]) == "T"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(config, args).render_chat([USER]) == "J"
    (tmp_path / "mine").write_text("M")
    for argument, wanted in ((str(tmp_path / "mine"), "M"), ("{{ 1 }}", "1")):
        args = ServerArgs(chat_template=argument)
        assert Tokenizer.load(config, args).render_chat([USER]) == wanted
    with pytest.raises(ValueError, match="--chat-template nowhere"):
        Tokenizer.load(config, ServerArgs(chat_template="nowhere"))


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_an_error(tmp_path):
    config = save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.load(config, ServerArgs())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        Tokenizer.load(config, ServerArgs())
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer; --tokenizer-path"):
        Tokenizer.load(config, ServerArgs())


def test_truncation_in_a_tokenizer_file_is_not_obeyed(tmp_path):
    config = save(tmp_path)
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(config, ServerArgs())
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"


# --- GGUF vocabularies ---------------------------------------------------------------------------


def gguf_metadata(backend: Backend, kind: str, **more) -> dict:
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = backend.get_added_tokens_decoder()
    types = [1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    values = {"model": kind, "tokens": tokens, "token_type": types, "merges": merges, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_a_byte_level_gguf_vocabulary_is_the_tokenizer_it_came_from(text):
    original = KINDS["byte_level"]._backend
    rebuilt = build_tokenizer(gguf_metadata(original, "gpt2", pre="gpt-2"))
    assert rebuilt.encode(text).ids == original.encode(text).ids


def test_a_sentencepiece_gguf_vocabulary_merges_by_score():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = {"▁": -9.0, "a": -9.0, "b": -9.0, "ab": -1.0, "▁a": -2.0, "▁ab": -3.0, "ba": -4.0}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *pieces],
        "tokenizer.ggml.scores": [0.0] * len(tokens) + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = Tokenizer(build_tokenizer(metadata))
    encoded = tokenizer._backend.encode("ab aab你")
    assert encoded.tokens == ["<s>", "▁ab", "▁a", "ab", "<0xE4>", "<0xBD>", "<0xA0>"]
    assert tokenizer.decode(encoded.ids) == "ab aab你"
    assert tokenizer.encode("ab", add_special_tokens=False) == encoded.ids[1:2]
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert build_tokenizer(metadata).encode("ab").ids == encoded.ids[1:2]


def test_unknown_gguf_tokenizers_are_named():
    with pytest.raises(ValueError, match="GGUF tokenizer bert is not supported"):
        build_tokenizer({"tokenizer.ggml.model": "bert"})
    metadata = gguf_metadata(byte_level(), "gpt2", pre="strange")
    with pytest.raises(ValueError, match="pre-tokenizer strange is not supported"):
        build_tokenizer(metadata)


def test_a_long_text_is_tokenized_beside_what_else_goes_on():
    tokenizer = KINDS["byte_level"]
    text = "The quick brown fox jumps over the lazy dog. " * 50_000
    with ThreadPoolExecutor(1) as pool:
        asked = last = time.monotonic()
        tokenized, longest = pool.submit(tokenizer.encode, text), 0.0
        while not tokenized.done():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        took = time.monotonic() - asked
    assert longest < 0.5 * took, "it held Python's lock"
