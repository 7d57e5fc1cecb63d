"""A GGUF file as a checkpoint: names are translated, blocks become numbers as they are loaded."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sglang.layers.shard import WHOLE, Shard
from sglang.models.checkpoint import Checkpoint
from sglang.models.gguf import GGUFFile, dequantize, int4_blocks

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": "rope_freqs.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK_WEIGHTS = 1 << 20  # turned into float32 at a time, by a thread


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; a name that is not known
    stays as it is, to be reported as left over."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return _TOP.get(name, name)


class GGUFCheckpoint(Checkpoint):
    def __init__(self, path: str, show_progress: bool) -> None:
        self._file = GGUFFile(path)
        self._stored = {hf_name(name): name for name in self._file.tensors}
        architecture = self._file.metadata["general.architecture"]
        heads = self._file.metadata[f"{architecture}.attention.head_count"]
        kv_heads = self._file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
        # In files of the architecture "llama" the rows of q and k are permuted within heads.
        self._heads = {"q_proj": heads, "k_proj": kv_heads} if architecture == "llama" else {}
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "dequantize")
        super().__init__(self._stored, show_progress)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored[name]].shape

    def int4(
        self, name: str, dim: int | None = None, shard: Shard = WHOLE
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(q uint8 [N, K], scales float32 [N, K / 32], low [N, K / 32]) of a Q4_0 or Q4_1 matrix,
        or this rank's share of it: weights are q scale + low. None: it is of another type, or its
        blocks cannot be split so."""
        tensor = self._file.tensors[self._stored[name]]
        if tensor.type not in ("Q4_0", "Q4_1"):
            return None
        rows = columns = slice(None)
        if dim == 0:
            rows = slice(*shard.bounds(tensor.shape[0]))
        elif dim == 1:
            columns = slice(*shard.bounds(tensor.shape[1]))
            if columns.start % 32 or columns.stop % 32:
                return None
        q, scales, low = int4_blocks(self._file.rows(tensor.name)[rows], tensor.type)
        head_dim = self._permuted_head_dim(name, tensor.shape[0])
        blocks = slice(*(end and end // 32 for end in (columns.start, columns.stop)))
        parts = []
        for part, index in ((q, columns), (scales, blocks), (low, blocks)):
            part = torch.from_numpy(np.ascontiguousarray(part[:, index]))
            parts.append(torch.empty_like(part))
            _copy_rows(parts[-1], part.numpy(), head_dim)
        return tuple(parts)

    def assert_all_used(self) -> None:
        self._pool.shutdown()
        super().assert_all_used()

    def _read(self, out: torch.Tensor, name: str, index: tuple[slice, ...]) -> None:
        tensor = self._file.tensors[self._stored[name]]
        head_dim = self._permuted_head_dim(name, tensor.shape[0])
        if len(index) == 1:
            weights = dequantize(self._file.rows(tensor.name), tensor.type)[0, index[0]]
            _copy_rows(out, weights, head_dim)
            return
        start, stop, _ = index[0].indices(tensor.shape[0])
        step = max(1, _CHUNK_WEIGHTS // tensor.shape[1])
        if head_dim:
            step = -(-step // head_dim) * head_dim  # whole heads

        def read(first: int) -> None:
            last = min(first + step, stop)
            weights = dequantize(self._file.rows(tensor.name, first, last), tensor.type)
            _copy_rows(out[first - start : last - start], weights[:, index[1]], head_dim)

        list(self._pool.map(read, range(start, stop, step)))

    def _permuted_head_dim(self, name: str, rows: int) -> int:
        """0: the rows are in order."""
        for projection, heads in self._heads.items():
            if f".{projection}." in name:
                return rows // heads
        return 0


def _copy_rows(out: torch.Tensor, weights: np.ndarray, head_dim: int) -> None:
    """Within a head, llama.cpp keeps row i of the first half beside row i of the second:

    stored   0  D/2  1  D/2+1 ...     wanted   0  1 ... D/2  D/2+1 ...
    """
    if head_dim:
        out = out.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
    if not weights.flags.writeable:  # a view of the file, which torch warns of
        weights = weights.copy()
    out.copy_(torch.from_numpy(weights).reshape(out.shape))
