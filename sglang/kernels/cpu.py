"""Kernels in C++ for a few tokens on a CPU (cpu.cpp), compiled for this one when first wanted.

A step of one token is hundreds of small operations. torch takes several of ten microseconds where
one of these takes two; and products read weights of 4 or 8 bits as they are stored. Tensors are
float32 and contiguous. Who calls has a twin in plain torch, for what these do not take and for
machines without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from sglang.demo_model import cache_folder

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC")
LANES = 8
GROUP = 32
"""Inputs that share a scale."""
FEW_TOKENS = 64
"""With more, torch's products with dequantized weights are quicker."""

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "linear_int4": [_POINTER] * 4 + [_INT] * 3,
    "linear_int8": [_POINTER] * 4 + [_INT] * 3,
    "rms_norm": [_POINTER] * 5 + [_INT] * 2 + [_FLOAT],
    "silu_and_mul": [_POINTER] * 2 + [_INT] * 2,
    "rope_and_write_kv": [_POINTER] * 6 + [_INT] * 4,
    "decode_attention": [_POINTER] * 7 + [_INT] * 7 + [_FLOAT],
    "decoder_layers": [_POINTER] * 9 + [_INT] * 8 + [_FLOAT] * 2,
}


# --- compiling -----------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL | None:
    """None: this machine has no compiler, or not one that can compile it."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    compiler = next(filter(shutil.which, compilers), None)
    if compiler is None:
        logger.warning("there is no C++ compiler: on this CPU decoding will be slow")
        return None
    try:
        found = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("on this CPU decoding will be slow: %s: %s", compiler, said)
        return None
    for name, types in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def _compiled(compiler: str) -> Path:
    """A file in the cache, made at first: its name says of what, by which compiler, for which
    CPU."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    openmp = _openmp_of_torch()
    facts = repr((_SOURCE.read_bytes(), _FLAGS, openmp, version, _cpu()))
    folder = cache_folder() / "kernels"
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        logger.info("compiling kernels for this CPU, once")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            built = Path(building) / path.name
            sources = [str(_SOURCE), "-Wl,--as-needed", *openmp]
            command = [compiler, *_FLAGS, *sources, "-o", str(built)]
            subprocess.run(command, capture_output=True, check=True, text=True)
            os.replace(built, path)  # whoever else compiles it does not see half a file
    return path


def _openmp_of_torch() -> list[str]:
    """The library whose threads torch uses: with another, two teams would fight for the cores."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {Path(line.split()[-1]) for line in lines if ".so" in line}
    return [str(f) for f in files if f.name.startswith(("libgomp", "libomp", "libiomp"))][:1]


def _cpu() -> list[str]:
    """What -march=native may depend on."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return [line for line in lines if line.startswith(("model", "flags", "Features", "CPU"))]


# --- calling -------------------------------------------------------------------------------------


def takes(x: torch.Tensor, size: int = LANES) -> bool:
    """Whether there are kernels for it: its last dimension must be a multiple of `size`."""
    is_ours = x.dtype == torch.float32 and x.is_cpu and x.shape[-1] % size == 0
    return is_ours and library() is not None


def takes_heads(q: torch.Tensor, k_cache: torch.Tensor) -> bool:
    """Whether `decode_attention` does."""
    return takes(q, 4 * LANES) and k_cache.dtype == torch.float32


@dataclass(frozen=True)
class Blocks:
    """Quantized weights [N, K] as cpu.cpp reads them."""

    data: torch.Tensor  # int16 [N / LANES, ...], N filled up
    bits: int
    num_outputs: int


def pack_blocks(
    q: torch.Tensor, scales: torch.Tensor, low: torch.Tensor, bits: int
) -> Blocks | None:
    """q uint8 [N, K] of so many bits, scales and low [N, groups], W = q scale + low. None: the
    groups are not of a size that kernels take."""
    num_outputs = len(q)
    k, groups = q.shape[1], scales.shape[1]
    if k % groups or k // groups % GROUP:
        return None
    q, *halves = (F.pad(x, (0, 0, 0, -len(x) % LANES)) for x in (q, scales.half(), low.half()))
    # [tiles, lanes, groups, words, pairs, halves of a pair]
    pairs = q.unflatten(1, (k // GROUP, -1, 16 // bits, 2)).unflatten(0, (-1, LANES)).short()
    words = sum(pairs[..., i, :] << bits * i for i in range(16 // bits))
    words = words.permute(0, 2, 3, 1, 4).flatten(2)  # [tiles, groups, words of all lanes]
    of_groups = [
        x.repeat_interleave(k // groups // GROUP, 1).unflatten(0, (-1, LANES)).transpose(1, 2)
        for x in halves
    ]
    data = torch.cat([*(x.view(torch.int16) for x in of_groups), words], 2).flatten(1)
    return Blocks(data, bits, num_outputs)


def linear(x: torch.Tensor, weights: Blocks, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] -> [T, N]. What is multiplied are 16 bits of x: whole numbers, with a scale for each
    GROUP of inputs."""
    x, out = x.contiguous(), torch.empty(len(x), weights.num_outputs)
    run = library().linear_int4 if weights.bits == 4 else library().linear_int8
    run(_at(x), _at(weights.data), _at(bias), _at(out), *x.shape, weights.num_outputs)
    return out


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, H] -> (the norm of x + residual, x + residual); no residual is zero."""
    x, out = x.contiguous(), torch.empty(x.shape)
    total = x if residual is None else torch.empty(x.shape)
    library().rms_norm(_at(x), _at(residual), _at(weight), _at(out), _at(total), *x.shape, eps)
    return out, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2I] = (gate | up) -> [T, I]; I a multiple of LANES."""
    x, out = x.contiguous(), torch.empty(len(x), x.shape[1] // 2)
    library().silu_and_mul(_at(x), _at(out), *out.shape)
    return out


def rope_and_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
) -> None:
    """As in rope.py, of heads that are not normed; D / 2 a multiple of LANES."""
    library().rope_and_write_kv(
        _at(qkv), _at(positions), _at(slots), _at(cos_sin), _at(k_cache), _at(v_cache),
        len(qkv), num_q_heads, num_kv_heads, cos_sin.shape[1],
    )  # fmt: skip


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_table: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """As in decode_attention.py. q's rows may be strided."""
    num_rows, num_q_heads, dim = q.shape
    library().decode_attention(
        _at(q), _at(k_cache), _at(v_cache), _at(slot_table), _at(rows), _at(kv_lens), _at(out),
        num_rows, num_q_heads, k_cache.shape[1], dim, q.stride(0), slot_table.stride(0), window,
        scale,
    )  # fmt: skip


def _at(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
