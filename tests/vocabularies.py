"""Small tokenizers of every kind, made here."""

from __future__ import annotations

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sglang.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 1234 tokens, please!  Two  spaces.\n\n\tTabs",
    "你好，世界。这是一个测试。 こんにちは世界 안녕하세요 Привет мир naïve café",
    "🤗🎉👩‍👩‍👧‍👦🏳️‍🌈 and emoji 🤔",
] * 3
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("  two spaces ", special=False)])
    return backend


def byte_fallback(*, decoder=None) -> Backend:
    """Like Llama 2's: what is not in the vocabulary is spelled in bytes."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "▁The", "▁quick", "qu", "ick", "▁a", "é", "你", ".", "▁▁", *"abcdefghijklmno"]
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *bytes_, *words])}
    merges = [("qu", "ick")] if "quick" in vocab else []
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoder or decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return backend


def metaspace() -> Backend:
    steps = [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    return byte_fallback(decoder=decoders.Sequence([steps[1], steps[0], steps[2]]))


def odd() -> Backend:
    """With a decoder that works on more than single tokens."""
    steps = [decoders.ByteLevel(), decoders.Replace(Regex("o+"), "0")]
    backend = byte_level()
    backend.decoder = decoders.Sequence(steps)
    return backend


KINDS = {f.__name__: Tokenizer(f()) for f in (byte_level, byte_fallback, metaspace, odd)}
TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from([" ", "  ", "The", "quick", "🤗", "你好", "é", "<s>", "\n", "\x00", "👩‍👩‍👧‍👦"])
).map("".join)
