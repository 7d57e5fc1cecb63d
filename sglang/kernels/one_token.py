"""What products of one token with packed weights share (int4_gemv.py, w8a8_gemv.py): how the rows
are cut and handed out, and what becomes of the sums that tensor cores leave in a program's lanes.
int4_dots.py draws where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import multiprocessors


@dataclass(frozen=True)
class OneTokenConfig:
    rows: int
    """1, 2 or 4, of each half of a tile. If gated, the halves are gates and their ups."""
    num_warps: int
    per_sm: int
    """Programs on a multiprocessor, which share the tiles."""

    def cut(self, device: torch.device, num_rows: int, num_chunks: int) -> dict[str, int]:
        """Arguments of a launch. num_chunks: of a row, each loaded at once by a lane."""
        tiles, lanes = triton.cdiv(num_rows, 2 * self.rows), 32 * self.num_warps
        return {
            "R": self.rows,
            "TILES": tiles,
            "PROGRAMS": min(tiles, self.per_sm * multiprocessors(device)),
            "C": lanes,
            "PARTS": triton.cdiv(num_chunks, lanes),
            "num_warps": self.num_warps,
            # All programs of a multiprocessor are to be there at once.
            "maxnreg": min(65536 // (lanes * self.per_sm) // 8 * 8, 255),
        }


@triton.jit
def columns(t):
    """[..., 1, 2 or 4] -> so many tensors [...]."""
    COUNT: tl.constexpr = t.shape[-1]
    if COUNT == 1:
        return (t.reshape(t.shape[:-1]),)
    elif COUNT == 2:
        return tl.split(t)
    else:
        SHAPE: tl.constexpr = t.shape[:-1]
        even, odd = tl.split(t.reshape(SHAPE + [2, 2]))  # noqa: RUF005 (for Triton)
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def on_diagonal(even, odd):
    """Columns 2 t and 2 t + 1, [C] each, in the lane t of a quad -> the quad's own one, in one of
    its lanes, and 0 in the others."""
    lane = tl.arange(0, even.shape[0]) % 32
    own = tl.where(lane // 4 == lane % 4 * 2, even, 0.0)
    return tl.where(lane // 4 == lane % 4 * 2 + 1, odd, own)


@triton.jit
def _merge(rows, BIT: tl.constexpr):
    """Tensors [C], a power of two of them -> half as many. Lanes without BIT in their number go on
    with the first ones, others with the rest: each with its own and its partner's."""
    LEFT: tl.constexpr = len(rows) // 2
    up = tl.arange(0, rows[0].shape[0]) & BIT != 0
    merged = ()
    for i in tl.static_range(LEFT):
        other = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;",
            "=f,f,r",
            [tl.where(up, rows[i], rows[i + LEFT]), BIT],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
        merged += (tl.where(up, rows[i + LEFT], rows[i]) + other,)
    return merged


@triton.jit
def add_up(rows, TENSOR: tl.constexpr):
    """2, 4 or 8 tensors [C] -> [2, 4 or 8], the sum of each."""
    COUNT: tl.constexpr = len(rows)
    C: tl.constexpr = rows[0].shape[0]
    if TENSOR:
        # With each step lanes have half as many rows to add up.
        rows = _merge(rows, 16)
        if COUNT > 2:
            rows = _merge(rows, 8)
        if COUNT > 4:
            rows = _merge(rows, 4)
        return tl.sum(tl.sum(rows[0].reshape(C // 32, COUNT, 32 // COUNT), 2), 0)
    else:
        out = tl.zeros([COUNT], tl.float32)
        for i in tl.static_range(COUNT):
            out = tl.where(tl.arange(0, COUNT) == i, tl.sum(rows[i]), out)
        return out


@triton.jit
def store_outputs(
    out, bias_ptr, out_ptr, tile,
    OUTPUTS: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A tile's sums, float32 [2 R], with their bias and SwiGLU. out_ptr: the token's outputs."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.arange(0, 2 * R)
    n = tile * R + at % R if GATED else tile * (2 * R) + at
    if BIAS:
        row = n + at // R * OUTPUTS if GATED else n
        out += tl.load(bias_ptr + row, mask=n < OUTPUTS, other=0.0).to(tl.float32)
    out = out.to(DTYPE)
    if GATED:
        gate, up = tl.split(out.to(tl.float32).reshape(2, R).permute(1, 0))
        out = (gate / (1.0 + tl.exp(-gate)) * up).to(DTYPE)
        n = tile * R + tl.arange(0, R)
    tl.store(out_ptr + n, out, mask=n < OUTPUTS)
