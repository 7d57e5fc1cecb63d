"""Attention backends, by name."""

from __future__ import annotations

import torch

from sglang.attention.base import AttentionBackend


def create_attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """name: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch_native".

    Raises ValueError if the name is unknown or the backend cannot run on the device.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch_native"
    if name == "triton":
        if device.type != "cuda":
            raise ValueError(f"the triton attention backend needs a GPU, not {device.type}")
        from sglang.attention.triton import TritonAttention

        return TritonAttention()
    if name == "torch_native":
        from sglang.attention.torch_native import TorchNativeAttention

        return TorchNativeAttention()
    raise ValueError(f"unknown attention backend {name!r}; known: auto, triton, torch_native")
