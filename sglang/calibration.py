"""Calibration: a checkpoint's weights, rounded so that what layers make of real text stays near.

The model runs once, in float32, over the text. A linear layer, when its turn comes, sees inputs
that layers rounded before it made; it scales and rounds its weights, and passes outputs on:

* Inputs are divided by s [K], and the columns of the weights multiplied by it; what makes the
  inputs takes the division: the norm before them, or the rows of up_proj before down_proj. For
  8-bit weights and activations s is SmoothQuant's (Xiao et al., 2023), for 4-bit weights AWQ's (Lin
  et al., 2023). Where the checkpoint is rotated, norms make no outliers, and s is 1 behind them.
* Weights are then rounded by GPTQ (Frantar et al., 2022), whichever their format: the error of each
  column is made up for by the columns after it, which are not rounded yet. 4-bit numbers span what
  range of a group errs least.
* Activations, where the server will round them, are.

In all but SmoothQuant's scales, tokens count alike, whatever their size: a few are a thousand times
as large as the others, and would be all that weights were fitted to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sglang.attention.torch_native import TorchNativeAttention
from sglang.kernels.quant_tokens import nearest, quantize_tokens_naive
from sglang.layers.linear import GateUpLinear, Linear
from sglang.layers.norm import RMSNorm
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import Checkpoint
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
ROTATED_ALPHA = 0.3
"""The same in a rotated checkpoint, where only down_proj's inputs have outliers left."""
AWQ_ALPHA = 0.4
"""How much of an input's size AWQ moves into the weights: one value for all layers, no search."""
SHARES = (1.0, 0.9, 0.8, 0.7)
"""Of a group's range that 4-bit numbers may span, the widest first: it wins where all are equal."""
DAMPENING = 0.1
"""Added to the diagonal of GPTQ's Hessian, as a share of its mean."""
BLOCK = 64
"""Columns that GPTQ rounds before it touches those after them."""
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


@dataclass
class EightBit:
    """W[n, k] is near q[n, k] scales[n]."""

    q: torch.Tensor
    """int8 or float8_e4m3fn [N, K]."""
    scales: torch.Tensor
    """float32 [N]."""

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        return self.q.float() * self.scales[:, None]

    def divide_outputs(self, rows: slice, by: torch.Tensor) -> None:
        self.scales[rows] /= by

    def split(self, sizes: list[int]) -> list[EightBit]:
        """By outputs."""
        return list(map(EightBit, self.q.split(sizes), self.scales.split(sizes)))


Rounded = Int4 | EightBit


def int4_grid(group: torch.Tensor, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., a group's inputs] -> (scales, zeros) [...], whole numbers the latter, of the 16
    numbers (q - zero) scale that span it and 0, or `share` of that range."""
    low, high = share * group.amin(-1).clamp_max(0.0), share * group.amax(-1).clamp_min(0.0)
    scales = ((high - low) / 15).half().float().clamp_min(1e-7)
    return scales, (-low / scales).round().clamp(0, 15)


def clipped_int4_grid(
    groups: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, groups, a group's inputs] and how much the square of each input's error matters,
    [K] -> as int4_grid: for each group, of the SHARES of its range, the one with the least error.
    Numbers that lie closer are worth a few that are cut off (AWQ's clipping)."""
    grids = [int4_grid(groups, share) for share in SHARES]
    errors = []
    for grid in grids:
        error = _nearest_int4(groups.flatten(1), *grid).weight().sub_(groups.flatten(1))
        errors.append(error.pow_(2).mul_(importance).view_as(groups).sum(-1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    scales, zeros = (torch.stack(each).gather(0, best)[0] for each in zip(*grids, strict=True))
    return scales, zeros


def round_to_int4(weight: torch.Tensor, group_size: int) -> Int4:
    """float32 [N, K], each weight to the nearest number."""
    scales, zeros = int4_grid(weight.unflatten(1, (-1, group_size)))
    return _nearest_int4(weight, scales, zeros)


def _nearest_int4(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> Int4:
    """float32 [N, K], scales and zeros [N, groups]."""
    groups = weight.unflatten(1, (scales.shape[1], -1))
    q = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
    return Int4(q.flatten(1).int(), scales.t(), zeros.t().int())


def round_to_8_bits(weight: torch.Tensor, dtype: torch.dtype) -> EightBit:
    """float32 [N, K], each weight to the nearest number in `dtype`, int8 or float8_e4m3fn."""
    return EightBit(*quantize_tokens_naive(weight, dtype))


Nearest = Callable[[int, torch.Tensor], torch.Tensor]
"""(k, what column k of the weights is to be, float32 [N]) -> the nearest that it can be."""


def gptq(weight: torch.Tensor, x: torch.Tensor, nearest: Nearest) -> torch.Tensor:
    """float32 [N, K] and inputs [T, K], for whose outputs it is rounded -> [N, K]. Columns of the
    largest inputs come first (act-order, in its authors' code): most others are left to make up
    for their errors."""
    hessian = x.t() @ x
    order = hessian.diagonal().argsort(descending=True, stable=True)
    columns = order.tolist()
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(DAMPENING * hessian.diagonal().mean() + 1e-6)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    feedback = torch.linalg.cholesky(inverse, upper=True)  # [K, K]
    left = weight.t()[order]  # [K, N]: what is left to round, with the errors so far
    rounded = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        block = left[start : start + BLOCK]
        end = start + len(block)
        errors = torch.empty_like(block)
        for k in range(start, end):
            rounded[k] = nearest(columns[k], left[k])
            errors[k - start] = (left[k] - rounded[k]) / feedback[k, k]
            left[k + 1 : end].addr_(feedback[k, k + 1 : end], errors[k - start], alpha=-1)
        left[end:].addmm_(feedback[start:end, end:].t(), errors, alpha=-1)
    return rounded[order.argsort()].t()


def gptq_to_int4(weight: torch.Tensor, x: torch.Tensor, group_size: int) -> Int4:
    """Groups are of neighbours, whatever the order: their grids are made before it."""
    x = same_size(x)
    grid = clipped_int4_grid(weight.unflatten(1, (-1, group_size)), x.pow(2).sum(0))
    scales, zeros = (each.t().contiguous() for each in grid)  # [groups, N]

    def nearest(k: int, column: torch.Tensor) -> torch.Tensor:
        pair = (scales[k // group_size][:, None], zeros[k // group_size][:, None])
        return _nearest_int4(column[:, None], *pair).weight()[:, 0]

    return _nearest_int4(gptq(weight, x, nearest), *grid)


def gptq_to_8_bits(weight: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> EightBit:
    scales = round_to_8_bits(weight, dtype).scales

    def to_scales(weight: torch.Tensor) -> EightBit:
        return EightBit(nearest(weight, scales, dtype), scales)

    def nearest_column(k: int, column: torch.Tensor) -> torch.Tensor:
        return to_scales(column[:, None]).weight()[:, 0]

    return to_scales(gptq(weight, same_size(x), nearest_column))


def same_size(x: torch.Tensor) -> torch.Tensor:
    """Tokens [T, K], each divided by its root mean square."""
    return x * x.pow(2).mean(1, keepdim=True).clamp_min(1e-12).rsqrt()


def smoothquant_scales(x: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """Inputs [T, K], weight [N, K] -> s [K] = max|x|^alpha / max|W|^(1 - alpha)."""
    s = x.abs().amax(0).clamp_min(1e-5) ** alpha
    s /= weight.abs().amax(0).clamp_min(1e-5) ** (1 - alpha)
    return s / (s.max() * s.min()).sqrt()


def awq_scales(x: torch.Tensor) -> torch.Tensor:
    """Inputs [T, K] -> s [K] = (root mean square of x)^alpha."""
    s = same_size(x).pow(2).mean(0).sqrt().clamp_min(1e-4) ** AWQ_ALPHA
    return s / (s.max() * s.min()).sqrt()


class Format(ABC):
    """What becomes of a layer, of its inputs x [T, K] and its weight [N, K], float32."""

    @property
    def scales_norms(self) -> bool:
        """Whether inputs that come from a norm are divided too."""
        return True

    @abstractmethod
    def scales(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[K], by which inputs are to be divided."""

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        """What the server will make of them before they meet weights."""
        return x

    @abstractmethod
    def round(self, weight: torch.Tensor, x: torch.Tensor) -> Rounded: ...


@dataclass
class FourBits(Format):
    group_size: int

    def scales(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return awq_scales(x)

    def round(self, weight: torch.Tensor, x: torch.Tensor) -> Int4:
        return gptq_to_int4(weight, x, self.group_size)


@dataclass
class EightBits(Format):
    dtype: torch.dtype
    """Of weights and activations: int8 or float8_e4m3fn."""
    rotated: bool = False
    """Whether the checkpoint is (`sglang.rotation`)."""

    @property
    def scales_norms(self) -> bool:
        return not self.rotated

    def scales(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return smoothquant_scales(x, weight, ROTATED_ALPHA if self.rotated else SMOOTH_ALPHA)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        return round_to_8_bits(x, self.dtype).weight()

    def round(self, weight: torch.Tensor, x: torch.Tensor) -> EightBit:
        return gptq_to_8_bits(weight, x, self.dtype)


class Calibrated(LinearMethod):
    """Floating point, [N, K], until the layer is run for the first and only time: then it adapts
    its weights to the inputs."""

    def __init__(self, format: Format, progress: tqdm) -> None:
        self.format = format
        self.progress = progress
        self.last: Linear | None = None  # the layer that was run before

    tensors = Unquantized.tensors

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.last, GateUpLinear):  # then this is down_proj
            s = self.format.scales(x, layer.weight)
            up = slice(len(s), None)
            self.last.rounded.divide_outputs(up, s)
            if self.last.bias is not None:
                self.last.bias[up] /= s
            layer.weight *= s
            x = x / s
        x = self.format.inputs(x)
        layer.rounded = self.format.round(layer.weight, x)
        self.last = layer
        self.progress.update()
        return F.linear(x, layer.rounded.weight(), bias)

    def apply_normed(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.format.scales_norms:
            s = self.format.scales(norm(x, residual)[0], layer.weight)
            norm.weight /= s
            layer.weight *= s
        return super().apply_normed(layer, x, bias, norm, residual, gated)


@torch.no_grad()
def calibrate(
    config: ModelConfig, checkpoint: Checkpoint, ids: Sequence[int], format: Format
) -> tuple[dict[str, torch.Tensor], dict[str, Rounded]]:
    """config: of a model in float32 on the CPU.

    Returns tensors of the checkpoint that take the place of its own, by name; and layers, by name
    without ".weight".
    """
    cpu = torch.device("cpu")
    model = Decoder(config, TensorParallel(), cpu)
    layers = [module for module in model.layers.modules() if isinstance(module, Linear)]
    with tqdm(total=len(layers), desc="Calibrating", unit="layer") as progress:
        method = Calibrated(format, progress)
        for layer in layers:
            layer.method = method
        model.load(checkpoint)
        model(*_batch(config, ids))

    tensors: dict[str, torch.Tensor] = {}
    rounded: dict[str, Rounded] = {}
    for layer in layers:
        sizes = [part.out_features for part in layer.parts]
        names = [part.name for part in layer.parts]
        if layer.bias is not None:
            names_of_bias = [f"{name}.bias" for name in names]
            tensors |= zip(names_of_bias, layer.bias.split(sizes), strict=True)
        rounded |= zip(names, layer.rounded.split(sizes), strict=True)
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
