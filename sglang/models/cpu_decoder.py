"""All layers of a decoder in one call into C++, where a few rows decode on a CPU: what Python and
torch take between two of kernels/cpu.py's is as long as a kernel."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from sglang.kernels import cpu

if TYPE_CHECKING:
    from sglang.layers.linear import Linear
    from sglang.models.decoder import Decoder
    from sglang.worker.batch import Batch
    from sglang.worker.kv_pool import KVPool


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "k_cache", "v_cache")),
        ("window", ctypes.c_int64),
    ]


class CPUDecoder:
    """Of float32 activations and int4 weights, without biases, on one rank."""

    @classmethod
    def of(cls, model: Decoder) -> CPUDecoder | None:
        """None: it has something that is not in the kernel."""
        attention = model.layers[0].self_attn
        fits = (
            model.device.type == "cpu"
            and model.config.dtype == "float32"
            and attention.q_norm is None
            and model.head_dim % (4 * cpu.LANES) == 0
            and all(_is_int4(linear) for layer in model.layers for linear in _linears(layer))
        )
        return cls(model) if fits else None

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._cache: KVPool | None = None
        self._layers: ctypes.Array[_Layer] | None = None
        """Where things are; K and V in `_cache`."""

    def takes(self, batch: Batch) -> bool:
        return batch.num_decode == len(batch.rows) <= cpu.FEW_TOKENS

    def run(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As DecoderLayer.forward, of all layers. x is overwritten."""
        config, attention = self._model.config, self._model.layers[0].self_attn
        if self._cache is not batch.kv_cache:
            self._cache = batch.kv_cache
            caches = zip(self._cache.k, self._cache.v, strict=True)
            layers = [_layer(*pair) for pair in zip(self._model.layers, caches, strict=True)]
            self._layers = (_Layer * len(layers))(*layers)
        added = torch.empty_like(x)
        cpu.library().decoder_layers(
            x.data_ptr(), added.data_ptr(), self._layers, positions.data_ptr(),
            batch.slots.data_ptr(), cos_sin.data_ptr(), batch.slot_table.data_ptr(),
            batch.rows.data_ptr(), batch.kv_lens.data_ptr(),
            config.num_layers, len(x), config.hidden_size, config.intermediate_size,
            attention.num_heads, attention.num_kv_heads, config.head_dim,
            batch.slot_table.stride(0), config.rms_norm_eps, attention.scale,
        )  # fmt: skip
        return added, x


def _linears(layer) -> tuple[Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _is_int4(linear: Linear) -> bool:
    blocks = getattr(linear, "blocks", None)
    is_int4 = blocks is not None and blocks.bits == 4
    return is_int4 and linear.bias is None and linear.parts[0].shard.size == 1


def _layer(layer, caches: tuple[torch.Tensor, torch.Tensor]) -> _Layer:
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    tensors = [linear.blocks.data for linear in _linears(layer)] + [*norms, *caches]
    return _Layer(*(x.data_ptr() for x in tensors), layer.self_attn.window)
