"""Ways to store weights, by the name that config.json gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.quantization.base import Quantization

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig


def create_quantization(config: ModelConfig) -> Quantization:
    """Raises ValueError for a kind that is not supported."""
    if config.quantization_config is None:
        from sglang.quantization.unquantized import Unquantized

        return Unquantized()
    kind = config.quantization_config.get("quant_method")
    raise ValueError(f"weights quantized by {kind} are not supported yet")
