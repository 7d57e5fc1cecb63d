"""What becomes of a transposed product's sums, in Gluon on Hopper: a group of warps has those of 64
outputs with some tokens, and stores them; or they are a part of a tile's only, and the parts'
programs share out the tokens and add them up, always in the same order.

Parts meet in memory, where each number says itself whether it is there, as in NCCL's protocol LL:
no fence, no counter, whose ways to memory and back took longer than products of few tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

OUTPUTS = gl.constexpr(64)
"""Of a group."""


class Place(NamedTuple):
    """Of a group's sums in the result."""

    out_ptr: gl.tensor  # [num_tokens, num_outputs]
    num_tokens: gl.tensor
    num_outputs: gl.tensor
    m: gl.tensor  # the first token
    n: gl.tensor  # the first output
    own_m: gl.tensor  # what lies before these another tile stores
    own_n: gl.tensor


_ROWS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
"""Of [OUTPUTS, tokens] on their way out: 8 threads have the outputs of a token, 16 bytes each."""


@gluon.jit
def store(sums, place, ADDS: gl.constexpr, first=0):
    """sums: [OUTPUTS, tokens], float32, as registers have them, of tokens `first` and on. ADDS: to
    what is there."""
    if sums.shape[1] > OUTPUTS:
        SIZE: gl.constexpr = sums.shape[1] // 2
        left, right = sums.reshape([OUTPUTS, 2, SIZE]).permute((0, 2, 1)).split()
        store(left, place, ADDS, first)
        store(right, place, ADDS, first + SIZE)
    else:
        DTYPE: gl.constexpr = place.out_ptr.dtype.element_ty
        sums = gl.convert_layout(sums.to(DTYPE), _ROWS)
        m = place.m + first + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, _ROWS))
        n = place.n + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, _ROWS))
        in_m = (m >= place.own_m) & (m < place.num_tokens)
        at = m.to(gl.int64)[None, :] * place.num_outputs + n[:, None]
        mask = in_m[None, :] & (n >= place.own_n)[:, None]
        if ADDS:
            there = gl.load(place.out_ptr + at, mask=mask, other=0.0)
            sums = (sums.to(gl.float32) + there.to(gl.float32)).to(DTYPE)
        gl.store(place.out_ptr + at, sums, mask=mask)


EMPTY = gl.constexpr(-1)
"""Four bytes in which no sum has been written: the bits of a NaN."""
_NAN = gl.constexpr(0x7FFFFFFF)
"""Another one, which hardware makes."""


class Parts(NamedTuple):
    """Of a group's sums of one tile."""

    sums_ptr: gl.tensor  # float32 [count, tokens / 8, 512], EMPTY
    count: gl.tensor
    own: gl.tensor


_FOURS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0]))
"""Of [tokens / 8, 512], the sums of [OUTPUTS, tokens] in an order in which a thread's registers go
out four at a time, and those of a warp side by side."""
_THREADS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def store_part(sums, parts):
    """sums: [OUTPUTS, tokens], float32."""
    TOKENS: gl.constexpr = sums.shape[1]
    # outputs are (warp, register, lane), tokens are (register, lane, register)
    sums = sums.reshape([4, 2, 8, TOKENS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    sums = gl.convert_layout(sums.reshape([TOKENS // 8, 512]), _FOURS, assert_trivial=True)
    sums = sums.to(gl.int32, bitcast=True)
    sums = gl.where(sums == EMPTY, _NAN, sums).to(gl.float32, bitcast=True)
    row = gl.arange(0, TOKENS // 8, layout=gl.SliceLayout(1, _FOURS))
    at = row[:, None] * 512 + gl.arange(0, 512, layout=gl.SliceLayout(0, _FOURS))[None, :]
    # In no order, but each number is written once, and says itself whether it is there.
    gl.store(parts.sums_ptr + parts.own * (TOKENS * OUTPUTS) + at, sums)


@gluon.constexpr_function
def _take_asm(rows, parts, part_bytes):
    """Reads a thread's fours of some rows, of all parts that there are, until none is EMPTY; leaves
    EMPTY there; and adds up the parts. Its registers are four sums of each row, then a pointer to
    the four of the first row and part, then how many parts there are."""
    pointer, count = f"${4 * rows}", f"${4 * rows + 1}"
    numbers = [f"v{i}" for i in range(4 * rows * parts)]
    lines = [f".reg .b32 most, none, v<{len(numbers)}>;", f".reg .pred empty, there<{parts}>;"]
    lines += ["mov.b32 none, -1;"]
    lines += [f"mov.b32 {v}, 0;" for v in numbers]
    lines += [f"setp.gt.s32 there{part}, {count}, {part};" for part in range(parts)]
    loads, leaves = [], []
    for i in range(rows * parts):
        part, row = i // rows, i % rows
        at = f"[{pointer} + {part * part_bytes + row * 2048}]"
        four = ", ".join(numbers[4 * i : 4 * i + 4])
        loads += [f"@there{part} ld.relaxed.gpu.global.v4.b32 {{{four}}}, {at};"]
        leaves += [f"@there{part} st.global.v4.b32 {at}, {{none, none, none, none}};"]
    lines += ["again:", *loads, "mov.b32 most, v0;"]
    lines += [f"max.u32 most, most, {v};" for v in numbers]
    lines += ["setp.eq.u32 empty, most, none;", "@empty bra again;", *leaves]
    for i in range(4 * rows):
        lines += [f"mov.b32 ${i}, v{i};"]
        lines += [f"add.f32 ${i}, ${i}, v{i + part * 4 * rows};" for part in range(1, parts)]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _take_constraints(rows):
    return ",".join(["=&f"] * (4 * rows) + ["l", "r"])


@gluon.jit
def _rows(fours):
    """Four tensors [128] of each row -> [rows, 512]."""
    COUNT: gl.constexpr = len(fours)
    if COUNT == 4:
        left, right = gl.join(fours[0], fours[2]), gl.join(fours[1], fours[3])
        return gl.join(left, right).reshape([1, 512])
    else:
        first, second = _rows(fours[: COUNT // 2]), _rows(fours[COUNT // 2 :])
        return gl.join(first, second).permute((2, 0, 1)).reshape([COUNT // 4, 512])


@gluon.jit
def add_up(parts, TOKENS: gl.constexpr, place, ADDS: gl.constexpr):
    """Waits for all parts, which must be under way: no more programs than the GPU runs at once.
    Stores every count-th chunk of the tokens."""
    CHUNK: gl.constexpr = TOKENS // 4 if TOKENS > 64 else 8
    ROWS: gl.constexpr = CHUNK // 8
    AT_ONCE: gl.constexpr = 8 if TOKENS <= 64 else 4
    four = gl.arange(0, 128, layout=_THREADS) * 4
    for chunk in range(parts.own, TOKENS // CHUNK, parts.count):
        sums = gl.zeros([ROWS, 512], gl.float32, _FOURS)
        for first in range(0, parts.count, AT_ONCE):
            at = parts.sums_ptr + (first * TOKENS + chunk * CHUNK) * OUTPUTS + four
            fours = gl.inline_asm_elementwise(
                _take_asm(ROWS, AT_ONCE, TOKENS * OUTPUTS * 4),
                _take_constraints(ROWS),
                [at.to(gl.int64), gl.full([128], parts.count - first, gl.int32, _THREADS)],
                dtype=(gl.float32,) * (4 * ROWS),
                is_pure=False,
                pack=1,
            )
            sums += gl.convert_layout(_rows(fours), _FOURS, assert_trivial=True)
        sums = sums.reshape([ROWS, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
        store(sums.reshape([OUTPUTS, CHUNK]), place, ADDS, chunk * CHUNK)
