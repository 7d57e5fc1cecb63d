"""Calibration: a checkpoint's weights, rounded so that what layers make of real text stays near.

The model runs once, in float32, over the text. A linear layer, when its turn comes, sees inputs
that layers rounded before it made; it scales or rounds its weights, and passes outputs on:

* Inputs are divided by s [K], and the columns of the weights multiplied by it; what makes the
  inputs takes the division: the norm before them, or the rows of up_proj before down_proj. For
  int8 weights and activations s is SmoothQuant's (Xiao et al., 2023), for 4-bit weights AWQ's (Lin
  et al., 2023).
* 4-bit weights are then rounded by GPTQ (Frantar et al., 2022), whichever their format: the error
  of each column is made up for by the columns after it, which are not rounded yet.

In all that concerns 4 bits, tokens count alike, whatever their size: a few are a thousand times as
large as the others, and would be all that weights were fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sglang.attention.torch_native import TorchNativeAttention
from sglang.layers.linear import GateUpLinear, Linear
from sglang.layers.norm import RMSNorm
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.models.decoder import Decoder
from sglang.quantization.base import LinearMethod
from sglang.quantization.unquantized import Unquantized
from sglang.worker.batch import Batch
from sglang.worker.kv_pool import KVPool
from sglang.worker.parallel import TensorParallel

TEXT = Path(__file__).with_name("calibration.txt")
"""Prose, code, chat and tables, some of each. Benchmarks score another text."""
SMOOTH_ALPHA = 0.6
"""How much of the activations' range SmoothQuant moves into the weights."""
AWQ_ALPHA = 0.4
"""How much of an input's size AWQ moves into the weights: one value for all layers, no search."""
DAMPENING = 0.01
"""Added to the diagonal of GPTQ's Hessian, as a share of its mean."""
ROW = 256
"""Tokens that see each other."""
MIN_TOKENS = 1024
"""With fewer, weights would be fitted to the text: they are rounded plainly."""


@dataclass
class Int4:
    """W[n, k] is near (q[n, k] - zeros[g, n]) scales[g, n], g being the group of input k."""

    q: torch.Tensor
    """int32 [N, K], 0..15."""
    scales: torch.Tensor
    """float32 [groups, N], each a float16 number."""
    zeros: torch.Tensor
    """int32 [groups, N], 0..15."""

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        size = self.q.shape[1] // len(self.scales)
        zeros, scales = (x.t().repeat_interleave(size, 1) for x in (self.zeros, self.scales))
        return (self.q - zeros) * scales

    def divide_outputs(self, rows: slice, by: torch.Tensor) -> None:
        self.scales[:, rows] = (self.scales[:, rows] / by).half().float()

    def split(self, sizes: list[int]) -> list[Int4]:
        """By outputs."""
        parts = (self.q.split(sizes), self.scales.split(sizes, 1), self.zeros.split(sizes, 1))
        return list(map(Int4, *parts))


def int4_grid(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., a group's inputs] -> (scales, zeros) [...], whole numbers the latter, of the 16
    numbers (q - zero) scale that span it and 0."""
    low, high = group.amin(-1).clamp_max(0.0), group.amax(-1).clamp_min(0.0)
    scales = ((high - low) / 15).half().float().clamp_min(1e-7)
    return scales, (-low / scales).round().clamp(0, 15)


def round_to_int4(weight: torch.Tensor, group_size: int) -> Int4:
    """float32 [N, K], each weight to the nearest number."""
    groups = weight.unflatten(1, (-1, group_size))  # [N, groups, group_size]
    scales, zeros = int4_grid(groups)
    q = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    return Int4(q.flatten(1).int(), scales.t(), zeros.t().int())


def gptq(weight: torch.Tensor, x: torch.Tensor, group_size: int) -> Int4:
    """float32 [N, K] and inputs [T, K], for whose outputs it is rounded; columns in their order."""
    x = same_size(x)
    hessian = x.t() @ x
    hessian.diagonal().add_(DAMPENING * hessian.diagonal().mean() + 1e-6)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    feedback = torch.linalg.cholesky(inverse, upper=True)  # [K, K]
    left = weight.t().contiguous()  # [K, N]: what is left to round, with the errors so far
    q, scales, zeros = torch.empty_like(left), [], []
    for start in range(0, len(left), group_size):
        end = start + group_size
        scale, zero = int4_grid(left[start:end].t())  # [N]
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty_like(left[start:end])
        for k in range(start, end):
            q[k] = ((left[k] / scale).round() + zero).clamp(0, 15)
            errors[k - start] = (left[k] - (q[k] - zero) * scale) / feedback[k, k]
            left[k + 1 : end].addr_(feedback[k, k + 1 : end], errors[k - start], alpha=-1)
        left[end:].addmm_(feedback[start:end, end:].t(), errors, alpha=-1)
    return Int4(q.t().int(), torch.stack(scales), torch.stack(zeros).int())


def same_size(x: torch.Tensor) -> torch.Tensor:
    """Tokens [T, K], each divided by its root mean square."""
    return x * x.pow(2).mean(1, keepdim=True).clamp_min(1e-12).rsqrt()


def smoothquant_scales(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Inputs [T, K], weight [N, K] -> s [K] = max|x|^alpha / max|W|^(1 - alpha)."""
    s = x.abs().amax(0).clamp_min(1e-5) ** SMOOTH_ALPHA
    s /= weight.abs().amax(0).clamp_min(1e-5) ** (1 - SMOOTH_ALPHA)
    return s / (s.max() * s.min()).sqrt()


def awq_scales(x: torch.Tensor) -> torch.Tensor:
    """Inputs [T, K] -> s [K] = (root mean square of x)^alpha."""
    s = same_size(x).pow(2).mean(0).sqrt().clamp_min(1e-4) ** AWQ_ALPHA
    return s / (s.max() * s.min()).sqrt()


class Calibrated(LinearMethod):
    """Floating point, [N, K], until the layer is run for the first and only time: then it adapts
    its weights to the inputs."""

    def __init__(self, group_size: int, progress: tqdm) -> None:
        """group_size: of 4-bit weights; 0: weights and activations will be int8."""
        self.group_size = group_size
        self.progress = progress
        self.last: Linear | None = None  # the layer that was run before

    tensors = Unquantized.tensors

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.last, GateUpLinear):  # then this is down_proj
            s = self._scales(x, layer.weight)
            up = slice(len(s), None)
            if self.group_size:
                self.last.int4.divide_outputs(up, s)
            self.last.weight[up] /= s[:, None]
            if self.last.bias is not None:
                self.last.bias[up] /= s
            layer.weight *= s
            x = x / s
        if self.group_size:
            layer.int4 = gptq(layer.weight, x, self.group_size)
            layer.weight.copy_(layer.int4.weight())
        self.last = layer
        self.progress.update()
        return F.linear(x, layer.weight, bias)

    def apply_normed(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        s = self._scales(norm(x, residual)[0], layer.weight)
        norm.weight /= s
        layer.weight *= s
        return super().apply_normed(layer, x, bias, norm, residual, gated)

    def _scales(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return awq_scales(x) if self.group_size else smoothquant_scales(x, weight)


@torch.no_grad()
def calibrate(
    config: ModelConfig, ids: Sequence[int], group_size: int
) -> tuple[dict[str, torch.Tensor], dict[str, Int4]]:
    """config: of a model in float32 on the CPU. group_size: of 4-bit weights, or 0 for int8.

    Returns tensors of the checkpoint that take the place of its own, by name; and layers in 4 bits,
    by name without ".weight".
    """
    cpu = torch.device("cpu")
    model = Decoder(config, TensorParallel(), cpu)
    layers = [module for module in model.layers.modules() if isinstance(module, Linear)]
    with tqdm(total=len(layers), desc="Calibrating", unit="layer") as progress:
        method = Calibrated(group_size, progress)
        for layer in layers:
            layer.method = method
        model.load(open_checkpoint(config))
        model(*_batch(config, ids))

    tensors: dict[str, torch.Tensor] = {}
    rounded: dict[str, Int4] = {}
    for layer in layers:
        sizes = [part.out_features for part in layer.parts]
        names = [part.name for part in layer.parts]
        if layer.bias is not None:
            names_of_bias = [f"{name}.bias" for name in names]
            tensors |= zip(names_of_bias, layer.bias.split(sizes), strict=True)
        if group_size:
            rounded |= zip(names, layer.int4.split(sizes), strict=True)
        else:
            names = [f"{name}.weight" for name in names]
            tensors |= zip(names, layer.weight.split(sizes), strict=True)
    norms = [module for module in model.layers.modules() if isinstance(module, RMSNorm)]
    return tensors | {f"{norm.name}.weight": norm.weight for norm in norms}, rounded


def _batch(
    config: ModelConfig, ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, Batch]:  # fmt: skip
    """A prefill of rows of ROW tokens, the arguments of Decoder.forward."""
    row_len = min(ROW, config.context_len, len(ids))
    num_rows = len(ids) // row_len
    slots = torch.arange(num_rows * row_len, dtype=torch.int32)
    lens = np.full(num_rows, row_len, np.int32)
    attention = TorchNativeAttention()
    batch = Batch(
        num_decode=0,
        input_ids=torch.tensor(ids[: len(slots)], dtype=torch.int32),
        positions=slots % row_len,
        slots=slots,
        rows=torch.arange(num_rows, dtype=torch.int32),
        kv_lens=torch.from_numpy(lens),
        slot_table=slots.view(num_rows, row_len),
        q_starts=torch.arange(0, len(slots) + 1, row_len, dtype=torch.int32),
        max_kv_len=row_len,
        max_q_len=row_len,
        attention=attention,
        kv_cache=KVPool(
            len(slots), config.num_layers, config.num_kv_heads, config.head_dim, torch.float32,
            torch.device("cpu"),
        ),
        q_lens_host=lens,
        kv_lens_host=lens,
    )  # fmt: skip
    attention.begin(batch)
    return batch.input_ids, batch.positions, batch
