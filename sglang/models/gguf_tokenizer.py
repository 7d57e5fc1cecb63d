"""The tokenizer inside a GGUF file: its vocabulary, merges and the name of its pre-tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

# What GGUF calls token types.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Raises ValueError for a kind of tokenizer, or a pre-tokenizer, that is not known here."""
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise ValueError(
            f"the GGUF tokenizer {kind} is not supported (supported: {', '.join(builders)}); "
            "--tokenizer-path names another"
        )
    tokenizer = builders[kind](metadata)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added = [
        AddedToken(token, special=type != _USER_DEFINED, normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])
    _add_begin_and_end(tokenizer, metadata)
    return tokenizer


def special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """{"bos_token": "<s>", ...}, as chat templates name them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    return {
        f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]]
        for theirs, ours in names.items()
        if f"tokenizer.ggml.{theirs}_token_id" in metadata
    }


def _byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"the GGUF pre-tokenizer {pre} is not supported (supported: "
            f"{', '.join(_PRE_TOKENIZERS)}); --tokenizer-path names another tokenizer"
        )
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splits(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """The pattern that GPT-4's tokenizer and its followers split by; they differ in digits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _gpt2()]
    ),
    "llama-bpe": _splits(r"\p{N}{1,3}"),
    "qwen2": _splits(r"\p{N}"),
}


def _sentencepiece_bpe(metadata: dict[str, Any]) -> Tokenizer:
    """Llama 2's kind. What to merge first is given by the score of what comes of it."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-scores[i], vocab[token[:cut]], vocab[token[cut:]])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [(tokens[left], tokens[right]) for _, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *steps]
    )
    return tokenizer


def _add_begin_and_end(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Files of the two kinds that always begin with BOS may leave it unsaid."""
    begins = (
        metadata["tokenizer.ggml.model"] == "llama"
        or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    tokens, template, special = metadata["tokenizer.ggml.tokens"], ["$A"], []
    for name, default in (("bos", begins), ("eos", False)):
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None and metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            template.insert(0 if name == "bos" else len(template), tokens[id])
            special.append((tokens[id], id))
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
