"""What a model asks of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.worker.batch import Batch
    from sglang.worker.parallel import TensorParallel


@dataclass(frozen=True)
class AttentionShape:
    """What is the same in every step, of this rank's share of the model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    windows: frozenset[int]
    """Those of all layers; 0: none."""
    max_rows: int
    max_len: int
    """Tokens of a row at most."""

    @classmethod
    def of(
        cls, config: ModelConfig, tp: TensorParallel, kv_dtype: torch.dtype, max_rows: int
    ) -> AttentionShape:
        return cls(
            num_heads=config.num_heads // tp.size,
            num_kv_heads=max(1, config.num_kv_heads // tp.size),
            head_dim=config.head_dim,
            dtype=getattr(torch, config.dtype),
            kv_dtype=kv_dtype,
            windows=frozenset(map(config.window_of_layer, range(config.num_layers))),
            max_rows=max_rows,
            max_len=config.context_len,
        )


class AttentionBackend(ABC):
    captures_prefill = True
    """Whether CUDA graphs of steps with prefill can be captured. Those of decode steps can."""

    def plan_decode(self, kv_lens: np.ndarray, size: int) -> None:  # noqa: B027
        """Before a CUDA graph of `size` decode rows is captured, and before each of its replays:
        for what the host must make of the rows' lengths, int32 [n]. Rows n... are padding."""

    def begin(self, batch: Batch) -> None:  # noqa: B027
        """Once a step, before its first layer, and again if the last layer goes on with other
        queries: what layers share is prepared here. In a CUDA graph, what it launches is captured.
        """

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        """q [T, Hq, D] and the same tokens' k, v [T, Hkv, D], with their heads contiguous, and one
        layer's caches [S, Hkv, D], where k and v have been put already -> [T, Hq D], in q's dtype.
        Of decode rows, k and v are read there only.

        A token sees the tokens of its row up to itself, the last `window` of them if window is not
        0. Rows of padding give anything.
        """
