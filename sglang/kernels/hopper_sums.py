"""What becomes of a transposed product's sums, in Gluon on Hopper: a group of warps has those of 64
outputs with some tokens, and stores them; or they are a part of a tile's only, and the last ones to
be written let every part's program add up those of some of the tokens, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# In Triton 3.9 it is `barrier`.
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

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


class Parts(NamedTuple):
    """Of a group's sums of one tile."""

    sums_ptr: gl.tensor  # float32 [count, tokens / 8, 512]
    counts_ptr: gl.tensor  # int32 [2], zeros: parts written, parts read
    count: gl.tensor
    own: gl.tensor


_FOURS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0]))
"""Of [tokens / 8, 512], the sums of [OUTPUTS, tokens] in an order in which a thread's registers go
out four at a time, and those of a warp side by side."""


@gluon.jit
def _in_fours(tokens: gl.constexpr):
    row = gl.arange(0, tokens // 8, layout=gl.SliceLayout(1, _FOURS))
    return row[:, None] * 512 + gl.arange(0, 512, layout=gl.SliceLayout(0, _FOURS))[None, :]


@gluon.jit
def store_part(sums, parts):
    """sums: [OUTPUTS, tokens], float32."""
    TOKENS: gl.constexpr = sums.shape[1]
    # outputs are (warp, register, lane), tokens are (register, lane, register)
    sums = sums.reshape([4, 2, 8, TOKENS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    sums = gl.convert_layout(sums.reshape([TOKENS // 8, 512]), _FOURS, assert_trivial=True)
    gl.store(parts.sums_ptr + parts.own * (TOKENS * OUTPUTS) + _in_fours(TOKENS), sums)
    thread_barrier()  # all are written before the part is counted
    gl.atomic_add(parts.counts_ptr, 1, sem="release")


@gluon.jit
def add_up(parts, TOKENS: gl.constexpr, place, ADDS: gl.constexpr):
    """Waits for all parts, which must be under way: no more programs than the GPU runs at once.
    Stores every count-th chunk of the tokens."""
    CHUNK: gl.constexpr = TOKENS // 4 if TOKENS >= 32 else 8
    AT_ONCE: gl.constexpr = 4 if TOKENS >= 64 else 8  # parts that are asked for before one is added
    while gl.atomic_add(parts.counts_ptr, 0, sem="acquire") < parts.count:
        pass
    thread_barrier()
    for chunk in range(parts.own, TOKENS // CHUNK, parts.count):
        at = parts.sums_ptr + chunk * (CHUNK * OUTPUTS) + _in_fours(CHUNK)
        sums = gl.zeros([CHUNK // 8, 512], gl.float32, _FOURS)
        for first in range(0, parts.count, AT_ONCE):
            for i in gl.static_range(AT_ONCE):
                is_there = gl.full(sums.shape, first + i, gl.int32, _FOURS) < parts.count
                part = at + (first + i) * (TOKENS * OUTPUTS)
                sums += gl.load(part, is_there, 0.0, cache_modifier=".cg")
        sums = sums.reshape([CHUNK // 8, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
        store(sums.reshape([OUTPUTS, CHUNK]), place, ADDS, chunk * CHUNK)
    if gl.atomic_add(parts.counts_ptr + 1, 1, sem="relaxed") == parts.count - 1:
        gl.store(parts.counts_ptr, 0)
        gl.store(parts.counts_ptr + 1, 0)
