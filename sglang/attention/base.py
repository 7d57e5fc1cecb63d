"""What a model asks of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.worker.batch import Batch


class AttentionBackend(ABC):
    def begin(self, batch: Batch) -> None:  # noqa: B027
        """Once a step, before its first layer: what all layers share is prepared here."""

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        """q [T, Hq, D], one layer's caches [S, Hkv, D] -> [T, Hq D], in q's dtype.

        The new tokens' K and V are in the caches. A token sees the tokens of its row up to itself,
        the last `window` of them if window is not 0. Rows of padding give anything finite.
        """
