"""What a request asks of the sampler, and when it stops."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import msgspec

DEFAULT_NEW_TOKENS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 256
"""As many columns has a table of all rows, which the router compares every step with."""
MAX_TOP_LOGPROBS = 20


_ALIASES = {"sampling_seed": "seed"}
"""SGLang's newer spellings."""
_UNSUPPORTED = {"stop_regex", "structural_tag", "custom_params", "stream_interval"}
"""Of SGLang's. Its own frontend sends some of them empty with every request."""


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Names and defaults are SGLang's. Immutable by convention once `verify` has passed."""

    max_new_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    """Generated tokens at most; None: as many as fit the context and the KV pool; left out: of
    these DEFAULT_NEW_TOKENS at most."""
    min_new_tokens: int = 0
    """End-of-sequence and stop tokens are not sampled before so many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 (or 0): the whole vocabulary."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] = {}
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    """Keep the matched stop string or stop token in the text."""
    regex: str | None = None
    """The output is to match one of these, at most one of which is given..."""
    json_schema: str | None = None
    """...the schema as JSON text..."""
    ebnf: str | None = None
    """...in GBNF (`root ::= ...`) or Lark's notation."""

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], defaults: dict[str, Any] | None = None
    ) -> SamplingParams:
        """None, or a name left out, is the default: the model's own in `defaults`, else SGLang's
        (but `max_new_tokens` None is a value of its own).

        Raises ValueError with a message that starts with the offending field's name; `verify` does
        the rest.
        """
        values = {_ALIASES.get(name, name): value for name, value in values.items()}
        values.pop("spaces_between_special_tokens", None)  # decoders of today need no telling
        for name in _UNSUPPORTED & values.keys():
            if values.pop(name):
                raise ValueError(f"{name} is not supported by this server")
        for name in values:
            if name not in cls.__struct_fields__:
                raise ValueError(f"{name} is not a sampling parameter")
        given = {k: v for k, v in values.items() if v is not None or k == "max_new_tokens"}
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        if isinstance(bias := given.get("logit_bias"), dict):
            given["logit_bias"] = _int_keys(bias)
        if isinstance(given.get("json_schema"), dict | bool):
            given["json_schema"] = json.dumps(given["json_schema"])
        try:
            return msgspec.convert({**(defaults or {}), **given}, cls)
        except msgspec.ValidationError as error:
            # "Expected `int`, got `str` - at `$.top_k`"
            reason, _, path = str(error).partition(" - at `$.")
            field = path.rstrip("`").split("[")[0]
            raise ValueError(f"{field}: {reason[:1].lower()}{reason[1:]}") from None

    def verify(self, vocab_size: int) -> None:
        """Raises ValueError with a message that starts with the offending field's name."""

        most = self.max_new_tokens if isinstance(self.max_new_tokens, int) else None
        if most is not None and most < 0:
            self._refuse("max_new_tokens", ">= 0")
        if self.min_new_tokens < 0:
            self._refuse("min_new_tokens", ">= 0")
        if most is not None and self.min_new_tokens > most:
            self._refuse("min_new_tokens", f"<= max_new_tokens ({most})")
        if not 0.0 <= self.temperature < math.inf:
            self._refuse("temperature", "a finite number >= 0")
        if not 0.0 < self.top_p <= 1.0:
            self._refuse("top_p", "in (0, 1]")
        if not -1 <= self.top_k < 2**31:
            self._refuse("top_k", "-1 (all tokens), or >= 0 and of 32 bits")
        if not 0.0 <= self.min_p <= 1.0:
            self._refuse("min_p", "in [0, 1]")
        if not -2.0 <= self.frequency_penalty <= 2.0:
            self._refuse("frequency_penalty", "in [-2, 2]")
        if not -2.0 <= self.presence_penalty <= 2.0:
            self._refuse("presence_penalty", "in [-2, 2]")
        if not 0.0 < self.repetition_penalty <= 2.0:
            self._refuse("repetition_penalty", "in (0, 2]")
        if not (self.seed is None or -(2**63) <= self.seed < 2**63):
            self._refuse("seed", "a 64-bit integer")
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias token ids must be in [0, {vocab_size}), got {token}")
            if not -100.0 <= bias <= 100.0:
                raise ValueError(f"logit_bias values must be in [-100, 100], got {bias}")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            count = len(self.stop_token_ids)
            raise ValueError(f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS}, got {count}")
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"stop_token_ids must be in [0, {vocab_size}), got {token}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")
        if not all(s.isascii() or s.encode(errors="ignore").decode() == s for s in self.stop):
            raise ValueError("stop strings must be valid Unicode: one holds half a surrogate pair")

    def of_sample(self, index: int) -> SamplingParams:
        """One prompt's samples with a seed have seeds that follow each other."""
        if self.seed is None or index == 0:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + index) % 2**63)

    def _refuse(self, field: str, limits: str) -> NoReturn:
        raise ValueError(f"{field} must be {limits}, got {getattr(self, field)}")


def _int_keys(bias: dict[Any, Any]) -> dict[int, Any]:
    """JSON's keys are strings: one way to write each number."""
    if not all(re.fullmatch("-?(0|[1-9][0-9]{0,17})", str(token)) for token in bias):
        raise ValueError("logit_bias: its keys must be token ids")
    return {int(token): value for token, value in bias.items()}
