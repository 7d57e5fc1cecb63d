"""The angles of rotary position embedding (Su et al., 2021), and how long contexts stretch them."""

from __future__ import annotations

import math
from typing import Any

import torch


def cos_sin_table(
    head_dim: int,
    num_positions: int,
    theta: float,
    scaling: dict[str, Any] | None,
    device: torch.device,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [num_positions, head_dim]: of position p, cos(p f_i) for i < head_dim / 2, then
    sin(p f_i), where f_i are the frequencies of the pairs.

    scaling: as in config.json, "rope_type" one of linear, llama3, yarn. factors [head_dim / 2]:
    what GGUF files divide the frequencies by instead.
    Raises ValueError for another type, or where the scaling lacks a parameter.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents  # [head_dim / 2]
    magnitude = 1.0
    kind = scaling["rope_type"] if scaling else "default"
    try:
        if kind == "linear":
            frequencies = frequencies / scaling["factor"]
        elif kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
        elif kind == "yarn":
            frequencies, magnitude = _yarn(frequencies, theta, scaling)
        elif kind != "default":
            raise ValueError(f"RoPE scaling of type {kind} is not supported")
    except KeyError as error:
        raise ValueError(f"RoPE scaling of type {kind} has no {error}") from None
    if factors is not None:
        frequencies = frequencies / factors.cpu()
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(magnitude).to(device)


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, quick ones kept, and those in between
    interpolated."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * frequencies / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling["factor"])


def _yarn(
    frequencies: torch.Tensor, theta: float, scaling: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023): the same idea, interpolated over the index of the pair, and
    attention made sharper by a factor on q and k."""
    factor = scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    head_dim = 2 * len(frequencies)

    def index_of_turns(turns: float) -> float:
        """Of the pair that turns so often over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = index_of_turns(scaling.get("beta_fast") or 32)
    high = index_of_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(len(frequencies), dtype=torch.float32)
    divided = ((index - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    frequencies = frequencies * (1.0 - divided + divided / factor)

    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        magnitude = _sharpness(factor, 1.0)
        if mscale and all_dim:
            magnitude = _sharpness(factor, mscale) / _sharpness(factor, all_dim)
    return frequencies, magnitude


def _sharpness(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
