"""All-reduce of small tensors in one shot, over memory that the ranks' GPUs share.

A ring passes a message on from rank to rank, and a small one takes as long as all those hops. Here
every rank writes its tensor straight into every other's memory, raises a flag there, waits for the
others' flags and sums up what has come: one hop, one kernel. All ranks sum in the order of ranks,
so they get the same bits.

A program looks after one chunk of the tensor, from launch to launch the same one, and needs nobody
but its twins on the other ranks. It counts its launches; they use two sets of slots and flags by
turns, since a twin may be one launch ahead, but no further: it waits for this rank's flag there.

    a rank's memory      flags  int32 [MAX_PROGRAMS, 2 turns, ranks]      the launch's number
                         slots        [MAX_PROGRAMS, 2 turns, ranks, CHUNK_BYTES]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import launch_next, pdl, wait_for_previous

CHUNK_BYTES = 8192
MAX_PROGRAMS = 512


def takes(x: torch.Tensor) -> bool:
    """Whether `all_reduce` can have x."""
    return x.is_contiguous() and 0 < x.nbytes <= MAX_PROGRAMS * CHUNK_BYTES


def memory_bytes(num_ranks: int) -> int:
    """Of each rank; zeros before the first launch."""
    return MAX_PROGRAMS * 2 * num_ranks * (4 + CHUNK_BYTES)


def all_reduce_naive(shares: Sequence[torch.Tensor], largest: bool = False) -> torch.Tensor:
    """What every rank gets: the sum of the ranks' tensors, in float32 and then in their dtype; or
    with `largest` the largest, element by element."""
    total = shares[0] if largest else shares[0].float()
    for share in shares[1:]:
        total = torch.maximum(total, share) if largest else total + share
    return total.to(shares[0].dtype)


@triton.jit
def _flags(memory):
    return memory.to(tl.pointer_type(tl.int32))


@triton.jit
def _slots(memory, FLAG_BYTES: tl.constexpr, DTYPE: tl.constexpr):
    return tl.multiple_of((memory + FLAG_BYTES).to(tl.pointer_type(DTYPE)), 16)


@triton.jit(do_not_specialize=["rank"])
def _all_reduce_kernel(
    x_ptr,  # [n]: this rank's, and then all ranks'
    memories,  # of each rank, an address
    own,  # this rank's
    launches_ptr,  # int32 [programs]
    n,
    rank,
    RANKS: tl.constexpr,
    LARGEST: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    program = tl.program_id(0)
    launch = tl.load(launches_ptr + program) + 1
    seat = (program * 2 + (launch & 1)) * RANKS  # of rank 0; the others' follow
    i = tl.arange(0, BLOCK)
    inside = program * BLOCK + i < n
    x_at = x_ptr + program * BLOCK + i
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    x = tl.load(x_at, mask=inside)
    for r in tl.static_range(RANKS):
        slots = _slots(memories[r], FLAG_BYTES, dtype)
        tl.store(slots + (seat + rank) * BLOCK + i, x, mask=inside)
    tl.debug_barrier()  # one thread raises the flag for what all of them have written
    for r in tl.static_range(RANKS):
        if r != rank:
            tl.atomic_xchg(_flags(memories[r]) + seat + rank, launch, sem="release", scope="sys")
    for r in tl.static_range(RANKS):
        if r != rank:
            flag = _flags(own) + seat + r
            while tl.atomic_add(flag, 0, sem="acquire", scope="sys") != launch:
                pass
    slots = _slots(own, FLAG_BYTES, dtype) + seat * BLOCK + i
    total = tl.load(slots, mask=inside, cache_modifier=".cg")
    if not LARGEST:
        total = total.to(tl.float32)
    for r in tl.static_range(1, RANKS):
        share = tl.load(slots + r * BLOCK, mask=inside, cache_modifier=".cg")
        total = tl.maximum(total, share) if LARGEST else total + share.to(tl.float32)
    tl.store(x_at, total.to(dtype), mask=inside)
    tl.store(launches_ptr + program, launch)


def all_reduce_triton(
    x: torch.Tensor,
    memories: tuple[int, ...],
    launches: torch.Tensor,
    rank: int,
    largest: bool = False,
    num_warps: int = 8,
) -> torch.Tensor:
    """In place. All ranks must launch the same sizes in the same order, on one stream each.

    memories   addresses of the ranks' memories, as this rank sees them
    launches   int32 [MAX_PROGRAMS], this rank's; zeros before the first launch
    """
    block = CHUNK_BYTES // x.element_size()
    _all_reduce_kernel[(triton.cdiv(x.numel(), block),)](
        x, memories, memories[rank], launches, x.numel(), rank,
        RANKS=len(memories),
        LARGEST=largest,
        FLAG_BYTES=MAX_PROGRAMS * 2 * len(memories) * 4,
        BLOCK=block,
        num_warps=num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return x
