"""What becomes of a transposed product's sums, in Gluon on Hopper: a group of warps has those of 64
outputs with some tokens, and stores them; or they are a part of a tile's only, and the parts'
programs share out the tokens and add them up, always in the same order.

Parts meet in memory, where each number says itself whether it is there, as in NCCL's protocol LL:
no fence, no counter, whose ways to memory and back took longer than products of few tokens. They
are to stay in the L2 cache: in a decoder weights and KV stream through it between two products, and
whoever looked for numbers there would wait for memory first.
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
        _put(sums, _target(place, first, sums.shape[1], ADDS), ADDS)


class Target(NamedTuple):
    """Where sums go, [OUTPUTS, tokens]."""

    ptr: gl.tensor
    mask: gl.tensor
    value: gl.tensor  # what is there, if they are to be added to it


@gluon.jit
def _target(place, first, TOKENS: gl.constexpr, ADDS: gl.constexpr):
    """Of the tokens `first` and on. ADDS: what is there is loaded."""
    m = place.m + first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, _ROWS))
    n = place.n + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, _ROWS))
    in_m = (m >= place.own_m) & (m < place.num_tokens)
    ptr = place.out_ptr + (m.to(gl.int64)[None, :] * place.num_outputs + n[:, None])
    mask = in_m[None, :] & (n >= place.own_n)[:, None]
    return Target(ptr, mask, gl.load(ptr, mask=mask, other=0.0) if ADDS else 0.0)


@gluon.jit
def _put(sums, target, ADDS: gl.constexpr):
    """Rounds, adds and stores."""
    DTYPE: gl.constexpr = target.ptr.dtype.element_ty
    sums = gl.convert_layout(sums.to(DTYPE), _ROWS)
    if ADDS:
        sums = (sums.to(gl.float32) + target.value.to(gl.float32)).to(DTYPE)
    gl.store(target.ptr, sums, mask=target.mask)


EMPTY = gl.constexpr(-1)
"""Four bytes in which no sum has been written: the bits of a NaN."""
_NAN = gl.constexpr(0x7FFFFFFF)
"""Another one, which hardware makes."""


class Parts(NamedTuple):
    """Of a group's sums of one tile."""

    sums_ptr: gl.tensor  # float32 [count, tokens / 8, 512], EMPTY
    count: gl.tensor
    own: gl.tensor  # which of them is this program's


_FOURS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0]))
"""Of [tokens / 8, 512], the sums of [OUTPUTS, tokens] in an order in which a thread's registers go
out four at a time, and those of a warp side by side."""
_THREADS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def add_up(sums, parts, place, ADDS: gl.constexpr):
    """sums: a part, [OUTPUTS, tokens], float32. A part's program adds up every count-th chunk of
    the tokens: it keeps those of its own part, gives away the others, and stores the sums of all
    parts. The others must be under way: no more programs than the GPU runs at once."""
    TOKENS: gl.constexpr = sums.shape[1]
    CHUNK: gl.constexpr = min(max(TOKENS // 4, 8), 32)
    ROWS: gl.constexpr = CHUNK // 8
    CHUNKS: gl.constexpr = TOKENS // CHUNK
    own_chunks = 0
    for chunk in range(parts.own, CHUNKS, parts.count):
        own_chunks |= 1 << chunk
    # outputs are (warp, register, lane), tokens are (register, lane, register)
    sums = sums.reshape([4, 2, 8, TOKENS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    sums = gl.convert_layout(sums.reshape([TOKENS // 8, 512]), _FOURS, assert_trivial=True)
    sums = sums.to(gl.int32, bitcast=True)
    sums = gl.where(sums == EMPTY, _NAN, sums).to(gl.float32, bitcast=True)
    # In no order, but each number is written once, and says itself whether it is there.
    row = gl.arange(0, TOKENS // 8, layout=gl.SliceLayout(1, _FOURS))
    at = row[:, None] * 512 + gl.arange(0, 512, layout=gl.SliceLayout(0, _FOURS))[None, :]
    theirs = (own_chunks >> (row // ROWS) & 1) == 0
    own_ptr = parts.sums_ptr + parts.own * (TOKENS * OUTPUTS)
    gl.store(own_ptr + at, sums, mask=theirs[:, None], eviction_policy="evict_last")
    for chunk in range(parts.own, CHUNKS, parts.count):
        target = _target(place, chunk * CHUNK, CHUNK, ADDS)  # is on its way while it waits
        total = _all_of(_pick(sums, chunk, CHUNKS), chunk, parts, TOKENS)
        total = total.reshape([ROWS, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
        _put(total.reshape([OUTPUTS, CHUNK]), target, ADDS)


@gluon.jit
def _all_of(own, chunk, parts, TOKENS: gl.constexpr):
    """own: a part's chunk, [rows, 512] -> all parts', added up in their order."""
    ROWS: gl.constexpr = own.shape[0]
    AT_ONCE: gl.constexpr = 8 // ROWS  # a thread has 32 numbers of them
    own_fours = _fours(own)
    four = gl.arange(0, 128, layout=_THREADS) * 4
    total = gl.zeros([ROWS, 512], gl.float32, _FOURS)
    for first in range(0, parts.count, AT_ONCE):
        at = parts.sums_ptr + (first * TOKENS + chunk * ROWS * 8) * OUTPUTS + four
        count = gl.full([128], parts.count - first, gl.int32, _THREADS)
        own_part = gl.full([128], parts.own - first, gl.int32, _THREADS)
        fours = gl.inline_asm_elementwise(
            _take_asm(ROWS, AT_ONCE, TOKENS * OUTPUTS * 4),
            _take_constraints(ROWS),
            (at.to(gl.int64), count, own_part) + own_fours,  # noqa: RUF005 - Gluon has no *
            dtype=(gl.float32,) * (4 * ROWS),
            is_pure=False,
            pack=1,
        )
        total += gl.convert_layout(_rows(fours), _FOURS, assert_trivial=True)
    return total


@gluon.constexpr_function
def _take_asm(rows, parts, part_bytes):
    """Reads a thread's fours of some rows, of all parts that there are but its own, until none is
    EMPTY; leaves EMPTY there; and adds up the parts. Its registers are four sums of each row, then
    a pointer to the four of the first row and part, how many parts there are, which is its own, and
    the fours of that."""
    size = 4 * rows
    pointer, count, own = (f"${size + i}" for i in range(3))
    numbers = [f"v{i}" for i in range(size * parts)]
    lines = [f".reg .b32 most, none, v<{len(numbers)}>;", f".reg .pred is, other<{parts}>;"]
    lines += [".reg .b64 keep;", "createpolicy.fractional.L2::evict_last.b64 keep, 1.0;"]
    lines += ["mov.b32 none, -1;"]
    kept, loads, leaves = "L2::cache_hint.v4.b32", [], []
    for part in range(parts):
        lines += [f"setp.eq.s32 is, {own}, {part};"]
        lines += [f"selp.b32 v{part * size + i}, ${size + 3 + i}, 0, is;" for i in range(size)]
        lines += [f"setp.gt.and.s32 other{part}, {count}, {part}, !is;"]
        for row in range(rows):
            at = f"[{pointer} + {part * part_bytes + row * 2048}]"
            first = part * size + row * 4
            four = ", ".join(numbers[first : first + 4])
            loads += [f"@other{part} ld.relaxed.gpu.global.{kept} {{{four}}}, {at}, keep;"]
            leaves += [f"@other{part} st.global.{kept} {at}, {{none, none, none, none}}, keep;"]
    lines += ["again:", *loads, "mov.b32 most, v0;"]
    lines += [f"max.u32 most, most, {v};" for v in numbers]
    lines += ["setp.eq.u32 is, most, none;", "@is bra again;", *leaves]
    for i in range(size):
        lines += [f"mov.b32 ${i}, v{i};"]
        lines += [f"add.f32 ${i}, ${i}, v{i + part * size};" for part in range(1, parts)]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _take_constraints(rows):
    return ",".join(["=&f"] * (4 * rows) + ["l", "r", "r"] + ["f"] * (4 * rows))


@gluon.jit
def _halves(rows):
    """[rows, 512] -> two of half as many."""
    return rows.reshape([2, rows.shape[0] // 2, 512]).permute((1, 2, 0)).split()


@gluon.jit
def _pick(rows, chunk, CHUNKS: gl.constexpr):
    """The rows of one of some chunks."""
    if CHUNKS == 1:
        return rows
    else:
        HALF: gl.constexpr = CHUNKS // 2
        left, right = _halves(rows)
        return _pick(gl.where((chunk & HALF) == 0, left, right), chunk, HALF)


@gluon.jit
def _fours(rows):
    """[rows, 512] -> four tensors [128] of each row."""
    if rows.shape[0] == 1:
        left, right = rows.reshape([128, 2, 2]).split()
        first, third = left.split()
        second, fourth = right.split()
        return (_one(first), _one(second), _one(third), _one(fourth))
    else:
        first, second = _halves(rows)
        return _fours(first) + _fours(second)


@gluon.jit
def _one(numbers):
    return gl.convert_layout(numbers, _THREADS, assert_trivial=True)


@gluon.jit
def _rows(fours):
    """The inverse of `_fours`."""
    COUNT: gl.constexpr = len(fours)
    if COUNT == 4:
        left, right = gl.join(fours[0], fours[2]), gl.join(fours[1], fours[3])
        return gl.join(left, right).reshape([1, 512])
    else:
        first, second = _rows(fours[: COUNT // 2]), _rows(fours[COUNT // 2 :])
        return gl.join(first, second).permute((2, 0, 1)).reshape([COUNT // 4, 512])
