"""Reading GGUF files (llama.cpp's format): metadata, tensor directory, memory-mapped blocks.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes
several NumPy views for every token of the vocabulary and so takes seconds; this one walks the
header once. No torch here: the launcher reads a model's configuration from the header.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"

# Metadata value types: their code in the file -> struct format.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Tensor types that this project handles itself: code -> (name, weights a block, bytes a block).
_BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor is, and what."""

    name: str
    shape: tuple[int, ...]  # row-major, as torch has it: [out, in]
    type: str
    """Name of the block type: "F32", "Q4_1", ..."""
    offset: int
    """Of its first byte, from the start of the file."""
    row_bytes: int
    """Of one row: blocks run along the last dimension."""


class GGUFFile:
    """`metadata`: key -> int, float, bool, str or a list of them. `tensors`: name -> GGUFTensor.

    Raises ValueError, naming the file, where it is not GGUF, truncated, or of an unknown version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header()
        except struct.error:
            raise ValueError(f"{path} is truncated: its header does not end") from None
        for t in self.tensors.values():
            if t.offset + self._nbytes(t) > len(self._data):
                raise ValueError(f"{path} is truncated: the data of {t.name} is missing")

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop of a tensor as they are stored: uint8 [rows, row_bytes], not copied."""
        t = self.tensors[name]
        blocks = np.frombuffer(self._data, np.uint8, self._nbytes(t), t.offset)
        return blocks.reshape(-1, t.row_bytes)[start:stop]

    @staticmethod
    def _nbytes(t: GGUFTensor) -> int:
        return int(np.prod(t.shape[:-1], dtype=np.int64)) * t.row_bytes

    def _read_header(self) -> None:
        version, num_tensors, num_values = struct.unpack_from("<IQQ", self._data, 4)
        if version not in (2, 3):
            raise ValueError(f"{self.path} is GGUF version {version}; supported: 2 and 3")
        at = 4 + struct.calcsize("<IQQ")

        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            (key,), at = self._strings(at, 1)
            (kind,) = struct.unpack_from("<I", self._data, at)
            self.metadata[key], at = self._value(kind, at + 4)

        directory = []
        for _ in range(num_tensors):
            (name,), at = self._strings(at, 1)
            (rank,) = struct.unpack_from("<I", self._data, at)
            *dims, code, offset = struct.unpack_from(f"<{rank}QIQ", self._data, at + 4)
            at += 4 + struct.calcsize(f"<{rank}QIQ")
            directory.append((name, tuple(reversed(dims)), code, offset))

        alignment = self.metadata.get("general.alignment", 32)
        data_start = -(-at // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, code, offset in directory:
            type, block, block_bytes = _block_layout(code, name)
            if shape[-1] % block:
                raise ValueError(
                    f"{self.path}: rows of {name} are no whole number of {type} blocks"
                )
            row_bytes = shape[-1] // block * block_bytes
            self.tensors[name] = GGUFTensor(name, shape, type, data_start + offset, row_bytes)

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        """The value at byte `at`, and where the next thing begins."""
        if kind == _STRING:
            (text,), at = self._strings(at, 1)
            return text, at
        if kind == _ARRAY:
            item_kind, count = struct.unpack_from("<IQ", self._data, at)
            at += 12
            if item_kind == _STRING:
                return self._strings(at, count)
            if item_kind == _ARRAY:
                items = []
                for _ in range(count):
                    item, at = self._value(_ARRAY, at)
                    items.append(item)
                return items, at
            code = _SCALARS[item_kind][1]
            values = struct.unpack_from(f"<{count}{code}", self._data, at)
            return list(values), at + struct.calcsize(f"<{count}{code}")
        code = _SCALARS.get(kind)
        if code is None:
            raise ValueError(f"{self.path}: unknown metadata type {kind}")
        return struct.unpack_from(code, self._data, at)[0], at + struct.calcsize(code)

    def _strings(self, at: int, count: int) -> tuple[list[str], int]:
        """`count` strings in a row. The hot loop: a vocabulary and its merges are 100,000s."""
        data, length_at = self._data, struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            texts.append(data[start:at].decode("utf-8", "replace"))
        return texts, at


def _block_layout(code: int, name: str) -> tuple[str, int, int]:
    if code in _BLOCKS:
        return _BLOCKS[code]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        type = GGMLQuantizationType(code)
    except ValueError:
        raise ValueError(f"tensor {name} has the unknown GGUF type {code}") from None
    return (type.name, *GGML_QUANT_SIZES[type])


# --- blocks -> numbers ---------------------------------------------------------------------------


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, 16] -> uint8 [n, 32]: low nibbles are the block's first half."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    # | d f16 | 16 bytes |  weight = d (q - 8)
    weights = _nibbles(blocks[:, 2:]).astype(np.float32)
    weights -= 8.0
    weights *= blocks[:, :2].view(np.float16).astype(np.float32)
    return weights


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    # | d f16 | m f16 | 16 bytes |  weight = d q + m
    weights = _nibbles(blocks[:, 4:]).astype(np.float32)
    weights *= blocks[:, :2].view(np.float16).astype(np.float32)
    weights += blocks[:, 2:4].view(np.float16).astype(np.float32)
    return weights


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    # | d f16 | 32 x int8 |  weight = d q
    weights = blocks[:, 2:].view(np.int8).astype(np.float32)
    weights *= blocks[:, :2].view(np.float16).astype(np.float32)
    return weights


_DEQUANTIZE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0
}  # fmt: skip
_BLOCK_BYTES = {name: block_bytes for name, _, block_bytes in _BLOCKS.values()}
_CHUNK = 4096  # blocks at a time: their float32 weights stay in the L2 cache


def dequantize(rows: np.ndarray, type: str) -> np.ndarray:
    """uint8 [rows, row_bytes] -> float32 [rows, in_features]. Types without a function above are
    left to the `gguf` package; raises ValueError where it has none either."""
    if type == "F32":
        return rows.view(np.float32)
    if type == "F16":
        return rows.view(np.float16).astype(np.float32)
    if type == "BF16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if type not in _DEQUANTIZE:
        return _dequantize_rare(rows, type)
    blocks = rows.reshape(-1, _BLOCK_BYTES[type])
    out = np.empty((len(blocks), 32), np.float32)
    for i in range(0, len(blocks), _CHUNK):
        out[i : i + _CHUNK] = _DEQUANTIZE[type](blocks[i : i + _CHUNK])
    return out.reshape(len(rows), -1)


def int4_blocks(rows: np.ndarray, type: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [rows, row_bytes] of Q4_0 or Q4_1 -> (q uint8 [rows, K], scale and low float32
    [rows, K / 32]): a weight is q scale + low."""
    blocks = rows.reshape(-1, _BLOCK_BYTES[type])
    scale = blocks[:, :2].view(np.float16).astype(np.float32)
    if type == "Q4_1":
        low, start = blocks[:, 2:4].view(np.float16).astype(np.float32), 4
    else:
        low, start = -8.0 * scale, 2
    shape = (len(rows), -1)
    return _nibbles(blocks[:, start:]).reshape(shape), scale.reshape(shape), low.reshape(shape)


def _dequantize_rare(rows: np.ndarray, type: str) -> np.ndarray:
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    try:
        return quants.dequantize(rows, GGMLQuantizationType[type])
    except NotImplementedError:
        raise ValueError(f"weights of the GGUF type {type} are not supported") from None
