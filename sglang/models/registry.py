"""Which architectures can be served. No torch at import: the launcher checks names here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sglang.model_config import ModelConfig
    from sglang.models.checkpoint import Checkpoint
    from sglang.worker.parallel import TensorParallel

# The name in config.json's "architectures" -> module:class, imported when the model is built.
_DECODER = "sglang.models.decoder:Decoder"
ARCHITECTURES = {
    "LlamaForCausalLM": _DECODER,
    "MistralForCausalLM": _DECODER,
    "Qwen2ForCausalLM": _DECODER,
    "Qwen3ForCausalLM": _DECODER,
}


def check_architecture(name: str) -> None:
    """Raises ValueError, listing what is served."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"the architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )


def build_model(
    config: ModelConfig, tp: TensorParallel, device: torch.device, checkpoint: Checkpoint
):
    """The model on `device` with this rank's weights loaded: an nn.Module in eval mode, without
    gradients. ValueError names a tensor that is missing, has the wrong shape, or is left over."""
    import torch

    check_architecture(config.architecture)
    module, name = ARCHITECTURES[config.architecture].split(":")
    model_class = getattr(importlib.import_module(module), name)
    with torch.no_grad():
        model = model_class(config, tp, device)
        model.load(checkpoint)
    checkpoint.assert_all_used()
    return model.eval().requires_grad_(False)
