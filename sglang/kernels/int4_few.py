"""Two to eight tokens times a matrix of 4-bit weights (int4_weight.py), in Gluon on Hopper:
y = x W^T + b, or added to what is there.

As with one token (int4_dots.py) tensor cores take nibbles where loads have put them. But a lane's
inputs are another token's than its neighbour's, and all that is multiplied is wanted:

    lane                           0 1 2 3 | 4 5 6 7 | ...    A step is 128 inputs, which share a
    rows of weights, of 16         0, 8    | 1, 9    | ...    scale. A program's warps share out the
    token, of 8                    0       | 1       | ...    steps of a tile of rows, and add up
    chunk, 32 of a step's inputs   0 1 2 3 | 0 1 2 3 | ...    their sums when they are through.

A program keeps its inputs in registers and goes from tile to tile: it reads nothing but weights,
and those of the next tile before the sums of this one are added up. If there are as few tiles as
multiprocessors each tile is a program's own, of twice the rows, and inputs come with the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sglang.kernels.hopper import aligned, multiprocessors
from sglang.kernels.int4_dots import BFLOAT16_ASM, CONSTRAINTS, FLOAT16_ASM
from sglang.kernels.int4_weight import Int4Weight

MAX_TOKENS = 8
"""16 are quicker with int4_hopper.py in a decoder, where it loads its first weights early."""
STEP = gl.constexpr(128)
WARPS = gl.constexpr(8)


# --- loading -------------------------------------------------------------------------------------

_LOAD_WORDS = gl.constexpr("""{
.reg .pred there;
setp.ne.b32 there, $5, 0;
@there ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];
}""")
_LOAD_INPUTS = gl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
# Chunks that are neighbours in a block have each two of four pairs in a row, of all 32 inputs. So
# of two rows of pairs each lane loads one, $4 .. $7, and has $0 .. $3 when they have exchanged two:
# its pairs of the first lane's row, and those of the second one's. $8: which of them it is.
_EXCHANGE = gl.constexpr("""{
.reg .pred second;
.reg .b32 a, b;
setp.ne.b32 second, $8, 0;
selp.b32 a, $4, $6, second;
selp.b32 b, $5, $7, second;
shfl.sync.bfly.b32 a, a, 1, 31, -1;
shfl.sync.bfly.b32 b, b, 1, 31, -1;
selp.b32 $0, a, $4, second;
selp.b32 $1, b, $5, second;
selp.b32 $2, $6, a, second;
selp.b32 $3, $7, b, second;
}""")


class Weights(NamedTuple):
    """Where each lane begins in the first tile, pointers [C]; and the number of outputs."""

    words: gl.tensor
    scales: gl.tensor
    n: gl.tensor


@gluon.jit
def _weights(words_ptr, scales_ptr, n, lane, K: gl.constexpr):
    row = lane % 32 // 4
    words = words_ptr + (row * (K // 8) + lane // 32 * (STEP // 8) + lane % 4 * 4)
    return Weights(words, scales_ptr + row, n)


@gluon.jit
def _load_weights(
    start, tile, part: gl.constexpr, is_there, lane, K: gl.constexpr, GROUP: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    """For each row of a lane: (int32 [C] four times, its scale)."""
    step = part * WARPS + lane // 32
    if (part + 1) * WARPS > K // STEP:
        is_there = is_there & (step < K // STEP)
    words_ptr = start.words + tile.to(gl.int64) * (ROWS * K // 8)
    scales_ptr = start.scales + (tile * ROWS + step * STEP // GROUP * start.n)
    rows = ()
    for row in gl.static_range(0, ROWS, 8):
        at = words_ptr + (row * (K // 8) + part * WARPS * (STEP // 8))
        words = gl.inline_asm_elementwise(
            _LOAD_WORDS,
            "=r,=r,=r,=r,l,r",
            [at.to(gl.int64), is_there.to(gl.int32)],
            dtype=(gl.int32,) * 4,
            is_pure=False,
            pack=1,
        )
        # Behind the last step they are zero: whatever the words are then, it is not added.
        rows += ((words, gl.load(scales_ptr + row, mask=is_there, other=0)),)
    return rows


@gluon.jit
def _load_eight(pointers):
    return gl.inline_asm_elementwise(
        _LOAD_INPUTS, "=r,=r,=r,=r,l", [pointers.to(gl.int64)], dtype=(gl.int32,) * 4,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_inputs(start, part: gl.constexpr, lane, K: gl.constexpr):
    """Four rows of pairs, int32 [C] 16 times: eight inputs and the next eight, in either half of a
    block. Behind the last step any will do."""
    at = start + part * WARPS * STEP
    if (part + 1) * WARPS > K // STEP:
        at = gl.where(part * WARPS + lane // 32 < K // STEP, at, start)
    return _load_eight(at) + _load_eight(at + 8) + _load_eight(at + 32) + _load_eight(at + 40)


@gluon.jit
def _exchanged(row, lane):
    return gl.inline_asm_elementwise(
        _EXCHANGE,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        row + (lane % 2,),  # noqa: RUF005 (for Triton)
        dtype=(gl.int32,) * 4,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _of_words(row, next_row, lane):
    """What the words of a chunk are multiplied with, one by one, in one half of a block."""
    a, b = _exchanged(row, lane), _exchanged(next_row, lane)
    return a[0], b[0], a[2], b[2], a[1], b[1], a[3], b[3]


@gluon.jit
def _of_chunk(rows, lane):
    """Pairs as int4_dots.py has them, int32 [C] 16 times."""
    low = _of_words(rows[0:4], rows[4:8], lane)
    return low + _of_words(rows[8:12], rows[12:16], lane)


# --- multiplying ---------------------------------------------------------------------------------

# The sums of two tokens' inputs: times ones.
_FLOAT16_ONES, _BFLOAT16_ONES = (
    gl.constexpr(f"""{{
.reg .b32 one;
mov.b32 one, {one};
mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
    {{$0, $1, $2, $3}}, {{one, one, one, one}}, {{$4, $5}}, {{$6, $7, $8, $9}};
}}""")
    for kind, one in (("f16", "0x3c003c00"), ("bf16", "0x3f803f80"))
)


@gluon.jit
def _totals(x, zero, UNIT: gl.constexpr, IS_HALF: gl.constexpr):
    """The sums of a step's inputs, of the two tokens of which a lane gets sums."""
    sums = (zero, zero, zero, zero)
    for i in gl.static_range(8):
        sums = gl.inline_asm_elementwise(
            _FLOAT16_ONES if IS_HALF else _BFLOAT16_ONES,
            "=f,=f,=f,=f,r,r,f,f,f,f",
            (x[2 * i], x[2 * i + 1]) + sums,  # noqa: RUF005 (for Triton)
            dtype=(gl.float32,) * 4,
            is_pure=True,
            pack=1,
        )
    return sums[0] * UNIT, sums[1] * UNIT


@gluon.jit
def _dots(first, second, x, zero, IS_HALF: gl.constexpr):
    """The nibbles of two rows times inputs: of each row two tokens' sums of the low nibbles, then
    the same of the high ones."""
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    for i in gl.static_range(4):
        inputs = (x[2 * i], x[2 * i + 1], x[2 * i + 8], x[2 * i + 9])
        sums = gl.inline_asm_elementwise(
            FLOAT16_ASM if IS_HALF else BFLOAT16_ASM,
            CONSTRAINTS,
            (first[i], second[i]) + inputs + sums,  # noqa: RUF005 (for Triton)
            dtype=(gl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    return sums


@gluon.jit
def _add_row(acc, low, other_low, high, other_high, totals, word, IS_HALF: gl.constexpr):
    """To two tokens' sums those of a row's step, whose scale and zero point are in `word`."""
    UP: gl.constexpr = 1 / 16 if IS_HALF else 1.0  # where the high nibbles were
    scale = (word & -32).to(gl.float32, bitcast=True)
    zero = (word & 31).to(gl.float32) + (0.0 if IS_HALF else 128.0)
    return (
        acc[0] + (low + high * UP - zero * totals[0]) * scale,
        acc[1] + (other_low + other_high * UP - zero * totals[1]) * scale,
    )


@gluon.jit
def _add_step(acc, weights, x, totals, zero, IS_HALF: gl.constexpr):
    """To the sums of each row of a lane, of two tokens."""
    sums = ()
    for r in gl.static_range(0, len(weights), 2):
        first, second = weights[r], weights[r + 1]
        q = _dots(first[0], second[0], x, zero, IS_HALF)
        sums += (_add_row(acc[r], q[0], q[1], q[4], q[5], totals, first[1], IS_HALF),)
        sums += (_add_row(acc[r + 1], q[2], q[3], q[6], q[7], totals, second[1], IS_HALF),)
    return sums


@gluon.jit
def _stacked(tensors):
    """A power of two of them [C] -> [C, 2, 2, ...]."""
    if len(tensors) == 1:
        return tensors[0]
    else:
        even = ()
        odd = ()
        for i in gl.static_range(0, len(tensors), 2):
            even += (tensors[i],)
            odd += (tensors[i + 1],)
        return gl.join(_stacked(even), _stacked(odd))


@gluon.jit
def _store(acc, tile, bias_ptr, out_ptr, num_tokens, n, ADDS: gl.constexpr, UNIT: gl.constexpr):
    """Adds up what all warps have of a tile."""
    ROWS: gl.constexpr = len(acc) * 8
    COUNT: gl.constexpr = len(acc) * 2
    flat = ()
    for row in gl.static_range(len(acc)):
        flat += acc[row]
    LAYOUT: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 32, 1], [1, 1, WARPS], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    sums = gl.convert_layout(_stacked(flat).reshape([WARPS, 32, COUNT]), LAYOUT)
    out = gl.sum(sums, 0) * (1.0 / UNIT)
    lane = gl.arange(0, 32, layout=gl.SliceLayout(1, OUT))[:, None]
    i = gl.arange(0, COUNT, layout=gl.SliceLayout(0, OUT))[None, :]
    m = lane % 4 * 2 + i % 2
    at_n = tile * ROWS + i // 2 * 8 + lane // 4
    if bias_ptr is not None:
        out += gl.load(bias_ptr + at_n).to(gl.float32)
    at = out_ptr + (m * n + at_n)
    if ADDS:
        out += gl.load(at, mask=m < num_tokens, other=0.0).to(gl.float32)
    gl.store(at, out.to(out_ptr.dtype.element_ty), mask=m < num_tokens)


@gluon.jit(do_not_specialize=["num_tokens", "tiles"])
def _int4_few_kernel(
    x_ptr,  # [T, K]
    words_ptr,  # the packed weights, int32 [N, K / 8]
    scales_ptr,  # int32 [groups, N]
    bias_ptr,
    out_ptr,  # [T, N]
    num_tokens,
    x_stride,
    n,
    tiles,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    ADDS: gl.constexpr,
    KEEPS: gl.constexpr,  # the inputs
    ROWS: gl.constexpr,  # of a tile
    AHEAD: gl.constexpr,  # steps of a warp whose weights are on their way
):
    IS_HALF: gl.constexpr = out_ptr.dtype.element_ty == gl.float16
    UNIT: gl.constexpr = 2.0**-24 if IS_HALF else 1.0  # of sums of products
    PARTS: gl.constexpr = (K // STEP + WARPS - 1) // WARPS  # a warp has a step of each
    C: gl.constexpr = 32 * WARPS
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane = gl.arange(0, C, layout=LANES)
    yes = lane >= 0
    zero = gl.zeros([C], gl.float32, LANES)
    none = ()
    for _row in gl.static_range(ROWS // 8):
        none += ((zero, zero),)
    start = _weights(words_ptr, scales_ptr, n, lane, K)
    first = gl.program_id(0)
    weights = ()
    for p in gl.static_range(AHEAD):
        weights += (_load_weights(start, first, p, yes, lane, K, GROUP, ROWS),)
    # Weights are never written: only what comes next depends on the kernels before.
    gdc_launch_dependents()
    gdc_wait()

    token = gl.minimum(lane % 32 // 4, num_tokens - 1)  # what is not there repeats what is
    warp = gl.minimum(lane // 32, K // STEP - 1)
    x = x_ptr + (token * x_stride + warp * STEP + lane % 4 // 2 * 64 + lane % 2 * 16)
    loaded = (_load_inputs(x, 0, lane, K),)
    if KEEPS:
        for p in gl.static_range(1, PARTS):
            loaded += (_load_inputs(x, p, lane, K),)
        inputs = ()
        totals = ()
        for p in gl.static_range(PARTS):
            inputs += (_of_chunk(loaded[p], lane),)
            totals += (_totals(inputs[p], zero, UNIT, IS_HALF),)
        for tile in range(first, tiles, gl.num_programs(0)):
            after = tile + gl.num_programs(0)
            is_there = yes & (after < tiles)
            acc = none
            for p in gl.static_range(PARTS):
                acc = _add_step(acc, weights[p], inputs[p], totals[p], zero, IS_HALF)
                if p + AHEAD < PARTS:
                    more = _load_weights(start, tile, p + AHEAD, yes, lane, K, GROUP, ROWS)
                else:
                    part = p + AHEAD - PARTS
                    more = _load_weights(start, after, part, is_there, lane, K, GROUP, ROWS)
                weights += (more,)
            weights = weights[PARTS:]
            _store(acc, tile, bias_ptr, out_ptr, num_tokens, n, ADDS, UNIT)
    else:
        acc = none
        for p in gl.static_range(PARTS):
            inputs = _of_chunk(loaded[p], lane)
            if p + 1 < PARTS:
                loaded += (_load_inputs(x, p + 1, lane, K),)
            if p + AHEAD < PARTS:
                weights += (_load_weights(start, first, p + AHEAD, yes, lane, K, GROUP, ROWS),)
            totals = _totals(inputs, zero, UNIT, IS_HALF)
            acc = _add_step(acc, weights[p], inputs, totals, zero, IS_HALF)
        _store(acc, first, bias_ptr, out_ptr, num_tokens, n, ADDS, UNIT)


# --- on the host ---------------------------------------------------------------------------------


def choose_mode(n: int, k: int, processors: int) -> bool | None:
    """Whether inputs are kept. None: int4_hopper.py is quicker. Measured on an H200."""
    if n > 32 * processors and k <= 5120:  # what registers hold
        return True
    most = 16384 if n <= 32 * processors else 8192  # all steps are written out
    return False if k <= most else None


def usable(x: torch.Tensor, w: Int4Weight) -> bool:
    n, k = w.packed.shape[0], w.num_inputs
    return (
        1 < len(x) <= MAX_TOKENS
        and multiprocessors(x.device) > 0
        and x.dtype in (torch.float16, torch.bfloat16)
        and n % 32 == 0
        and k % STEP.value == 0
        and w.group_size % STEP.value == 0
        and choose_mode(n, k, multiprocessors(x.device)) is not None
    )


def int4_few_linear(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    keeps: bool | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's dtype, accumulated in float32, of arguments that are `usable`.
    keeps: the inputs (None: where it is quicker). added: [T, N], contiguous, to which the result
    is added, in place."""
    num_tokens, n, k = x.shape[0], w.packed.shape[0], w.num_inputs
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device) if added is None else added
    x = aligned(x)
    processors = multiprocessors(x.device)
    if keeps is None:
        keeps = choose_mode(n, k, processors)
    rows = 16 if keeps else 32
    tiles = n // rows
    parts = triton.cdiv(k, STEP.value * WARPS.value)
    # The last one's may come with the inputs, if no other tile's are loaded then.
    ahead = min(4, parts if keeps else max(parts - 1, 1))

    _int4_few_kernel[(min(tiles, processors) if keeps else tiles,)](
        x, w.packed.view(torch.int32), w.scales, bias, out, num_tokens, x.stride(0), n, tiles,
        K=k,
        GROUP=w.group_size,
        ADDS=added is not None,
        KEEPS=keeps,
        ROWS=rows,
        AHEAD=ahead,
        num_warps=WARPS.value,
        maxnreg=255,  # with fewer, two programs would share a multiprocessor, and others have none
        launch_pdl=True,
    )  # fmt: skip
    return out
