"""What a way to store and multiply weights must say about itself.

A method declares the tensors that a checkpoint holds for a linear layer, with the dimensions that
run along its outputs and its inputs. Fusing layers (q, k, v) and sharding them over tensor-parallel
ranks follow from that: neither knows any method, and no method knows them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels.activation import silu_and_mul

if TYPE_CHECKING:
    from sglang.kernels.row_scale import RowScale
    from sglang.layers.linear import Linear, Part
    from sglang.layers.norm import RMSNorm
    from sglang.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a linear layer, as the checkpoint holds it: whole, unfused, maybe packed."""

    suffix: str
    """Its name after the layer's: "weight", "qweight", "scales"."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    output_dim: int | None = None
    """The dimension along which output features run, in whatever units; None: it has none."""
    input_dim: int | None = None


class LinearMethod(ABC):
    """How one kind of linear layer keeps its weights. Has no state: that is the layer's."""

    @abstractmethod
    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        """Of an unsharded layer; dtype is the activations'."""

    @abstractmethod
    def apply(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        """x [T, in_features of this rank] -> x W^T + bias, [T, out_features of this rank]."""

    def apply_normed(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, in_features] -> (apply(norm(x + residual)), x + residual); of outputs
        that are (gate | up), `gated` makes silu(gate) * up. A method may do this in one kernel."""
        x, residual = norm(x, residual)
        return (self.apply_gated if gated else self.apply)(layer, x, bias), residual

    def apply_unscaled(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, RowScale | None]:
        """As apply_normed. A method may leave it to whoever reads the outputs to multiply them by
        what it returns last."""
        return *self.apply_normed(layer, x, bias, norm, residual, False), None

    def apply_gated(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        """Of outputs of `apply` that are (gate | up), silu(gate) * up."""
        return silu_and_mul(self.apply(layer, x, bias))

    def apply_added(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """residual + apply(x), as two summands, or as one if a method adds on its way. It may
        overwrite the residual."""
        return self.apply(layer, x, bias), residual

    def take_norm(self, layer: Linear, norm: RMSNorm) -> None:  # noqa: B027
        """After loading: only this layer will read what the norm returns, so a method may take the
        norm's weight into its own."""

    def finish(self, layer: Linear) -> None:  # noqa: B027
        """After loading: repack the layer's parameters into what `apply` wants."""

    def load(self, layer: Linear, checkpoint: Checkpoint) -> None:
        """Read this rank's share of every declared tensor into a parameter of the layer.

        A fused layer's parts stand one after the other along the output dimension; tensors without
        one (a scale of the whole part) are stacked along a new first dimension.
        """
        declared = [
            self.tensors(layer.in_features, part.out_features, layer.dtype) for part in layer.parts
        ]
        for stored in zip(*declared, strict=True):
            fused = _load_fused(layer, list(stored), checkpoint)
            layer.register_parameter(stored[0].suffix, nn.Parameter(fused, requires_grad=False))


class Quantization(ABC):
    """A checkpoint's way to store weights: which layers use which method."""

    @abstractmethod
    def linear(self, name: str) -> LinearMethod:
        """The method of the layer with this name, such as model.layers.0.mlp.down_proj. Raises
        ValueError if it is one that cannot be served."""

    def fused(self, names: list[str]) -> LinearMethod:
        """The method of a layer that is made of these."""
        methods = [self.linear(name) for name in names]
        if any(method is not methods[0] for method in methods):
            raise ValueError(f"{', '.join(names)}: some are quantized and some are not")
        return methods[0]

    def tied_head(self) -> LinearMethod:
        """The method of an output head whose weights are the embedding's. It gets them as
        `layer.weight`, in floating point, and must leave them as they are."""
        from sglang.quantization.unquantized import Unquantized

        return Unquantized()


def ignore_zeros(checkpoint: Checkpoint, name: str, otherwise: str) -> None:
    """It is no error that this tensor, if there, is not loaded, as long as it is zero."""
    if checkpoint.has(name) and checkpoint.stored(name).any():
        raise ValueError(f"{name} is not zero, and {otherwise}")


def _load_fused(
    layer: Linear, stored: list[StoredTensor], checkpoint: Checkpoint
) -> torch.Tensor:  # fmt: skip
    shapes = [_shard_shape(layer, part, s) for part, s in zip(layer.parts, stored, strict=True)]
    dim, dtype = stored[0].output_dim, stored[0].dtype
    if dim is None:
        fused = torch.zeros((len(stored), *shapes[0]), dtype=dtype, device=layer.device)
        views = list(fused.unbind())
    else:
        sizes = [shape[dim] for shape in shapes]
        shape = (*shapes[0][:dim], sum(sizes), *shapes[0][dim + 1 :])
        fused = torch.empty(shape, dtype=dtype, device=layer.device)
        views = list(fused.split(sizes, dim))
    for part, s, view in zip(layer.parts, stored, views, strict=True):
        name = f"{part.name}.{s.suffix}"
        if s.output_dim is not None and part.shard.size > 1:
            view = _without_padding(view, s.shape[s.output_dim], s.output_dim, part)
            checkpoint.load(view, name, s.output_dim, part.shard)
        elif s.input_dim is not None and layer.input_shard.size > 1:
            checkpoint.load(view, name, s.input_dim, layer.input_shard)
        else:
            checkpoint.load(view, name)
    return fused


def _shard_shape(layer: Linear, part: Part, stored: StoredTensor) -> tuple[int, ...]:
    shape = list(stored.shape)
    for dim, shard in ((stored.output_dim, part.shard), (stored.input_dim, layer.input_shard)):
        if dim is None:
            continue
        if shape[dim] % shard.size and not part.padded:
            raise ValueError(
                f"{part.name}.{stored.suffix} {list(stored.shape)} cannot be split into "
                f"{shard.size} along dimension {dim}: choose another --tp-size"
            )
        shape[dim] = shard.length(shape[dim])
    return tuple(shape)


def _without_padding(view: torch.Tensor, whole: int, dim: int, part: Part) -> torch.Tensor:
    """The last ranks of a padded layer have less than a full share: the rest is zero."""
    start, stop = part.shard.bounds(whole)
    if stop - start < view.shape[dim]:
        view.zero_()
    return view.narrow(dim, 0, stop - start)
