"""Products of 2 to 8 tokens with a small weight matrix, and what is around them in a decoder.

As in gemv.py, one kernel does RMSNorm, product, bias and SwiGLU, or the addition to the residual
stream, and it asks for its weights before the kernel before it has ended; this one multiplies on
tensor cores, transposed: out^T = W x^T, so that 16 outputs and 8 tokens are a tile.

A program's warps share out the inputs, not the outputs: each warp multiplies some inputs of all of
the program's weights, and in the end their sums are added up. So no warp needs what another has
loaded, and nothing that is multiplied passes through shared memory or waits at a barrier. A lane
loads 16 bytes of a row at once, 8 inputs, where a tensor core's operand has 2 of them in one lane,
2 in the next. But in which order a sum's terms come is nobody's concern: `_operand` calls those
8 inputs of a lane 2 of each of four groups, and moving them is only naming registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.kernels.gemv import fused_linear_naive
from sglang.kernels.launch import launch_next, pdl, wait_for_previous

MAX_TOKENS = 8
"""With more than its columns are, a tensor core has two turns, and every program reads them all."""
MAX_WEIGHTS = 1 << 23
"""Kernels of more take longer than what this one saves between kernels (Llama 2 7B: no gain)."""
MAX_INPUTS = 4096
"""All steps are unrolled: code and compile time grow with the inputs."""


def is_small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether few_linear is the quick way for the tokens x [T, K], where gemv.py's is not."""
    few = x.is_cuda and x.shape[0] <= MAX_TOKENS and x.dtype.itemsize == 2
    return few and x.shape[1] <= MAX_INPUTS and weight.numel() <= MAX_WEIGHTS


def few_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(rms_norm(x) W^T + bias) + added, in x's dtype. Without `norm` nothing is normed, without
    `added` nothing is added; act is SwiGLU if `gated`.

    x       [T, K], quick for T up to MAX_TOKENS
    weight  [N, K] contiguous, less than 2^31 weights
    bias    [N]
    norm    [K], the norm's weight
    gated   the outputs are (gate | up), [T, N] -> silu(gate) * up, [T, N / 2]
    added   [T, N], [T, N / 2] if gated
    """
    run = few_linear_triton if x.is_cuda else few_linear_naive
    return run(x, weight, bias, norm, eps, gated, added)


def few_linear_naive(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    out, _ = fused_linear_naive(x, weight, bias, None, norm, eps, gated)
    return out if added is None else out + added


def choose_warps(num_outputs: int, gated: bool) -> int:
    """By Qwen3-0.6B's matrices on an H200: fewer for many outputs, so that all programs fit on the
    GPU at once. num_outputs: of each half if gated."""
    return 8 if num_outputs <= 2048 or gated else 4


@triton.jit
def _rows(BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """The rows that a tile [lanes, 8] has pieces of, [lanes, 1], 0 .. BLOCK - 1. The tile's lanes
    are [BLOCK / 8, WARPS, 8 rows, 4]: the first are registers of the GPU's."""
    lane = tl.arange(0, BLOCK * 4 * WARPS)
    return (lane // (32 * WARPS) * 8 + lane // 4 % 8)[:, None]


@triton.jit
def _inputs(BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Which inputs of a step are in such a tile, [lanes, 8]: a row's 64 bytes by 4 lanes."""
    lane = tl.arange(0, BLOCK * 4 * WARPS)
    return (lane // 32 % WARPS * 32 + lane % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def _operand(tile, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """A tile as [WARPS, BLOCK, 32], each warp's inputs in the order in which its lanes have them
    for a tensor core: the lane is bits 1 and 2."""
    tile = tl.reshape(tile, (BLOCK // 8, WARPS, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(tile, (1, 0, 2, 4, 5, 3, 6)), (WARPS, BLOCK, 32))


@triton.jit
def _times_norm(tile, norm, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """A tile of BLOCK rows, times one of 8 equal ones."""
    rows = tl.reshape(tile, (BLOCK // 8, 32 * WARPS, 8))
    return tl.reshape(rows * norm[None, :, :], (BLOCK * 4 * WARPS, 8))


@triton.jit
def _load(ptr, at, k, K: tl.constexpr, STEP: tl.constexpr, in_rows, MASKED: tl.constexpr):
    """Rows that begin at `at`, their inputs k. If not MASKED, all rows exist."""
    if K % STEP != 0:
        mask = k < K
        if MASKED:
            mask = mask & in_rows
        return tl.load(ptr + (at + k), mask=mask, other=0.0)
    elif MASKED:
        return tl.load(ptr + (at + k), mask=in_rows, other=0.0)
    else:
        return tl.load(ptr + (at + k))


@triton.jit(do_not_specialize=["num_tokens"])
def _few_kernel(
    x_ptr,  # [T, K]
    norm_ptr,
    weight_ptr,
    bias_ptr,
    added_ptr,  # [T, N]
    out_ptr,  # [T, N] contiguous
    num_tokens,
    x_stride,
    added_stride,
    eps,
    N: tl.constexpr,  # of one half if GATED
    K: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WARPS: tl.constexpr,
):
    STEP: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    # Steps of which the weights are asked for before the previous kernel has ended: as many as
    # there are registers for.
    AHEAD: tl.constexpr = 4 if GATED else 8
    # Steps of inputs, and of the other weights, that are on their way while one is multiplied.
    X_AHEAD: tl.constexpr = 4
    MASKED: tl.constexpr = N % BLOCK_N != 0
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first_n = tl.program_id(0) * BLOCK_N
    first_t = tl.program_id(1) * BLOCK_T

    k = _inputs(BLOCK_N, WARPS)
    norm_k = _inputs(8, WARPS)
    row = _rows(BLOCK_N, WARPS)
    in_n = row < N - first_n
    row = row * K
    weight_ptr += first_n * K
    up_ptr = weight_ptr + N * K
    ws = ()
    ups = ()
    norms = ()
    for i in tl.static_range(min(AHEAD, STEPS)):
        at = k + i * STEP
        ws += (_load(weight_ptr, row, at, K, STEP, in_n, MASKED),)
        if GATED:
            ups += (_load(up_ptr, row, at, K, STEP, in_n, MASKED),)
        if NORM:  # in the layout of the weights
            norms += (_load(norm_ptr, 0, norm_k + i * STEP, K, STEP, in_n, False),)
    n = first_n + tl.arange(0, BLOCK_N)
    bias = tl.zeros([BLOCK_N], tl.float32)
    up_bias = bias
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
    # Weights are never written: only what comes next depends on the kernels before.
    launch_next(PDL)
    wait_for_previous(PDL)

    x_k = _inputs(BLOCK_T, WARPS)
    token = _rows(BLOCK_T, WARPS)
    in_t = token < num_tokens - first_t
    x_row = token * x_stride
    x_ptr += first_t * x_stride
    acc = tl.zeros([WARPS, BLOCK_N, BLOCK_T], tl.float32)
    up = acc
    squares = tl.zeros([BLOCK_T * 4 * WARPS], tl.float32)
    xs = ()
    for i in tl.static_range(STEPS + X_AHEAD):
        if i < STEPS:
            xs += (_load(x_ptr, x_row, x_k + i * STEP, K, STEP, in_t, True),)
            if i >= AHEAD:
                at = k + i * STEP
                ws += (_load(weight_ptr, row, at, K, STEP, in_n, MASKED),)
                if GATED:
                    ups += (_load(up_ptr, row, at, K, STEP, in_n, MASKED),)
                if NORM:
                    norms += (_load(norm_ptr, 0, norm_k + i * STEP, K, STEP, in_n, False),)
        # No program ends here. But ptxas, which takes the weights for present, would defer loads
        # behind products of them; it does not move them over an end.
        if i == X_AHEAD and first_t >= num_tokens:
            return
        if i >= X_AHEAD:
            x = xs[i - X_AHEAD]
            w = ws[i - X_AHEAD]
            if NORM:
                exact = x.to(tl.float32)
                squares += tl.sum(exact * exact, 1)
                # The norm's weights go with the linear layer's: inputs times them could overflow in
                # float16, as the inputs' scale comes at the end.
                w = _times_norm(w, norms[i - X_AHEAD], BLOCK_N, WARPS)
            x = tl.permute(_operand(x, BLOCK_T, WARPS), (0, 2, 1))
            acc = tl.dot(_operand(w, BLOCK_N, WARPS), x, acc)
            if GATED:
                w = ups[i - X_AHEAD]
                if NORM:
                    w = _times_norm(w, norms[i - X_AHEAD], BLOCK_N, WARPS)
                up = tl.dot(_operand(w, BLOCK_N, WARPS), x, up)

    scale = 1.0
    if NORM:
        squares = tl.sum(tl.sum(tl.reshape(squares, (BLOCK_T // 8, WARPS, 8, 4)), 3), 1)
        scale = tl.rsqrt(tl.reshape(squares, (BLOCK_T,)) / K + eps)[None, :]
    out = tl.sum(acc, 0) * scale + bias[:, None]
    if GATED:
        gate = out.to(DTYPE).to(tl.float32)
        up = (tl.sum(up, 0) * scale + up_bias[:, None]).to(DTYPE).to(tl.float32)
        out = gate / (1.0 + tl.exp(-gate)) * up
    t = first_t + tl.arange(0, BLOCK_T)
    mask = (t < num_tokens)[None, :] & (n < N)[:, None]
    if ADDED:
        at = t[None, :] * added_stride + n[:, None]
        out += tl.load(added_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (t[None, :] * N + n[:, None]), out.to(DTYPE), mask=mask)


def few_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    added: torch.Tensor | None = None,
    num_warps: int | None = None,
) -> torch.Tensor:
    num_tokens, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    num_warps = num_warps or choose_warps(num_outputs, gated)
    block_n, block_t = 16, 8  # outputs of each half if gated
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    _few_kernel[triton.cdiv(num_outputs, block_n), triton.cdiv(num_tokens, block_t)](
        x, norm, weight, bias, added, out,
        num_tokens, x.stride(0), 0 if added is None else added.stride(0), eps,
        N=num_outputs,
        K=num_inputs,
        NORM=norm is not None,
        BIAS=bias is not None,
        ADDED=added is not None,
        GATED=gated,
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        WARPS=num_warps,
        num_warps=num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return out
