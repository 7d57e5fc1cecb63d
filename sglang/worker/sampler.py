"""From logits to the next tokens: penalties, bias, sampling, logprobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang.kernels.sampling import greedy, sample
from sglang.kernels.sharded_sampling import best_keys, tokens_of
from sglang.messages import Logprobs, RowSpec, unpack

if TYPE_CHECKING:
    from sglang.layers.embedding import OutputHead


@dataclass
class _Adjustment:
    """What one row does to its logits [V] before a token is drawn. Few rows ask for any."""

    bias: torch.Tensor | None = None  # float32 [V]
    suppress: torch.Tensor | None = None  # int64 [k]
    suppress_until: int = 0
    counts: torch.Tensor | None = None  # float32 [V], of generated tokens
    seen: torch.Tensor | None = None  # bool [V], prompt or output
    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0

    def apply(self, logits: torch.Tensor, seq_len: int) -> None:
        if self.counts is not None:
            assert self.seen is not None
            factor = torch.where(logits > 0, 1.0 / self.repetition, self.repetition)
            logits.mul_(torch.where(self.seen, factor, 1.0))
            logits.sub_(self.counts * self.frequency + (self.counts > 0) * self.presence)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.suppress is not None and seq_len < self.suppress_until:
            logits[self.suppress] = -float("inf")

    def count(self, token: torch.Tensor) -> None:
        """token int32 [1], just sampled."""
        if self.counts is not None and self.seen is not None:
            index = token.long()
            self.counts[index] += 1.0
            self.seen[index] = True


class Sampler:
    """Row-indexed, as RowState is; `open` before a row's first step."""

    def __init__(
        self, num_rows: int, vocab_size: int, device: torch.device, sharded: bool = False
    ) -> None:
        """sharded: ranks have some of the vocabulary each."""
        self._vocab_size = vocab_size
        self._device = device
        self._sharded = sharded
        self._adjustments: dict[int, _Adjustment] = {}
        self._is_adjusted = np.zeros(num_rows + 1, dtype=bool)
        self._is_random = np.zeros(num_rows + 1, dtype=bool)
        self._top_logprobs = np.full(num_rows + 1, -1, dtype=np.int32)
        self._is_plain = np.ones(num_rows + 1, dtype=bool)

    def open(self, spec: RowSpec) -> None:
        row = spec.row
        self._is_random[row] = spec.temperature > 0
        filtered = spec.temperature > 0 and (spec.top_k > 0 or spec.top_p < 1 or spec.min_p > 0)
        self._top_logprobs[row] = spec.top_logprobs
        self._adjustments.pop(row, None)
        adjusted = bool(spec.logit_bias or spec.suppress or spec.history)
        self._is_adjusted[row] = adjusted
        asks_more = adjusted or spec.top_logprobs >= 0 or (self._sharded and filtered)
        self._is_plain[row] = not asks_more
        if adjusted:
            self._adjustments[row] = self._adjustment(spec)

    def _adjustment(self, spec: RowSpec) -> _Adjustment:
        a = _Adjustment(
            suppress_until=spec.suppress_until,
            frequency=spec.frequency_penalty,
            presence=spec.presence_penalty,
            repetition=spec.repetition_penalty,
        )
        if spec.logit_bias:
            a.bias = torch.zeros(self._vocab_size)
            a.bias[list(spec.logit_bias)] = torch.tensor(list(spec.logit_bias.values()))
            a.bias = a.bias.to(self._device)
        if spec.suppress:
            a.suppress = torch.tensor(spec.suppress, device=self._device)
        if spec.history:
            history = torch.tensor(unpack(spec.history), dtype=torch.int64)
            outputs = torch.bincount(history[spec.prompt_len :], minlength=self._vocab_size)
            a.counts = outputs.float().to(self._device)
            a.seen = torch.bincount(history, minlength=self._vocab_size).bool().to(self._device)
        return a

    def is_plain(self, rows: np.ndarray) -> bool:
        """`draw` alone will do for these rows."""
        return bool(self._is_plain.take(rows).all())

    def __call__(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        seq_lens: np.ndarray,
        params: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks | None = None,
    ) -> tuple[torch.Tensor, RowLogprobs | None]:
        """logits [n, V] of `rows` [n] -> sampled tokens int32 [n], and the logprobs asked for.

        params int32 [NUM_PARAMS, n] and positions int32 [n], of the new tokens, are on the device;
        seq_lens [n], the tokens before the new one, on the host. May change the logits.
        """
        asked = np.flatnonzero(self._top_logprobs[rows] >= 0)
        raw = logits[torch.from_numpy(asked).to(logits.device)].float() if len(asked) else None
        adjusted = np.flatnonzero(self._is_adjusted[rows])
        if len(adjusted):
            logits = logits.float()
        for i in adjusted:
            self._adjustments[int(rows[i])].apply(logits[i], int(seq_lens[i]))
        if masks is not None:
            masks.apply(logits)
        if self._is_random[rows].any():
            tokens = _sample(logits, params, positions)
        else:
            tokens = greedy(logits)
        for i in adjusted:
            self._adjustments[int(rows[i])].count(tokens[i : i + 1])
        if raw is None:
            return tokens, None
        return tokens, RowLogprobs.of(raw, tokens, rows, asked, self._top_logprobs[rows[asked]])


@dataclass
class Masks:
    """What grammars allow some rows."""

    of: torch.Tensor  # int32 [m] indices of rows of the logits
    words: torch.Tensor  # int32 [m, ceil(V / 32)] a bit a token

    def apply(self, logits: torch.Tensor) -> None:
        """logits [n, V]: what is not allowed becomes -inf."""
        of = self.of.long()
        bits = torch.arange(32, dtype=torch.int32, device=self.words.device)
        allowed = (self.words[:, :, None] >> bits & 1).view(len(of), -1)[:, : logits.shape[1]]
        logits[of] = logits[of].masked_fill(allowed == 0, -float("inf"))


def draw(
    logits: torch.Tensor, head: OutputHead, params: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Samples by the rows' parameters alone; fit for a CUDA graph. int32 [n].

    logits [n, ...] are this rank's. Where there are others, a token does not see top-k, top-p and
    min-p: those want all logits in one place.
    """
    if head.tp.size == 1:
        return _sample(logits, params, positions)
    keys = best_keys(logits, head.start, params[0].view(torch.float32), params[4], positions)
    return tokens_of(head.tp.all_reduce(keys, largest=True), head.vocab_size)


def _sample(logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    temperature, top_p, min_p = params[:3].view(torch.float32)
    return sample(logits, temperature, params[3], top_p, min_p, params[4], positions)


@dataclass
class RowLogprobs:
    """Of k rows, on the device or, after `to_host`, in host memory."""

    rows: np.ndarray  # [k]
    num_top: np.ndarray  # [k]
    chosen: torch.Tensor  # float32 [k]
    top: torch.Tensor  # float32 [k, max num_top]
    top_ids: torch.Tensor  # int64 [k, max num_top]

    @classmethod
    def of(
        cls,
        raw: torch.Tensor,
        tokens: torch.Tensor,
        rows: np.ndarray,
        asked: np.ndarray,
        num_top: np.ndarray,
    ) -> RowLogprobs:
        """raw float32 [k, V]: the model's own logits, before penalties and temperature."""
        logprobs = raw.log_softmax(-1)
        picked = tokens[torch.from_numpy(asked).to(tokens.device)].long()
        top, top_ids = logprobs.topk(int(num_top.max()), dim=-1)
        chosen = logprobs.gather(1, picked[:, None])[:, 0]
        return cls(rows[asked], num_top, chosen, top, top_ids)

    def messages(self) -> list[Logprobs]:
        """Once the tensors are on the host."""
        return [
            Logprobs(int(row), chosen, ids[:k], top[:k])
            for row, k, chosen, ids, top in zip(
                self.rows,
                self.num_top,
                self.chosen.tolist(),
                self.top_ids.tolist(),
                self.top.tolist(),
                strict=True,
            )
        ]
