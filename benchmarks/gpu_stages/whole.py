"""OUT = beta C + A Bᵀ in bfloat16 without a copy of C: is it faster than torch.baddbmm, which copies?

Shapes   A (N, p, k), B (N, q, k), any strides · C, OUT (N, p, q) contiguous · p a multiple of 128, q of 256, k of 64
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def whole_kernel(
    A, B, C, OUT, q, k, a_batch, a_row, a_column, b_batch, b_row, b_column, beta,
    P: tl.constexpr, Q: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = q // Q
    i, j = tile // across, tile % across
    rows, columns, depth = i * P + tl.arange(0, P), j * Q + tl.arange(0, Q), tl.arange(0, DEPTH)
    left = A + batch * a_batch + rows[:, None] * a_row + depth[None, :] * a_column
    right = B + batch * b_batch + columns[None, :] * b_row + depth[:, None] * b_column
    total = tl.zeros((P, Q), tl.float32)
    for _ in range(0, k, DEPTH):
        total = tl.dot(tl.load(left), tl.load(right), total)
        left += DEPTH * a_column
        right += DEPTH * b_column
    size = tl.num_programs(0).to(tl.int64) * P * Q
    here = batch * size + rows[:, None] * q + columns[None, :]
    total += beta * tl.load(C + here).to(tl.float32)
    tl.store(OUT + here, total.to(OUT.dtype.element_ty))


def fits(A: Tensor, B: Tensor) -> bool:
    return A.dtype == torch.bfloat16 and A.shape[1] % 128 == 0 and B.shape[1] % 256 == 0 and A.shape[2] % 64 == 0


def whole(A: Tensor, B: Tensor, C: Tensor, beta: float, out: Tensor | None = None) -> Tensor:
    N, p, k = A.shape
    q = B.shape[1]
    out = torch.empty(N, p, q, dtype=A.dtype, device=A.device) if out is None else out
    whole_kernel[(p // 128 * (q // 256), N)](
        *(A, B, C, out, q, k, *A.stride(), *B.stride(), float(beta)),
        P=128,
        Q=256,
        DEPTH=64,
        num_warps=8,
        num_stages=3,
    )
    return out
