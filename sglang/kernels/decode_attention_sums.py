"""Decode attention without tensor cores, for one query head a KV head and 8-bit caches.

With a single query a tensor core's tile is nearly empty, and what must be in registers to feed it
lets few programs onto an SM: too few to hide each other's waits. Here a thread multiplies what it
has loaded, 16 bytes of each of four tokens. Only threads that have parts of the same tokens need
each other before the end of a row: a softmax is of what these have seen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang.kernels.decode_shares import merge_parts, part_at, row_part, take_share
from sglang.kernels.launch import launch_next, wait_for_previous

TOKENS = tl.constexpr(4)
"""Of a tile, in each thread."""

# Four 8-bit floats -> each of them.
_UNPACK = tl.constexpr("""{
.reg .b16 low, high, a, b, c, d;
.reg .b32 first, second;
mov.b32 {low, high}, $4;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mov.b32 {a, b}, first;
mov.b32 {c, d}, second;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b;
cvt.f32.f16 $2, c;
cvt.f32.f16 $3, d;
}""")
_FOUR = tl.constexpr((tl.float32, tl.float32, tl.float32, tl.float32))


@triton.jit
def _element(words, i: tl.constexpr):
    return ((words >> (8 * i)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _unpack(words, ASM: tl.constexpr):
    """int32, of four 8-bit floats each -> float32, the first, second, third and fourth of each."""
    if ASM:
        return tl.inline_asm_elementwise(
            _UNPACK, "=f,=f,=f,=f,r", [words], dtype=_FOUR, is_pure=True, pack=1
        )
    else:
        return _element(words, 0), _element(words, 1), _element(words, 2), _element(words, 3)


# What varies from step to step, alignment included, must not compile a kernel anew.
@triton.jit(
    do_not_specialize=["num_rows", "num_shares"],
    do_not_specialize_on_alignment=["rows_ptr", "lens_ptr"],
)
def decode_sums_kernel(
    q_ptr,  # [n, HQ, D]
    k_ptr,  # int32, four elements each
    v_ptr,
    table_ptr,
    rows_ptr,
    lens_ptr,
    partial_ptr,  # as `part_buffers` says
    lse_ptr,
    ended_ptr,
    out_ptr,  # [n, HQ, D] contiguous
    q_stride,
    kv_stride,  # of a slot, in both caches
    table_stride,
    scale_log2,
    num_rows,
    num_shares,
    WINDOW: tl.constexpr,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile is [G, T, W]: groups of threads, tokens of each, words of a head, of which word w has
    the elements 4w to 4w + 3."""
    launch_next(PDL)
    wait_for_previous(PDL)
    T: tl.constexpr = TOKENS
    G: tl.constexpr = BLOCK_N // TOKENS
    W: tl.constexpr = D // 4
    head = tl.program_id(0)
    w = tl.arange(0, W)
    n = tl.arange(0, G)[:, None] * T + tl.arange(0, T)[None, :]
    k_base = k_ptr + head * W + w[None, None, :]
    v_base = v_ptr + head * W + w[None, None, :]
    dtype = out_ptr.dtype.element_ty
    share = take_share(
        lens_ptr, num_rows, num_shares,
        WINDOW, BLOCK_N, MIN_TILES, MAX_PARTS, ROWS_PADDED, BRANCH=True,
    )  # fmt: skip
    before = share.before
    for i in tl.range(share.first_row, share.last_row + 1):
        kv_len = tl.load(lens_ptr + i)
        start, end, tiles, parts, first_program = row_part(share, kv_len, before, WINDOW, BLOCK_N)
        before += tiles
        at_row = tl.full([], i, tl.int64)
        q_at = q_ptr + at_row * q_stride + head * D + 4 * w
        q_0 = (tl.load(q_at).to(tl.float32) * scale_log2)[None, None, :]
        q_1 = (tl.load(q_at + 1).to(tl.float32) * scale_log2)[None, None, :]
        q_2 = (tl.load(q_at + 2).to(tl.float32) * scale_log2)[None, None, :]
        q_3 = (tl.load(q_at + 3).to(tl.float32) * scale_log2)[None, None, :]
        table = table_ptr + tl.load(rows_ptr + i).to(tl.int64) * table_stride

        most = tl.full([G], -1.0e30, tl.float32)  # finite: a group may see no token
        total = tl.zeros([G], tl.float32)
        acc_0 = tl.zeros([G, W], tl.float32)
        acc_1 = acc_0
        acc_2 = acc_0
        acc_3 = acc_0
        # The index tile is loaded one turn ahead, as in decode_attention.py. Past the end it
        # repeats the last token, whose weight is then zero.
        last = tl.maximum(end - 1, 0)
        slots = tl.load(table + tl.minimum(start + n, last))
        for at in tl.range(start, end, BLOCK_N, num_stages=STAGES):
            offset = (slots.to(tl.int64) * kv_stride)[:, :, None]
            k = tl.load(k_base + offset)
            v = tl.load(v_base + offset)
            slots = tl.load(table + tl.minimum(at + BLOCK_N + n, last))
            k_0, k_1, k_2, k_3 = _unpack(k, ASM)
            scores = tl.sum(q_0 * k_0 + q_1 * k_1 + q_2 * k_2 + q_3 * k_3, 2)
            scores = tl.where(at + n < end, scores, -float("inf"))
            new_most = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - new_most[:, None])
            shrink = tl.exp2(most - new_most)
            total = total * shrink + tl.sum(weights, 1)
            most = new_most
            v_0, v_1, v_2, v_3 = _unpack(v, ASM)
            weights = weights[:, :, None]
            shrink = shrink[:, None]
            acc_0 = acc_0 * shrink + tl.sum(weights * v_0, 1)
            acc_1 = acc_1 * shrink + tl.sum(weights * v_1, 1)
            acc_2 = acc_2 * shrink + tl.sum(weights * v_2, 1)
            acc_3 = acc_3 * shrink + tl.sum(weights * v_3, 1)

        highest = tl.max(most, 0)
        grown = tl.exp2(most - highest)
        total = tl.maximum(tl.sum(total * grown, 0), 1.0e-30)  # of a part without tokens, 0
        grown = (grown / total)[:, None]
        even = tl.interleave(tl.sum(acc_0 * grown, 0), tl.sum(acc_2 * grown, 0))
        odd = tl.interleave(tl.sum(acc_1 * grown, 0), tl.sum(acc_3 * grown, 0))
        acc = tl.interleave(even, odd)
        d = tl.arange(0, D)
        if parts == 1:
            tl.store(out_ptr + (at_row * HQ + head) * D + d, acc.to(dtype))
        elif parts > 1:
            at_part = part_at(first_program) * HQ + head
            tl.store(partial_ptr + at_part * D + d, acc)
            tl.store(lse_ptr + at_part, highest + tl.log2(total))
            merge_parts(
                at_row, head, 0, 1, parts, first_program,
                partial_ptr, lse_ptr, ended_ptr, out_ptr, HQ, D, D, MAX_PARTS,
            )  # fmt: skip
