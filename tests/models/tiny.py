"""Tiny models: made by transformers, saved in every format, run by us."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from sglang.attention.torch_native import TorchNativeAttention
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.models.registry import build_model
from sglang.server_args import ServerArgs
from sglang.worker.batch import Batch
from sglang.worker.kv_pool import KVPool
from sglang.worker.parallel import TensorParallel

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}


def make(family: str, **changes) -> transformers.PreTrainedModel:
    """A random float32 model of the family ("Llama", "Mistral", "Qwen2", "Qwen3"), in which biases
    and norms are random too."""
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def load(path: Path | str, **flags) -> tuple[torch.nn.Module, ModelConfig]:
    config = ModelConfig.load(ServerArgs(model_path=str(path), device="cpu", **flags))
    return build_model(config, TensorParallel(), CPU, open_checkpoint(config)), config


class Session:
    """Rows of tokens in a KV pool whose slots are handed out in random order."""

    def __init__(self, model: torch.nn.Module, num_rows: int = 4, num_slots: int = 512) -> None:
        self.model = model
        self.attention = TorchNativeAttention()
        self.pool = KVPool(
            num_slots, model.num_layers, model.num_kv_heads_per_rank, model.head_dim,
            getattr(torch, model.config.dtype), CPU,
        )  # fmt: skip
        self.free = torch.randperm(num_slots, dtype=torch.int32)
        self.table = torch.zeros(num_rows + 1, 256, dtype=torch.int32)
        self.lens = [0] * num_rows

    @torch.inference_mode()
    def step(
        self, new: dict[int, list[int]], num_decode: int = 0, of_last: bool = False
    ) -> list[torch.Tensor]:
        """Row -> its new tokens, decode rows first. Returns each row's logits, [tokens, V], or
        [1, V] of its last token."""
        q_lens = [len(tokens) for tokens in new.values()]
        positions: list[int] = []
        for row, tokens in new.items():
            start, end = self.lens[row], self.lens[row] + len(tokens)
            self.table[row, start:end], self.free = self.free.split(
                [len(tokens), len(self.free) - len(tokens)]
            )
            positions += range(start, end)
            self.lens[row] = end
        rows = [row for row, tokens in new.items() for _ in tokens]
        kv_lens = [self.lens[row] for row in new]
        starts = np.cumsum([0, *q_lens[num_decode:]])
        batch = Batch(
            num_decode=num_decode,
            input_ids=_int32([token for tokens in new.values() for token in tokens]),
            positions=_int32(positions),
            slots=self.table[rows, positions],
            rows=_int32(list(new)),
            kv_lens=_int32(kv_lens),
            slot_table=self.table,
            q_starts=_int32(starts),
            max_kv_len=max(kv_lens),
            attention=self.attention,
            kv_cache=self.pool,
            max_q_len=max(q_lens),
            last=_int32(np.cumsum(q_lens) - 1) if of_last else None,
            q_lens_host=np.array(q_lens),
            kv_lens_host=np.array(kv_lens),
        )
        self.attention.begin(batch)
        hidden = self.model(batch.input_ids, batch.positions, batch)
        logits = self.model.logits(hidden).float()
        return list(logits.split([1] * len(q_lens) if of_last else q_lens))


def our_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[len(ids), V], by a prefill in two chunks and a decode, beside other rows."""
    session, cut, last = Session(model), len(ids) // 3, len(ids) - 3
    first = session.step({0: ids[:cut], 1: ids[:5]})[0]
    middle = session.step({1: ids[5:6], 0: ids[cut:last]}, num_decode=1)[1]
    decoded = [session.step({0: [id], 1: ids[i : i + 1]}, 2)[0] for i, id in enumerate(ids[last:])]
    return torch.cat([first, middle, *decoded])


@torch.inference_mode()
def assert_same_logits(
    ours: torch.nn.Module, theirs: transformers.PreTrainedModel, of_16_bits: bool = False
) -> None:
    """of_16_bits: products are of inputs of 16 bits, as where weights stay quantized on a CPU."""
    ids = torch.randint(ours.config.vocab_size, (60,), generator=torch.manual_seed(1))
    logits, wanted = our_logits(ours, ids.tolist()), theirs(ids[None]).logits[0]
    if of_16_bits:
        assert (logits - wanted).norm() < 1e-3 * wanted.norm()
    else:
        # Of the largest: processors add up in different orders.
        atol = 3e-5 * float(wanted.abs().max())
        torch.testing.assert_close(logits, wanted, atol=atol, rtol=1e-4)


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _int32(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32)
