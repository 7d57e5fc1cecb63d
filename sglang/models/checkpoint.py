"""Weights on disk. Layers pull what they need from a Checkpoint, by name and by share.

Names are those of Hugging Face checkpoints (model.layers.0.self_attn.q_proj.weight), whatever the
file calls them.
"""

from __future__ import annotations

import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sglang.layers.shard import WHOLE, Shard

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig


_NOT_NEEDED = re.compile(
    r".*\.rotary_emb\.inv_freq"  # which older versions of transformers stored
    r"|.*\.self_attn\.[kv]_scale|.*\.[kv]_proj\.(output|[kv])_scale"  # of a KV cache in 8 bits
)


def open_checkpoint(
    config: ModelConfig, load_format: str | None = None, show_progress: bool = True
) -> Checkpoint:
    """load_format: "safetensors", "pt", "gguf" or "dummy"; by default the configuration's.
    show_progress: a bar, on a terminal. Raises ValueError where a file is missing or broken."""
    load_format = load_format or config.load_format
    if load_format == "dummy":
        return DummyCheckpoint()
    if load_format == "gguf":
        from sglang.models.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(config.path, show_progress)
    kinds = {"safetensors": SafetensorsCheckpoint, "pt": TorchCheckpoint}
    if load_format not in kinds:
        raise ValueError(f"unknown load format {load_format}")
    return kinds[load_format](Path(config.path), show_progress)


class Checkpoint(ABC):
    """Knows which of its tensors were asked for."""

    def __init__(self, names: Iterable[str], show_progress: bool) -> None:
        self._unused = set(names)
        self._names = frozenset(self._unused)
        self._bar = tqdm(
            total=len(self._names),
            desc="Loading weights",
            unit=" tensors",
            disable=None if show_progress else True,
            leave=False,
        )

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def has(self, name: str) -> bool:
        return name in self._names

    def load(
        self, out: torch.Tensor, name: str, dim: int | None = None, shard: Shard = WHOLE
    ) -> None:
        """Read a tensor, or a shard of it along `dim`, into `out`, in out's dtype, on its device.

        Raises ValueError if there is no such tensor, if it has another shape than `out` (dimensions
        of one do not count), or numbers of another kind.
        """
        if name not in self._names:
            layer, _, missing = name.rpartition(".")
            others = sorted(n for n in self._names if n.startswith(f"{layer}."))
            stored = f", but {others[-1]}: is it quantized otherwise?" if others else ""
            raise ValueError(
                f"the checkpoint has no tensor {name}{stored if missing != 'bias' else ''}"
            )
        self.ignore(name)
        shape = list(self.shape(name))
        index = [slice(None)] * len(shape)
        if dim is not None and dim < len(shape):
            index[dim] = slice(*shard.bounds(shape[dim]))
            shape[dim] = index[dim].stop - index[dim].start
        if [size for size in shape if size != 1] != [size for size in out.shape if size != 1]:
            share = "" if shard == WHOLE else f" (share {shard.rank} of {shard.size}: {shape})"
            raise ValueError(
                f"{name} is {list(self.shape(name))}{share} in the checkpoint, but the model's "
                f"configuration makes it {list(out.shape)}"
            )
        self._read(out.view(shape), name, tuple(index))

    def stored(self, name: str) -> torch.Tensor:
        """A whole tensor as it is, of checkpoints that quantization methods read."""
        raise NotImplementedError

    def ignore(self, name: str) -> None:
        """It is no error that this tensor, if there, is not loaded."""
        if name in self._unused:
            self._unused.discard(name)
            self._bar.update()

    def assert_all_used(self) -> None:
        """Raises ValueError, naming it, if a tensor has no place in the model."""
        left = sorted(name for name in self._unused if not _NOT_NEEDED.fullmatch(name))
        self._bar.close()
        if left:
            names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise ValueError(f"the checkpoint has tensors that the model does not use: {names}")

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def _read(self, out: torch.Tensor, name: str, index: tuple[slice, ...]) -> None:
        """Copy tensor[index] into `out`; index has a slice for each dimension."""


class TensorFiles(Checkpoint):
    """Of files that hold tensors by their names."""

    def __init__(self, files: Iterable[tuple[Path, dict[str, Any]]], show_progress: bool) -> None:
        """files: of each its tensors, or slices, which are read when they are indexed."""
        self._tensors: dict[str, Any] = {}
        home: dict[str, Path] = {}
        for path, tensors in files:
            for name in tensors:
                if home.setdefault(name, path) != path:
                    raise ValueError(f"{name} is in both {home[name]} and {path}")
            self._tensors |= tensors
        if "embed_tokens.weight" in self._tensors:  # of a decoder alone (Qwen3-Embedding's)
            self._tensors = {
                n if n.startswith("lm_head.") else f"model.{n}": t for n, t in self._tensors.items()
            }
        super().__init__(self._tensors, show_progress)

    def stored(self, name: str, index: tuple[slice, ...] = ()) -> torch.Tensor:
        self.ignore(name)
        return self._tensors[name][index]

    def _read(self, out: torch.Tensor, name: str, index: tuple[slice, ...]) -> None:
        tensor = self.stored(name, index)
        if not _can_become(tensor.dtype, out.dtype):
            kinds = [str(t.dtype).removeprefix("torch.") for t in (tensor, out)]
            raise ValueError(
                f"{name} is {kinds[0]} in the checkpoint, but the model's configuration makes it "
                f"{kinds[1]}"
            )
        out.copy_(tensor)


def _can_become(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Numbers of 8 bits mean something together with their scales only."""
    same_kind = stored.is_floating_point == wanted.is_floating_point
    return stored == wanted if wanted.itemsize == 1 else same_kind


class SafetensorsCheckpoint(TensorFiles):
    """Maps its files into memory: only the shares that are asked for are read."""

    def __init__(self, folder: Path, show_progress: bool) -> None:
        from safetensors import SafetensorError, safe_open

        self._files = []  # the slices do not keep them open
        found = []
        for path, wanted in _files(folder, "model.safetensors", "*.safetensors"):
            try:
                file = safe_open(path, framework="pt", device="cpu").__enter__()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"cannot read {path}: {error}") from None
            self._files.append(file)
            names = file.keys()
            slices = {n: file.get_slice(n) for n in names if wanted is None or n in wanted}
            found.append((path, slices))
        super().__init__(found, show_progress)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].get_shape())


class TorchCheckpoint(TensorFiles):
    """PyTorch's own files, mapped into memory, read without running what is pickled in them."""

    def __init__(self, folder: Path, show_progress: bool) -> None:
        found = []
        pattern = "pytorch_model*.bin" if any(folder.glob("pytorch_model*.bin")) else "*.bin"
        for path, wanted in _files(folder, "pytorch_model.bin", pattern):
            tensors = {
                name: tensor
                for name, tensor in _torch_load(path).items()
                if isinstance(tensor, torch.Tensor) and (wanted is None or name in wanted)
            }
            found.append((path, tensors))
        super().__init__(found, show_progress)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


def _torch_load(path: Path) -> dict[str, torch.Tensor]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **options)
        except RuntimeError:  # a file from before torch 1.6 is no zip archive and cannot be mapped
            return torch.load(path, **options)
    except Exception as error:  # of several kinds, some with advice of many lines
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot read {path}: {reason}") from None


def _files(folder: Path, single: str, pattern: str) -> list[tuple[Path, frozenset[str] | None]]:
    """The files of a checkpoint, each with the names to take from it (None: all of them)."""
    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
        return [(folder / single, None)]
    if not index.is_file():
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise ValueError(f"{folder} has no {pattern}")
        return [(path, None) for path in paths]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"cannot read {index}: {error!r}") from None
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    if missing := [file for file in names if not (folder / file).is_file()]:
        raise ValueError(f"{folder} lacks {missing[0]}, which {index.name} lists")
    return [(folder / file, frozenset(each)) for file, each in names.items()]


class DummyCheckpoint(Checkpoint):
    """Random weights of whatever shape is asked for, made where they are wanted. The same name
    gives the same weights, so replicated shares agree over ranks.

    They are as small as SGLang's and vLLM's: a GPU at its power limit runs the slower, the more
    bits change in its matrix units, so engines compare only over weights of the same spread."""

    SPREAD = 1e-3

    def __init__(self) -> None:
        super().__init__((), show_progress=False)
        self._generators: dict[torch.device, torch.Generator] = {}

    def has(self, name: str) -> bool:
        return False

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError("random weights have the shape that is asked for")

    def load(
        self, out: torch.Tensor, name: str, dim: int | None = None, shard: Shard = WHOLE
    ) -> None:
        if name.endswith("g_idx"):
            out.fill_(-1)  # inputs in order
            return
        if not out.dtype.is_floating_point:
            return self._fill_integers(out, name, shard)
        if out.dtype.itemsize == 1:  # so small an FP8 number would be 0; and torch draws none
            values = torch.empty(out.shape, dtype=torch.bfloat16, device=out.device)
            out.copy_(values.normal_(0.0, 20.0, generator=self._generator(out.device, name, shard)))
        else:
            generator = self._generator(out.device, name, shard)
            out.uniform_(-self.SPREAD, self.SPREAD, generator=generator)

    def _fill_integers(self, out: torch.Tensor, name: str, shard: Shard) -> None:
        info = torch.iinfo(out.dtype)
        out.random_(info.min, info.max, generator=self._generator(out.device, name, shard))

    def _generator(self, device: torch.device, name: str, shard: Shard) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(zlib.crc32(name.encode()) + shard.rank)

    def _read(self, out: torch.Tensor, name: str, index: tuple[slice, ...]) -> None:
        raise NotImplementedError
