"""Ways to store weights, by the name that config.json or --quantization gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.quantization.base import Quantization


def create_quantization(config: ModelConfig) -> Quantization:
    """Raises ValueError for a kind that is not supported."""
    from sglang.quantization.unquantized import Unquantized

    if config.quantization_config is not None:
        from sglang.quantization.checkpoints import QuantizedCheckpoint
        from sglang.quantization.schemes import parse_scheme

        return QuantizedCheckpoint(parse_scheme(config.quantization_config))
    if config.quantization == "gguf":
        from sglang.quantization.gguf import GGUFQuantization

        return GGUFQuantization()
    if config.quantization in ("fp8", "int8"):
        from sglang.quantization.w8a8 import QuantizedAtLoad

        return QuantizedAtLoad(config.quantization)
    return Unquantized()
