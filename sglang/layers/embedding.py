"""Token embedding and output head, split over the ranks by vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from sglang.layers.linear import Linear, Part
from sglang.layers.shard import Shard
from sglang.quantization.base import Quantization

if TYPE_CHECKING:
    from sglang.models.checkpoint import Checkpoint
    from sglang.worker.parallel import TensorParallel


class VocabParallelEmbedding(nn.Module):
    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.name = name
        self.tp = tp
        self.shard = Shard(tp.rank, tp.size)
        self.start, self.stop = self.shard.bounds(vocab_size)
        rows = self.shard.length(vocab_size)
        # Before and after this rank's tokens a row of zeros, for the tokens of the others.
        self._table = torch.zeros(rows + 2, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(self._table[1:-1], requires_grad=False)

    def load(self, checkpoint: Checkpoint) -> None:
        rows = self.weight[: self.stop - self.start]
        checkpoint.load(rows, f"{self.name}.weight", 0, self.shard)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int32 [T] -> [T, H]."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = (input_ids - (self.start - 1)).clamp_(0, len(self._table) - 1)
        return self.tp.all_reduce(F.embedding(rows, self._table))


class OutputHead(Linear):
    """hidden [n, H] -> this rank's logits [n, stop - start], of the tokens start..stop-1."""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        """tied: the embedding whose weights these are."""
        part = Part(name, vocab_size, Shard(tp.rank, tp.size), padded=True)
        method = quantization.tied_head() if tied else quantization.linear(name)
        super().__init__([part], hidden_size, method, dtype, device)
        self.tp = tp
        self.vocab_size = vocab_size
        self.start, self.stop = part.shard.bounds(vocab_size)
        self._tied = [tied] if tied else []  # in a list: no submodule of this one

    def load(self, checkpoint: Checkpoint) -> None:
        if not self._tied:
            return super().load(checkpoint)
        checkpoint.ignore(f"{self.parts[0].name}.weight")  # some store it in spite of the tie
        self.weight = self._tied[0].weight
        self.method.finish(self)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().forward(hidden)
        # Beyond its end: what the last rank's share was padded with.
        return logits[:, : self.stop - self.start]

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Of all ranks: [n, vocab_size]."""
        padding = self.parts[0].shard.length(self.vocab_size) - logits.shape[1]
        if padding:
            logits = F.pad(logits, (0, padding))
        return self.tp.all_gather(logits)[:, : self.vocab_size]
