"""Attention backends, by name."""

from __future__ import annotations

import torch

from sglang.attention.base import AttentionBackend, AttentionShape


def create_attention_backend(
    name: str, device: torch.device, shape: AttentionShape
) -> AttentionBackend:
    """name: "auto" (Triton on a GPU, torch on a CPU), "triton", "flashinfer" or "torch_native".

    Raises ValueError if the name is unknown, or if the backend cannot run on the device, with this
    shape, or with what is installed.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch_native"
    if name in ("triton", "flashinfer") and device.type != "cuda":
        raise ValueError(f"the {name} attention backend needs a GPU, not {device.type}")
    if name == "triton":
        from sglang.attention.triton import TritonAttention

        return TritonAttention()
    if name == "flashinfer":
        from sglang.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(shape, device)
    if name == "torch_native":
        from sglang.attention.torch_native import TorchNativeAttention

        return TorchNativeAttention()
    known = "auto, triton, flashinfer, torch_native"
    raise ValueError(f"unknown attention backend {name!r}; known: {known}")
