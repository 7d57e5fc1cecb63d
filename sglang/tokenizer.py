"""Text to token ids, token ids to text (all at once or as they come), messages to a prompt.

On Hugging Face's `tokenizers` alone: importing transformers takes five seconds, so that happens
only for a checkpoint without a tokenizer.json.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.chat_template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from sglang.model_config import ModelConfig
    from sglang.server_args import ServerArgs


class IncrementalDecoder(ABC):
    """The text of one token stream, as it comes. Joined, all that `push` and `finish` return is
    `Tokenizer.decode` of all the ids."""

    @abstractmethod
    def push(self, ids: Iterable[int]) -> str:
        """The text that the stream has now gained: never half a character, never taken back."""

    @abstractmethod
    def finish(self) -> str:
        """What was held back, when no more tokens come."""


class Tokenizer:
    def __init__(
        self,
        backend: Backend,
        chat_templates: dict[str, str] | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        """chat_templates: by name, of which "default" is used, and "tool_use" where there are
        tools. special_tokens: what the templates call them ("bos_token") -> their text."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        special = frozenset(id for id, token in added.items() if token.special)
        self._bytes = _token_bytes(backend)
        self._shown = None if self._bytes is None else _WithoutSpecial(self._bytes, special)
        self._templates = {
            name: ChatTemplate(text, special_tokens or {})
            for name, text in (chat_templates or {}).items()
        }
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @classmethod
    def load(cls, config: ModelConfig, args: ServerArgs) -> Tokenizer:
        """From --tokenizer-path, else from where the model is. Raises ValueError if neither holds
        a tokenizer, or --chat-template no template."""
        from sglang.model_config import fetch_from_hub

        path = Path(args.tokenizer_path or config.path).expanduser()
        if not path.exists():
            path = fetch_from_hub(str(args.tokenizer_path), weights=False)
        if path.suffix == ".gguf":
            backend, templates, special_tokens = _read_gguf(path)
        else:
            backend, templates, special_tokens = _read_folder(path, args.trust_remote_code)
        if args.chat_template:
            templates = {"default": _read_template(args.chat_template)}
        return cls(backend, templates, special_tokens)

    # --- ids and text ----------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: the ones that begin (or end) a prompt of this model, if any. Special
        tokens that are spelled out in the text are recognised in any case. Raises ValueError for
        text that is no Unicode (a surrogate without its partner, which JSON can smuggle in)."""
        try:
            # Unlike `encode`, it lets other threads run meanwhile.
            encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return encoded[0].ids
        except (TypeError, UnicodeEncodeError):
            raise ValueError("the text is not valid Unicode") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids that are no tokens become nothing."""
        if self._bytes is None:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        stream = self.stream(skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        if self._bytes is None or self._shown is None:
            return _Redecoding(self._backend, skip_special_tokens)
        return _Bytewise(self._shown if skip_special_tokens else self._bytes, self._bytes)

    def to_json(self) -> str:
        """In the format of tokenizer.json."""
        return self._backend.to_str()

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to the text; possibly a part of a character."""
        if self._bytes is not None:
            return self._bytes[id]
        return (self._backend.id_to_token(id) or "").encode()

    def token_text(self, id: int) -> str:
        return self.token_bytes(id).decode("utf-8", "replace")

    # --- messages --------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation; encode it with add_special_tokens=False.

        add_generation_prompt: end with the header of the assistant's reply.
        continue_final_message: end within the last message instead, to be continued.
        kwargs: further variables of the template, such as enable_thinking.
        Raises ValueError where the model has no template or its template refuses.
        """
        if not self._templates:
            raise ValueError("the model has no chat template; --chat-template gives it one")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name) or next(iter(self._templates.values()))
        if continue_final_message:
            return template.render_unfinished(messages, tools=tools, **kwargs)
        return template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs
        )


# --- decoding ------------------------------------------------------------------------------------


class _TokenBytes(dict[int, bytes]):
    """Token id -> the bytes it adds to the text, worked out when first asked for."""

    def __init__(
        self,
        backend: Backend,
        replace: list[tuple[str, str]],
        byte_level: bool,
        byte_fallback: bool,
        strip_start: int = 0,
        bare_first: str = "",
    ) -> None:
        """strip_start: so many spaces at most are taken from the start of the text.
        bare_first: this is taken out of the first token altogether."""
        super().__init__()
        self._backend = backend
        self._replace = replace
        self._byte_level = _BYTE_OF_CHAR if byte_level else None
        self._byte_fallback = byte_fallback
        self.strip_start = strip_start
        self.bare_first = bare_first

    def __missing__(self, id: int) -> bytes:
        bytes = self[id] = self.convert(self._backend.id_to_token(id) or "")
        return bytes

    def convert(self, token: str) -> bytes:
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        if self._byte_level is not None:
            try:
                return bytes([self._byte_level[char] for char in token])
            except KeyError:  # an added token, spelled as it is
                pass
        return token.encode()

    def first(self, id: int) -> bytes:
        """The bytes of a token that begins a text."""
        token = self._backend.id_to_token(id) or ""
        return self.convert(token.replace(self.bare_first, "")) if self.bare_first else self[id]


class _WithoutSpecial(dict[int, bytes]):
    """The same, but special tokens add nothing."""

    def __init__(self, all: _TokenBytes, special: frozenset[int]) -> None:
        super().__init__((id, b"") for id in special)
        self._all = all

    def __missing__(self, id: int) -> bytes:
        bytes = self[id] = self._all[id]
        return bytes


def _bytes_of_chars() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell the 256 bytes (GPT-2): printable ones
    stand for themselves, the others, in order, for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _bytes_of_chars()


def _token_bytes(backend: Backend) -> _TokenBytes | None:
    """A table with which joining bytes does what the tokenizer's decoder does, or None where it
    does something else."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replace: list[tuple[str, str]] = []
    byte_level = byte_fallback = fused = False
    strip_start, bare_first = 0, ""
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"] and not byte_fallback and not fused:
            replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not byte_fallback and not fused:
            replace.append((step["replacement"], " "))
            bare_first = "" if step["prepend_scheme"] == "never" else step["replacement"]
        elif kind == "ByteFallback" and not fused:
            byte_fallback = True
        elif kind == "ByteLevel" and not fused:
            byte_level = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0:
            strip_start += step["start"]
        else:
            return None
    return _TokenBytes(backend, replace, byte_level, byte_fallback, strip_start, bare_first)


class _Bytewise(IncrementalDecoder):
    """Joins the tokens' bytes; only an unfinished character is held back."""

    def __init__(self, shown: dict[int, bytes], table: _TokenBytes) -> None:
        """shown: the table, or the table without special tokens."""
        self._shown = shown
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_strip = table.strip_start
        self._no_token_yet = bool(table.bare_first)
        self._starting = self._no_token_yet or self._spaces_to_strip > 0

    def push(self, ids: Iterable[int]) -> str:
        if self._starting:
            return self._start(ids)
        shown = self._shown
        return self._utf8.decode(b"".join([shown[id] for id in ids]))

    def _start(self, ids: Iterable[int]) -> str:
        """`push` until the first character, which may have lost spaces before it."""
        pieces = []
        for id in ids:
            piece = self._shown[id]
            if self._no_token_yet and piece:
                piece = self._table.first(id)
                self._no_token_yet = False
            pieces.append(piece)
        text = self._utf8.decode(b"".join(pieces))
        spaces = min(len(text) - len(text.lstrip(" ")), self._spaces_to_strip)
        self._spaces_to_strip -= spaces
        text = text[spaces:]
        self._starting = self._no_token_yet or (self._spaces_to_strip > 0 and not text)
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Redecoding(IncrementalDecoder):
    """For a decoder that only the tokenizer itself knows: decodes again from a few tokens back,
    and takes what is new. `finish` puts right what the neighbourhood of a token may have hidden."""

    def __init__(self, backend: Backend, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._context = 0  # decoded again, to know how the next token joins
        self._told = 0  # ids[:told] are in the text that was given out
        self._length = 0  # of that text

    def push(self, ids: Iterable[int]) -> str:
        self._ids += ids
        old = self._decode(self._ids[self._context : self._told])
        new = self._decode(self._ids[self._context :])
        if len(new) <= len(old) or new.endswith("\ufffd"):
            return ""
        self._context, self._told = self._told, len(self._ids)
        self._length += len(new) - len(old)
        return new[len(old) :]

    def finish(self) -> str:
        return self._decode(self._ids)[self._length :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=self._skip)


# --- reading -------------------------------------------------------------------------------------

_Source = tuple["Backend", dict[str, str], dict[str, str]]  # and the arguments of Tokenizer()


def _read_gguf(path: Path) -> _Source:
    from sglang.models import gguf_tokenizer
    from sglang.models.gguf import GGUFFile

    metadata = GGUFFile(path).metadata
    template = metadata.get("tokenizer.chat_template")
    return (
        gguf_tokenizer.build_tokenizer(metadata),
        {"default": template} if template else {},
        gguf_tokenizer.special_tokens(metadata),
    )


def _read_folder(folder: Path, trust_remote_code: bool) -> _Source:
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # it raises plain Exceptions
            raise ValueError(f"cannot read {folder / 'tokenizer.json'}: {error}") from None
    else:
        backend = _from_transformers(folder, trust_remote_code)
    special_tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, (str, dict))
    }
    return backend, _folder_templates(folder, config), special_tokens


def _from_transformers(folder: Path, trust_remote_code: bool) -> Backend:
    """Its conversions to `tokenizers` cover sentencepiece, tiktoken and other formats."""
    patterns = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise ValueError(f"{folder} has no tokenizer; --tokenizer-path names another place")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the formats' own libraries raise
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder} has no tokenizer that can be read: {reason}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: {type(tokenizer).__name__} has no `tokenizers` equivalent")
    return tokenizer.backend_tokenizer


def _folder_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """A file of its own goes before what tokenizer_config.json says."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    said = _read_json(folder / "chat_template.json").get("chat_template")
    said = said or config.get("chat_template") or {}
    if isinstance(said, str):
        return {"default": said}
    return {each["name"]: each["template"] for each in said}


def _read_template(argument: str) -> str:
    """--chat-template: the name of a file, or the template itself."""
    try:
        return Path(argument).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if "{" in argument:
            return argument
        raise ValueError(f"--chat-template {argument}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
