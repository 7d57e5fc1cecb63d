"""One forward step, as the model sees it: flat tokens, decode rows first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from sglang.attention.base import AttentionBackend
    from sglang.worker.kv_pool import KVPool


@dataclass
class Batch:
    """T tokens of n rows, on the model's device:

        tokens   | decode row 0 | ... | decode row d-1 | prefill row d: q_len tokens | ...
        index      0                    d-1              d + q_starts[0]

    Integers are int32. Everything a kernel needs is here: there is no global context.
    """

    num_decode: int
    """Rows 0..num_decode-1 have one token each; the tokens of the prefill rows follow."""
    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] where each token's K and V go; -1 (padding): nowhere
    rows: torch.Tensor  # [n]
    kv_lens: torch.Tensor  # [n] tokens that the row's last query sees, itself included; 0: padding
    slot_table: torch.Tensor  # [R+1, max_len] token position -> KV slot, by row
    q_starts: torch.Tensor  # [n - num_decode + 1] prefill rows' first tokens, after num_decode
    max_kv_len: int
    """An upper bound of kv_lens, known on the host."""
    max_q_len: int
    """An upper bound of a prefill row's new tokens, known on the host."""
    attention: AttentionBackend
    kv_cache: KVPool
    last: torch.Tensor | None = None
    """[n], the rows' last tokens, if the hidden states of no others are wanted."""
    decode_lens: torch.Tensor | None = None
    """[n], in a CUDA graph for any mixture of rows (num_decode is 0): kv_lens of the rows that
    decode, 0 of the others, while kv_lens is 0 of those that decode. Row i's token is token i."""
    q_lens_host: np.ndarray | None = None
    kv_lens_host: np.ndarray | None = None
    """Copies of the row lengths, [n], known without a sync; None while a graph is captured."""

    def of_last_tokens(self) -> Batch:
        """The rows as attention sees them in a step that decodes: `last` are its tokens, and their
        K and V have been written. What is used before attention is left out."""
        used = self.rows[:0]
        return replace(
            self,
            num_decode=len(self.rows),
            input_ids=used,
            positions=used,
            slots=used,
            kv_lens=self.kv_lens if self.decode_lens is None else self.kv_lens + self.decode_lens,
            q_starts=self.rows[:1],  # no prefill rows
            max_q_len=1,
            last=None,
            decode_lens=None,
            q_lens_host=None if self.q_lens_host is None else np.ones_like(self.q_lens_host),
        )
