"""The decoder of Llama 2 and 3, Mistral, Qwen2 and Qwen3: they differ in a few flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.layers.attention import Attention
from sglang.layers.embedding import OutputHead, VocabParallelEmbedding
from sglang.layers.linear import GateUpLinear, RowParallelLinear
from sglang.layers.norm import RMSNorm
from sglang.layers.rope import cos_sin_table
from sglang.models.cpu_decoder import CPUDecoder
from sglang.quantization import create_quantization
from sglang.quantization.base import Quantization

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.models.checkpoint import Checkpoint
    from sglang.worker.batch import Batch
    from sglang.worker.parallel import TensorParallel


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        where = (quantization, tp, dtype, device)
        self.gate_up_proj = GateUpLinear(name, hidden, inner, *where, bias=config.mlp_bias)
        self.down_proj = RowParallelLinear(
            f"{name}.down_proj", inner, hidden, *where, bias=config.mlp_bias
        )
        self.gate_up_proj.readers.append(self.down_proj)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x, residual [T, H] -> summands of x + residual + the MLP of norm(x + residual)."""
        x, residual = self.gate_up_proj.normed(x, residual, norm, gated=True)
        return self.down_proj.added(x, residual)


class DecoderLayer(nn.Module):
    def __init__(
        self,
        layer: int,
        config: ModelConfig,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        norm = (config.hidden_size, config.rms_norm_eps, dtype, device)
        where = (quantization, tp, dtype, device)
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", *norm)
        self.self_attn = Attention(f"{name}.self_attn", layer, config, *where)
        self.post_attention_layernorm = RMSNorm(f"{name}.post_attention_layernorm", *norm)
        self.mlp = MLP(f"{name}.mlp", config, *where)

    def move_norms(self) -> None:
        """What can be of the norms goes into the layers that read them. After loading."""
        self.self_attn.qkv_proj.take_norm(self.input_layernorm)
        self.mlp.gate_up_proj.take_norm(self.post_attention_layernorm)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's input is x + residual, [T, H]; so is what it returns. No residual is zero.
        The last layer returns what it makes of tokens batch.last only, if they are given."""
        norm = self.input_layernorm
        x, residual = self.self_attn(x, residual, norm, positions, cos_sin, batch)
        return self.mlp(x, residual, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Safe to capture in a CUDA graph: nothing here waits for the device, and every shape follows
    from the number of tokens."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, device: torch.device) -> None:
        super().__init__()
        dtype = getattr(torch, config.dtype)
        vocab, hidden = config.vocab_size, config.hidden_size
        quantization = create_quantization(config)
        self.config = config
        self.device = device
        self.num_layers = config.num_layers
        self.num_kv_heads_per_rank = max(1, config.num_kv_heads // tp.size)
        self.head_dim = config.head_dim

        self.embed_tokens = VocabParallelEmbedding(
            "model.embed_tokens", vocab, hidden, tp, dtype, device
        )
        self.layers = nn.ModuleList(
            DecoderLayer(i, config, quantization, tp, dtype, device)
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm("model.norm", hidden, config.rms_norm_eps, dtype, device)
        tied = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = OutputHead("lm_head", vocab, hidden, quantization, tp, dtype, device, tied)
        self.cos_sin: torch.Tensor | None = None  # [context_len, head_dim]
        self.few_tokens: CPUDecoder | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        """Every layer takes its own tensors, this rank's share of them."""
        for module in self.modules():
            if module is not self and hasattr(module, "load"):
                module.load(checkpoint)
        for layer in self.layers:
            layer.move_norms()
        self.few_tokens = CPUDecoder.of(self)
        config, factors = self.config, None
        if checkpoint.has("rope_freqs.weight"):
            factors = torch.empty(config.head_dim // 2)
            checkpoint.load(factors, "rope_freqs.weight")
        self.cos_sin = cos_sin_table(
            config.head_dim, config.context_len, config.rope_theta, config.rope_scaling,
            self.device, factors,
        )  # fmt: skip

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """int32 [T], int32 [T] -> hidden states [T, H] after the final norm, or [n, H] of tokens
        batch.last if these are given: K and V are all that the last layer makes of the others."""
        x, residual = self.embed_tokens(input_ids), None
        if self.few_tokens is not None and self.few_tokens.takes(batch):
            x, residual = self.few_tokens.run(x, positions, self.cos_sin, batch)
        else:
            for layer in self.layers:
                x, residual = layer(x, residual, positions, self.cos_sin, batch)
        return self.norm(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, vocab_size], in the model's dtype, the same on all ranks."""
        return self.lm_head.gather(self.lm_head(hidden))
